"""Loading of targets: what is found, and what a user is told where it is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from marft_graph.errors import WorkflowError
from marft_graph.rewards import CombinedReward
from marft_graph.workflow import load_target

APP = """
from typing import TypedDict
from langgraph.graph import END, START, StateGraph

class State(TypedDict):
    text: str

builder = StateGraph(State)
builder.add_node("only", lambda state: {"text": "done"})
builder.add_edge(START, "only")
builder.add_edge("only", END)
graph = builder.compile()

def make_graph():
    return builder.compile()

def make_with_config(config):
    return builder.compile()

def needs_two(one, two):
    return graph

def raises():
    raise RuntimeError("no key")

def leaves():
    raise SystemExit("set a key")

builtin = max
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    path = tmp_path / "app.py"
    path.write_text(APP)
    return path


@pytest.mark.parametrize("name", ["graph", "make_graph", "make_with_config"])
def test_a_graph_is_a_variable_or_made_by_a_function(app: Path, name: str) -> None:
    assert isinstance(load_target(f"{app}:{name}").graph, Pregel)


def test_without_a_name_the_variable_is_graph(app: Path) -> None:
    assert isinstance(load_target(str(app)).graph, Pregel)


def test_an_uncompiled_builder_is_found_and_compiled(app: Path) -> None:
    assert isinstance(load_target(f"{app}:builder").graph, CompiledStateGraph)


def test_a_langgraph_json_names_its_graph(app: Path) -> None:
    manifest = app.parent / "langgraph.json"
    manifest.write_text(json.dumps({"graphs": {"one": "./app.py:graph", "two": "app.py:graph"}}))
    assert load_target(f"{manifest}:one").name == "one"
    assert load_target(f"{app.parent}/langgraph.json:two").name == "two"
    with pytest.raises(WorkflowError, match=r"has 2 graphs; say which: .*:one, .*:two"):
        load_target(str(manifest))
    with pytest.raises(WorkflowError, match="no graph 'three'; it has one, two"):
        load_target(f"{manifest}:three")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("./app.py:grph", r"app\.py \(named in .*\.json, line 1\) has no variable 'grph'; its"),
        ("./gone.py:graph", r"names \./gone\.py, which does not exist"),
        ("./app.py", r"it must be file\.py:variable"),
        ({"path": 3}, r"it must be file\.py:variable"),
        ({"file": "./app.py:graph"}, r"must hold {\"graphs\""),
        (None, r"must hold {\"graphs\""),
    ],
)
def test_a_langgraph_json_that_names_what_is_not_there(
    app: Path, entry: object, message: str
) -> None:
    manifest = app.parent / "langgraph.json"
    manifest.write_text(json.dumps({"graphs": {"main": entry}}))
    with pytest.raises(WorkflowError, match=message):
        load_target(str(manifest))


def test_a_langgraph_json_without_graphs_shows_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "langgraph.json").write_text("{}")
    with pytest.raises(WorkflowError, match=r'must hold {"graphs"'):
        load_target(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("graf", "no variable 'graf'; its graphs are: builder, graph"),
        ("needs_two", "needs_two needs the arguments"),
        ("raises", r"app\.py, line 24: RuntimeError: no key"),
        ("leaves", r"app\.py, line 27: SystemExit: set a key"),
        ("builtin", "builtin is no graph, and makes none"),
    ],
)
def test_a_variable_that_is_no_graph_is_named(app: Path, name: str, message: str) -> None:
    with pytest.raises(WorkflowError, match=message):
        load_target(f"{app}:{name}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "x = 1\nimport not_installed_at_all\n",
            r"line 2: ModuleNotFoundError.*install, in this env",
        ),
        ("x = 1\n\ndef broken(:\n", r"line 3: invalid syntax"),
        ("x = 1\ny = x / 0\n", r"line 2: ZeroDivisionError"),
        ("x = 1\0\n", r"source code string cannot contain null bytes|null byte"),
        ("raise SystemExit('set OPENAI_API_KEY')\n", r"line 1: SystemExit: set OPENAI_API_KEY"),
    ],
)
def test_an_error_in_the_users_file_comes_with_its_line(
    tmp_path: Path, source: str, message: str
) -> None:
    path = tmp_path / "app.py"
    path.write_text(source)
    with pytest.raises(WorkflowError, match=message):
        load_target(f"{path}:graph")


def test_a_folder_without_a_graph_and_a_path_that_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match=r"no graph\.py and no langgraph\.json"):
        load_target(str(tmp_path))
    with pytest.raises(WorkflowError, match="does not exist; give a workflow folder"):
        load_target(str(tmp_path / "gone"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(WorkflowError, match="neither a Python file"):
        load_target(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    "target",
    ["", ".", "..", "/", "~nobody-has-this-name/app", "a\0b", "\udcff", "x" * 5000, ":", "::"],
)
def test_whatever_is_given_as_a_target_is_loaded_or_refused(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(WorkflowError, match=r"is no workflow folder|does not exist"):
        load_target(target)


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    for name in ("langgraph.json", "app.py"):
        (tmp_path / name).write_bytes(b"\xff\xfe\0")
        with pytest.raises(WorkflowError, match=re.escape(name)):
            load_target(str(tmp_path / name))
    (tmp_path / "graph.py").mkdir()
    (tmp_path / "langgraph.json").unlink()
    with pytest.raises(WorkflowError, match=r"no graph\.py"):
        load_target(str(tmp_path))


def test_a_relative_base_model_is_one_beside_the_config(app: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flow"
    (folder / "model").mkdir(parents=True)
    (folder / "graph.py").write_text(APP)
    (folder / "config.yaml").write_text("base_model: model\nseed: 3\n")
    workflow = load_target(str(folder))
    assert workflow.settings == {"base_model": str((folder / "model").resolve()), "seed": 3}
    assert workflow.reward is None


def test_two_workflows_with_files_of_the_same_name_do_not_mix(tmp_path: Path) -> None:
    loaded = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "graph.py").write_text(APP)
        (folder / "task.py").write_text(f"def reward(example, state):\n    return {name!r}\n")
        loaded.append(load_target(str(folder)))
    assert [w.reward({}, {}) for w in loaded if w.reward] == ["a", "b"]


def test_a_task_may_list_several_rewards(app: Path, tmp_path: Path) -> None:
    app.rename(tmp_path / "graph.py")
    (tmp_path / "task.py").write_text(
        "def correct(example, state):\n    return 1.0\n\n"
        "def short(example, state):\n    return 0.5\n\n"
        "reward = {correct: 1.0, short: 0.1}\n"
    )
    reward = load_target(str(tmp_path)).reward
    assert isinstance(reward, CombinedReward)
    assert [(part.name, part.weight) for part in reward.parts] == [("correct", 1.0), ("short", 0.1)]


def test_a_task_says_what_the_app_is_called_with(tmp_path):
    (tmp_path / "graph.py").write_text(
        "from langgraph.graph import START, MessagesState, StateGraph\n"
        "builder = StateGraph(MessagesState).add_node('a', lambda state: state)\n"
        "graph = builder.add_edge(START, 'a')\n",
        encoding="utf-8",
    )
    task = (
        "context = {'user': 'ada'}\n"
        "def configurable(example):\n    return {'lang': example['lang']}\n"
        "store = {('mem',): {'k': {'v': 1}}}\n"
        "def on_interrupt(example, state, interrupt):\n    return 'yes'\n"
    )
    (tmp_path / "task.py").write_text(task, encoding="utf-8")
    parts = load_target(str(tmp_path)).parts()
    assert parts["context"] == {"user": "ada"}
    assert parts["configurable"]({"lang": "de"}) == {"lang": "de"}
    assert parts["store"] == {("mem",): {"k": {"v": 1}}}
    assert parts["on_interrupt"]({}, {}, None) == "yes"
    (tmp_path / "task.py").write_text("on_interrupt = 'yes'\n", encoding="utf-8")
    with pytest.raises(WorkflowError, match="on_interrupt must be a function"):
        load_target(str(tmp_path))
