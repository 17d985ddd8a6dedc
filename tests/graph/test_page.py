"""The graph's page in a real browser: offline, without errors, and a click explains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marft_graph import FakeEngine, compile_graph, run_episodes
from marft_graph.graph.page import Overlay, to_html
from marft_graph.run.timeline import to_timeline
from tests.apps import duo
from tests.graph import real_apps

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="make browser-test installs it")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium (make browser-test installs it): {str(error)[:80]}")
        yield browser
        browser.close()


class Opened:
    """A page with all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, **settings: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **settings)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def click(self, node: str) -> str:
        """Click a node; what the panel says then."""
        self.page.click(f'.node[data-node="{node}"]')
        return str(self.page.inner_text(".panel"))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("make", "node", "expected"),
    [
        (duo, "actor", ["planner (always)", "planner -> actor through plan"]),
        (
            real_apps.trading_team,
            "Trader",
            ["Research Manager (always, by its code)", "Never observes"],
        ),
        (real_apps.sixty, "join_2", ["worker_2_7 (always)"]),
    ],
)
def test_a_click_explains(
    browser: Any, tmp_path: Path, make: Any, node: str, expected: list[str], scheme: str
) -> None:
    path = written(tmp_path / "graph.html", to_html(compile_graph(make())))
    opened = Opened(browser, path, color_scheme=scheme)
    text = opened.click(node)
    assert all(line in text for line in expected)
    assert opened.page.locator(".node.chosen").count() == 1
    assert opened.said == []
    assert opened.asked == [path.as_uri()]


def test_it_can_be_zoomed_moved_and_used_from_the_keyboard(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, written(tmp_path / "graph.html", to_html(compile_graph(duo()))))
    page = opened.page

    def box() -> list[float]:
        return [float(n) for n in page.get_attribute(".canvas svg", "viewBox").split()]

    whole = box()
    page.click("[data-do=in]")
    assert box()[2] < whole[2]
    page.click("[data-do=all]")
    assert box() == whole
    corner = page.locator(".canvas svg").bounding_box()
    page.mouse.move(corner["x"] + 20, corner["y"] + 20)
    page.mouse.down()
    page.mouse.move(corner["x"] + 120, corner["y"] + 20, steps=4)
    page.mouse.up()
    assert box()[0] < whole[0]
    line = page.get_attribute('path[data-source="planner"][data-target="actor"]', "d")
    node = page.locator('.node[data-node="actor"]').bounding_box()
    page.mouse.move(node["x"] + 10, node["y"] + 10)
    page.mouse.down()
    page.mouse.move(node["x"] + 90, node["y"] + 50, steps=4)
    page.mouse.up()
    assert page.get_attribute('path[data-source="planner"][data-target="actor"]', "d") != line
    page.focus('.node[data-node="actor"]')
    page.keyboard.press("Enter")
    assert "planner (always)" in page.inner_text(".panel")
    page.keyboard.press("Escape")
    assert "Click a node" in page.inner_text(".panel")
    assert opened.said == []


def test_a_run_is_shown_and_text_stays_text(browser: Any, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    engine = FakeEngine("x")
    (episode,) = run_episodes(duo(), [{"question": evil}], engine=engine)
    page = to_html(
        compile_graph(duo()),
        title=evil,
        overlays={"actor": Overlay([("calls per episode", evil)])},
        below=to_timeline(episode),
    )
    opened = Opened(browser, written(tmp_path / "graph.html", page))
    assert evil in opened.click("actor")
    assert opened.page.locator("rect.bar").count() == 2
    assert opened.page.locator("img").count() == 0
    assert opened.said == []
