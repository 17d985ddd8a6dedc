"""The documentation site: it builds strictly, is complete and offline, and reads on a phone."""

from __future__ import annotations

import dataclasses
import html
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import marft_graph
from marft_graph.config import NodeSettings, TrainConfig
from tests.graph.test_page import BROWSERS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
    for page in (ROOT / "docs").rglob("*.md")
)
PHONE = 390


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it; `--quiet` would hide warnings from `--strict`."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_setting_is_on_its_page(site: Path) -> None:
    page = html.unescape((site / "settings.html").read_text(encoding="utf-8"))
    plain = re.sub(r"<[^>]+>", "", page)
    for kind, prefix in ((TrainConfig, ""), (NodeSettings, "node-")):
        for spec in dataclasses.fields(kind):
            assert f'id="{prefix}{spec.name}"' in page, spec.name
            assert spec.metadata["help"].replace("`", "")[1:] in plain, spec.name
    assert "list of names; repeatable; default all-linear" in plain
    assert "token or action; default token" in plain


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    missing = [
        name
        for name in marft_graph.__all__
        if name not in ("TrainConfig",) and not re.search(rf'id="marft_graph\.[\w.]*{name}"', page)
    ]
    assert missing == []
    assert 'href="settings.html"' in page


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [page.replace(".html", ".md") for page in PAGES]
    assert sorted(named) == pages, "give new pages a line under `nav` in mkdocs.yml"


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and the one for what is not found
    loaded = re.compile(
        r"<(?:script|link|img|iframe|source)[^>]*?(?:src|href)=[\"']?(https?:[^\"' >]+)"
    )
    assert [found for page in pages for found in loaded.findall(page.read_text("utf-8"))] == []
    styles = [sheet.read_text("utf-8") for sheet in site.rglob("*.css")]
    assert not any(re.search(r"url\([\"']?https?:|@import", style) for style in styles)


def test_the_site_has_no_programs_of_ours(site: Path) -> None:
    assert list(site.rglob("*.py")) == []
    assert (site / "assets" / "iframe-worker.js").is_file()


def test_links_out_of_the_docs_name_the_file(site: Path) -> None:
    page = (site / "production.html").read_text(encoding="utf-8")
    assert "<code>examples/serve</code> has a" in page


def test_continuous_integration_builds_the_site() -> None:
    """`.ci/run` calls `make test`, which runs this file: mkdocs is among what `make` installs."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'dev = \[\s*"marft-graph\[[a-z,]*docs', project)
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False


# In a browser


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


def opened(browser: Any, path: Path, width: int) -> tuple[Any, list[str]]:
    """A page, and what went wrong on it: words on the console, and requests for anything else."""
    page = browser.new_page(viewport={"width": width, "height": 844})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"no {request.url}"))
    page.on(
        "request",
        lambda request: wrong.append(request.url) if request.url.startswith("http") else None,
    )
    page.goto(path.as_uri())
    return page, wrong


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_a_page_reads_on_a_phone_and_offline(browser: Any, site: Path, name: str) -> None:
    page, wrong = opened(browser, site / name, PHONE)
    page.wait_for_load_state("load")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    assert page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)") == []
    assert wrong == []
    page.close()


@pytest.mark.browser
def test_the_search_finds_a_setting_in_a_file(browser: Any, site: Path) -> None:
    page, wrong = opened(browser, site / "index.html", 1280)
    page.click("input.md-search__input")
    page.type("input.md-search__input", "importance_cap")
    page.wait_for_selector(".md-search-result__item a", timeout=20_000)
    assert "settings.html" in page.inner_html(".md-search-result__list")
    assert wrong == []
    page.close()
