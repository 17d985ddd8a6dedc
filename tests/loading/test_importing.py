"""Importing a user's file: what is said of a module that is missing, and what is not shadowed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from marft_graph.apps import importing
from marft_graph.apps.importing import load_module
from marft_graph.errors import WorkflowError


@pytest.fixture(autouse=True)
def _same_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    known = {*sys.modules}
    yield
    for name in {*sys.modules} - known:
        if name.partition(".")[0] in ("client", "helper"):
            del sys.modules[name]


def problem_of(path: Path, source: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    with pytest.raises(WorkflowError) as caught:
        load_module(path)
    return str(caught.value)


def test_a_folder_of_the_app_is_never_called_a_package_to_install(tmp_path: Path) -> None:
    (tmp_path / "agent_of_mine/inner").mkdir(parents=True)
    (tmp_path / "agent_of_mine/__init__.py").touch()
    text = problem_of(tmp_path / "apps/main.py", "import agent_of_mine.nodes\n")
    assert "pip install agent" not in text
    (tmp_path / "pyproject.toml").touch()
    text = problem_of(tmp_path / "apps/main.py", "import agent_of_mine.nodes\n")
    assert "'agent_of_mine' is the app's own" in text
    assert f"pip install -e {tmp_path}" in text


def test_a_missing_submodule_of_an_installed_package_is_no_missing_package(tmp_path: Path) -> None:
    text = problem_of(tmp_path / "app.py", "import langgraph.not_there\n")
    assert "'langgraph' is installed, but has no module 'langgraph.not_there'" in text
    assert "pip install" not in text


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("requirements.txt", "pip install -r {}/requirements.txt"),
        ("setup.py", "pip install -e {}"),
        ("pyproject.toml", "pip install -e {}"),
    ],
)
def test_the_advice_is_the_projects_own_list(tmp_path: Path, file: str, advice: str) -> None:
    (tmp_path / file).touch()
    text = problem_of(tmp_path / "code/app.py", "import googleapiclient_of_nobody.discovery\n")
    assert advice.format(tmp_path) in text
    assert "pip install googleapiclient" not in text


def test_a_file_named_like_its_folder_does_not_hide_the_package(tmp_path: Path) -> None:
    package = tmp_path / "letters"  # without __init__.py, on PYTHONPATH as users have it
    package.mkdir()
    (package / "letters.py").write_text("from letters.tools import VALUE\n")
    (package / "tools.py").write_text("VALUE = 7\n")
    sys.path.insert(0, str(tmp_path))
    assert load_module(package / "letters.py").VALUE == 7


def test_a_single_file_finds_what_lies_beside_it_first(tmp_path: Path) -> None:
    (tmp_path / "marft_beside.py").write_text("VALUE = 3\n")
    (tmp_path / "app.py").write_text("from marft_beside import VALUE\n")
    assert load_module(tmp_path / "app.py").VALUE == 3


def test_an_app_wins_against_an_installed_package_of_its_name(tmp_path: Path) -> None:
    for place in ("installed", "app"):
        (tmp_path / place / "chosen").mkdir(parents=True)
        (tmp_path / place / "chosen/__init__.py").write_text(f"PLACE = {place!r}\n")
    (tmp_path / "app/chosen/graph.py").write_text("from chosen import PLACE\n")
    sys.path.append(str(tmp_path / "installed"))
    assert load_module(tmp_path / "app/chosen/graph.py", ()).PLACE == "app"


@pytest.mark.parametrize("is_imported", [True, False])
def test_an_apps_folder_does_not_take_the_name_of_a_library_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_imported: bool
) -> None:
    library = tmp_path / "site-packages/client"
    for package in (library, tmp_path / "app/client", tmp_path / "app/client/inner"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (library / "api.py").write_text("PLACE = 'library'\n")
    (tmp_path / "app/client/parts.py").write_text("PART = 'own'\n")
    (tmp_path / "app/client/inner/graph.py").write_text(
        "from client.api import PLACE\nfrom ..parts import PART\n"
    )
    monkeypatch.setattr(importing, "_LIBRARIES", (tmp_path / "site-packages",))
    sys.path.append(str(tmp_path / "site-packages"))
    if is_imported:
        __import__("client.api")
    module = load_module(tmp_path / "app/client/inner/graph.py", (tmp_path / "app",))
    assert (module.PLACE, module.PART) == ("library", "own")
    assert __import__("client.api").api.PLACE == "library"


def test_a_package_that_imports_itself_by_its_name_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (tmp_path / "site-packages/helper", tmp_path / "app/helper"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (tmp_path / "app/helper/nodes.py").write_text("PLACE = 'own'\n")
    (tmp_path / "app/helper/graph.py").write_text("from helper.nodes import PLACE\n")
    monkeypatch.setattr(importing, "_LIBRARIES", (tmp_path / "site-packages",))
    sys.path.append(str(tmp_path / "site-packages"))
    assert load_module(tmp_path / "app/helper/graph.py", (tmp_path / "app",)).PLACE == "own"


def test_two_apps_with_one_package_name_are_refused_in_one_process(tmp_path: Path) -> None:
    for place in ("first", "second"):
        (tmp_path / place / "samename").mkdir(parents=True)
        (tmp_path / place / "samename/__init__.py").touch()
        (tmp_path / place / "samename/graph.py").write_text("X = 1\n")
    load_module(tmp_path / "first/samename/graph.py")
    with pytest.raises(WorkflowError, match="module 'samename' is imported already, from"):
        load_module(tmp_path / "second/samename/graph.py")


def test_the_command_line_loads_a_file_inside_a_package(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").touch()
    (tmp_path / "pack/parts.py").write_text("def say(state): return {}\n")
    (tmp_path / "pack/app.py").write_text(
        "from langgraph.graph import START, MessagesState, StateGraph\nfrom .parts import say\n"
        "graph = StateGraph(MessagesState).add_node(say).add_edge(START, 'say').compile()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "marft_graph", "inspect", str(tmp_path / "pack/app.py")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "say" in done.stdout
