"""A langgraph.json that `langgraph dev` accepts is loaded: every form of entry, each in a process
of its own, as imports and the environment belong to a process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from marft_graph.apps.langgraph_json import read_langgraph_json
from marft_graph.errors import WorkflowError

FACTORIES = """
import asyncio
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Annotated

from langgraph.graph import START, MessagesState, StateGraph
from langgraph_sdk.runtime import ServerRuntime

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig

builder = StateGraph(MessagesState).add_node("say", lambda state: {}).add_edge(START, "say")

def plain(): return builder.compile()
def with_config(config): return builder.compile(name=config["configurable"].get("name", "app"))
def with_metadata(config): return builder.compile(name=str(config["metadata"].get("run", "app")))
def with_default(config=None): return builder.compile(name=config["configurable"].get("n", "x"))
def typed(config: "RunnableConfig"): return builder.compile(name=str(config["configurable"]))
def with_runtime(anything: ServerRuntime):
    assert anything.execution_runtime.store is not None
    return builder.compile()
def with_annotated(r: "Annotated[ServerRuntime, 1]"): return builder.compile(store=r.store)
def with_both(runtime: ServerRuntime, config): return builder.compile(name=str(config))
def builds(): return builder
async def asynchronous(config):
    await asyncio.sleep(0)
    return builder.compile()
@asynccontextmanager
async def async_context(config):
    async with asyncio.timeout(60):  # as an anyio scope: entered and left by one task
        yield builder.compile()
@contextmanager
def context():
    yield builder
class Maker:
    async def __call__(self): return builder.compile()
made_by_object = Maker()
"""


FACTORY_NAMES = [*re.findall(r"^(?:async )?def (\w+)", FACTORIES, re.MULTILINE), "made_by_object"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a package, a package under src and loose files."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("my_agent", "src/mail", "libs/shared_tools", "loose"):
        (root / folder).mkdir(parents=True)
    for package in ("my_agent", "src/mail", "libs/shared_tools"):
        (root / package / "__init__.py").touch()
    (root / "libs/shared_tools/text.py").write_text("WORD = 'x'\n")
    node = "import os\ndef say(state):\n    return {'messages': [('ai', os.environ['WORD'])]}\n"
    graph = (
        "from langgraph.graph import START, MessagesState, StateGraph\n{imports}\n"
        "graph = StateGraph(MessagesState).add_node('say', say).add_edge(START, 'say').compile()\n"
    )
    (root / "my_agent/nodes.py").write_text(node)
    (root / "src/mail/tools.py").write_text(node)
    (root / "loose/helpers.py").write_text(node)
    files = {
        "my_agent/absolute.py": "from my_agent.nodes import say",
        "my_agent/relative.py": "from .nodes import say",
        "my_agent/beside.py": "from nodes import say",
        "src/mail/mail.py": "from mail.tools import say",
        "loose/app.py": "from helpers import say\nfrom shared_tools.text import WORD",
        "loose/keyed.py": "from helpers import say\nimport os\nos.environ['FROM_FILE']",
    }
    for name, imports in files.items():
        (root / name).write_text(graph.format(imports=imports))
    (root / "factories.py").write_text(FACTORIES)
    (root / ".env").write_text("# a comment\nexport WORD='hello'\nFROM_FILE=\"a b\"\nEMPTY\n")
    return root


def names_of(
    project: Path, entries: dict[str, str], **content: object
) -> subprocess.CompletedProcess[str]:
    """Load each entry in one new process and print its name and its nodes."""
    manifest = project / "langgraph.json"
    described = {"dependencies": [".", "./libs"], "env": "./.env", "graphs": entries, **content}
    manifest.write_text(json.dumps(described))
    script = (
        "import sys\nfrom marft_graph.workflow import load_target\n"
        "for name in sys.argv[2:]:\n"
        "    graph = load_target(f'{sys.argv[1]}:{name}').graph\n"
        "    print(name, [node for node in graph.nodes if node != '__start__'])\n"
    )
    here = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, "-c", script, str(manifest), *entries],
        cwd=project.parent,
        env={**os.environ, "PYTHONPATH": here, "WORD": "of the process"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_form_of_entry_that_langgraph_dev_takes_is_loaded(project: Path) -> None:
    entries = {name: f"./factories.py:{name}" for name in FACTORY_NAMES}
    entries |= {
        "absolute": "./my_agent/absolute.py:graph",
        "relative": "./my_agent/relative.py:graph",
        "beside": "./my_agent/beside.py:graph",
        "module": "my_agent.absolute:graph",
        "module_under_src": "mail.mail:graph",
        "file_under_src": "./src/mail/mail.py:graph",
        "dependency": "loose/app.py:graph",
        "keyed": "./loose/keyed.py:graph",
    }
    done = names_of(project, entries)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} ['say']" for name in entries]


def test_the_env_of_langgraph_json_is_set_before_the_app_is_imported(project: Path) -> None:
    code = (
        "import os, sys\nfrom marft_graph.workflow import load_target\n"
        "state = load_target(sys.argv[1]).graph.invoke({'messages': []})\n"
        "print(state['messages'][-1].text, os.environ['FROM_FILE'], 'EMPTY' in os.environ)\n"
    )
    here = str(Path(__file__).resolve().parents[2])
    for env, expected in (("./.env", "hello a b"), ({"WORD": "w", "FROM_FILE": "1"}, "w 1")):
        described = {"env": env, "graphs": {"one": "./my_agent/absolute.py:graph"}}
        (project / "langgraph.json").write_text(json.dumps(described))
        done = subprocess.run(
            [sys.executable, "-c", code, str(project / "langgraph.json")],
            env={**os.environ, "PYTHONPATH": here, "WORD": "of the process"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.strip() == f"{expected} False", done.stderr


def test_an_env_file_that_is_not_there_is_told_of_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "langgraph.json"
    path.write_text('{"env": ".env", "graphs": {"a": "./a.py:graph"}}')
    read_langgraph_json(path).set_environment()
    assert "names the env file" in caplog.text


def test_a_byte_order_mark_and_variables_without_a_value_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARFT_TEST_NUMBER", "of the process")
    monkeypatch.delenv("MARFT_TEST_NONE", raising=False)
    path = tmp_path / "langgraph.json"
    described = {
        "graphs": {"a": {"path": "./a.py:graph", "description": "An app."}},
        "env": {"MARFT_TEST_NUMBER": 5, "MARFT_TEST_NONE": None},
    }
    path.write_text(json.dumps(described), encoding="utf-8-sig")
    read = read_langgraph_json(path)
    read.set_environment()
    assert read.entry_of("") == ("a", "./a.py", "graph")
    assert os.environ["MARFT_TEST_NUMBER"] == "5"
    assert "MARFT_TEST_NONE" not in os.environ


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"graphs": {"a": "./agent.ts:graph"}}, "written in JavaScript"),
        ({"graphs": {"a": "no_such_module:graph"}}, "No module named 'no_such_module'"),
        ({"graphs": {"a": "./gone.py:graph"}}, "names ./gone.py, which does not exist"),
        ({"graphs": {"a": "./a.py"}}, "must be file.py:variable or package.module:variable"),
        (
            {"graphs": {"a": "a:b"}, "dependencies": "."},
            r'dependencies must be a list such as \["."\]',
        ),
        ({"graphs": {"a": "a:b"}, "env": 3}, "env must be the path of a .env file"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(
    tmp_path: Path, described: dict[str, object], message: str
) -> None:
    from marft_graph.workflow import load_target

    (tmp_path / "langgraph.json").write_text(json.dumps(described))
    with pytest.raises(WorkflowError, match=message):
        load_target(str(tmp_path))


def test_what_an_asynchronous_factory_opens_serves_the_runs_and_is_closed_in_the_end(
    tmp_path: Path,
) -> None:
    (tmp_path / "app.py").write_text(
        """
import asyncio
from contextlib import asynccontextmanager
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.graph import START, MessagesState, StateGraph

@asynccontextmanager
async def graph():
    questions = asyncio.Queue()
    async def serve():
        while True:
            text, answer = await questions.get()
            answer.set_result(f"served {text}")
    server = asyncio.create_task(serve())
    async def say(state):
        answer = asyncio.get_running_loop().create_future()
        questions.put_nowait((state["messages"][-1].text, answer))
        said = await FakeListChatModel(responses=["own"]).ainvoke(await answer)
        return {"messages": [said]}
    try:
        yield StateGraph(MessagesState).add_node(say).add_edge(START, "say")
    finally:
        server.cancel()
        print("closed")
"""
    )
    code = (
        "from marft_graph import FakeEngine, run_episodes\n"
        "from marft_graph.workflow import load_target\n"
        "graph = load_target('app.py:graph').graph\n"
        "for _ in range(2):\n"
        "    engine = FakeEngine('x')\n"
        "    (e,) = run_episodes(graph, [{'messages': 'hi'}], engine=engine, episode_timeout=20)\n"
        "    print(e.status, e.calls[0].messages[0]['content'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = ["ok served hi", "ok served hi", "closed"]
    assert done.stdout.splitlines() == expected, done.stderr
    assert done.stderr == ""
