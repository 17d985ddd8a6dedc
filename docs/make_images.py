"""Makes the pictures of the README and the docs with the program itself.

    python docs/make_images.py [--report runs/demo] [--debate runs/debate]

Writes docs/images: the graphs of some workflows, screenshots of the inspect page at 2, 12 and 60
nodes (needs the extra `browser`), and, with folders of finished runs, of a run's report, and of the
inspect page with a run of `workflows/debate` laid over it. The learning curve is made by
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
from marft_graph.run.overlay import overlays
from marft_graph.run.report import timeline_section
from tests.graph.real_apps import sixty, trading_team
from workflows.debate.graph import graph as debate
from workflows.math_duo.graph import graph as math_duo
from workflows.math_trio.graph import graph as math_trio

IMAGES = Path(__file__).parent / "images"
GRAPHS = {"math_duo": math_duo, "math_trio": math_trio, "debate": debate}
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
    parser.add_argument("--report", type=Path, help="folder of a finished run")
    parser.add_argument("--debate", type=Path, help="folder of a finished run of debate")
    given = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    for name, app in GRAPHS.items():
        (IMAGES / f"{name}.svg").write_text(to_svg(compile_graph(app)), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        for name, app, node, scheme in PAGES:
            path = Path(folder) / f"{name}.html"
            path.write_text(to_html(compile_graph(app), title=name), encoding="utf-8")
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
            page.goto(path.as_uri())
            page.click(f'.node[data-node="{node}"]')
            page.screenshot(path=IMAGES / f"{name}.png")
        if given.report is not None:
            page = browser.new_page(viewport={"width": 1280, "height": 1320})
            page.goto((given.report / "report.html").resolve().as_uri())
            page.screenshot(path=IMAGES / "report.png")
        if given.debate is not None:
            path = Path(folder) / "inspect_run.html"
            path.write_text(_with_run(given.debate), encoding="utf-8")
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(path.as_uri())
            page.click('.node[data-node="judge"]')
            page.screenshot(path=IMAGES / "inspect_run.png", full_page=True)


def _with_run(run: Path) -> str:
    """The page of debate's graph, as `inspect --run` writes it."""
    flex_mg = compile_graph(debate)
    return to_html(
        flex_mg, title="debate", overlays=overlays(flex_mg, run), below=timeline_section(run)
    )


if __name__ == "__main__":
    main()
