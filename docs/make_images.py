"""Makes the pictures of the README and the docs with the program itself.

    python docs/make_images.py [--run runs/demo]

Writes docs/images: the graph of math_duo, screenshots of the inspect page at 2, 12 and 60 nodes
(needs the extra `browser`), and, with --run, of the report of a run. The learning curve is made by
`benchmarks/seeds.py --plot`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from marft_graph import compile_graph
from marft_graph.graph.page import to_html
from marft_graph.graph.picture import to_svg
from tests.graph.real_apps import sixty, trading_team
from workflows.math_duo.graph import graph as math_duo

IMAGES = Path(__file__).parent / "images"
PAGES = (  # name, app, the node that is clicked, colour scheme
    ("inspect_duo", math_duo, "actor", "light"),
    ("inspect_trading_team", trading_team(), "Trader", "dark"),
    ("inspect_sixty", sixty(), "join_2", "light"),
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser: the system's, else the one that Playwright installed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="a finished run folder of math_duo")
    run = parser.parse_args().run
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "math_duo.svg").write_text(to_svg(compile_graph(math_duo)), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        for name, app, node, scheme in PAGES:
            path = Path(folder) / f"{name}.html"
            path.write_text(to_html(compile_graph(app), title=name), encoding="utf-8")
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
            page.goto(path.as_uri())
            page.click(f'.node[data-node="{node}"]')
            page.screenshot(path=IMAGES / f"{name}.png")
        if run is not None:
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto((run / "report.html").resolve().as_uri())
            page.screenshot(path=IMAGES / "report.png")


if __name__ == "__main__":
    main()
