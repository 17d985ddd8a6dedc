"""What the README and the docs show works: every block is run, or says why it is not."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from marft_graph import Trainer
from marft_graph.cli import main
from marft_graph.config import TrainConfig
from tests.apps import duo
from tests.deploy.chat_server import ChatServer
from tests.docs_blocks import (
    PAGES,
    ROOT,
    Block,
    blocks,
    commands,
    marks,
    name_of,
    problem,
    synopsis_problem,
)
from tests.support import save_random_model
from tests.training import EXAMPLES, config, reward

BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"python", "sh", "yaml", "text"}
HUB_MODEL = '"Qwen/Qwen2.5-0.5B-Instruct"'
# In the style of the public templates: a messages state, a prebuilt agent, an API model at import.
MY_APP = '''
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="gpt-4o-mini", api_key="not-set")


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


graph = create_agent(model, [add], system_prompt="Use a tool.")
'''


def pages_with(language: str) -> list[Any]:
    return [
        pytest.param(page, id=name_of(page))
        for page in PAGES
        if any(block.language == language for block in blocks(page))
    ]


def test_there_is_something_to_check() -> None:
    assert {block.language for block in BLOCKS} == LANGUAGES
    assert sum(block.language == "python" for block in BLOCKS) > 20


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block}: give it one of {sorted(LANGUAGES)}"
    assert not block.reason or len(block.reason.split()) >= 3, f"{block}: say why it is not run"
    assert not (block.language == "python" and block.reason), f"{block}: Python blocks are run"
    assert not block.kind or block.language == "text"


def test_every_mark_stands_above_a_block() -> None:
    for page in PAGES:
        marked = [block for block in blocks(page) if block.reason or block.kind]
        assert len(marked) == marks(page), name_of(page)


# Python


@pytest.fixture(scope="module")
def reader_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instead of a model of the hub: random, with room for prompts with tools."""
    return save_random_model(tmp_path_factory.mktemp("reader"), context=4096)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's folder, with the app that pages import."""
    (tmp_path / "my_app.py").write_text(MY_APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_app", None)


def exported(folder: Path, model: Path) -> dict[str, Any]:
    """What the page on production begins with: an app, and its adapters in a folder."""
    with Trainer(
        duo(),
        train_dataset=EXAMPLES,
        reward=reward,
        config=config(model),
        run_dir=folder / "run",
    ) as trainer:
        trainer.export(folder / "adapters")
    return {"graph": duo()}


GIVEN: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"docs/production.md": exported}


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page: Path, reader: Path, reader_model: Path) -> None:
    given = GIVEN.get(name_of(page), lambda folder, model: {})(reader, reader_model)
    namespace = {"__name__": "page", **given}
    shorter = {
        HUB_MODEL: repr(str(reader_model)),
        "iterations=50": "iterations=1, examples_per_iteration=2, group_size=2, max_new_tokens=4",
    }
    printed = None
    for block in blocks(page):
        if block.kind == "prints":
            assert block.text == printed, f"{block} is not what the block above prints"
        if block.language != "python":
            continue
        text = block.text
        for old, new in shorter.items():
            text = text.replace(old, new)
        # A real file, as nodes are also read as source.
        file = reader / f"{page.stem}_line_{block.line}.py"
        file.write_text(text, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, str(file), "exec", dont_inherit=True), namespace)
        printed = out.getvalue()
    if name_of(page) in ("README.md", "docs/your_app.md"):
        assert (reader / "runs" / "run-1" / "report.html").is_file()
        assert namespace["app"].invoke({"messages": [("user", "What is 3+4?")]})["messages"]


# Commands


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_have_the_form_that_they_should(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = [
        f"{block}: {' '.join(command)}: {found}"
        for block in blocks(page)
        if block.language == "sh"
        for command in commands(block)
        if (found := problem(command)) and not (block.reason and "nobody knows" in found)
    ]
    assert wrong == []


def test_commands_of_the_workflows_have_the_form_that_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [
        command
        for page in sorted((ROOT / "workflows").glob("*/README.md"))
        for block in blocks(page)
        if block.language in ("", "sh")
        for command in commands(block)
    ]
    assert len(given) >= 16
    assert [(command, found) for command in given if (found := problem(command))] == []


def test_shown_forms_of_commands_have_options_that_exist() -> None:
    shown = [
        (block, line)
        for block in BLOCKS
        if block.language == "text"
        for line in block.text.splitlines()
        if line.startswith("marft-graph ")
    ]
    assert len(shown) >= 12
    wrong = [f"{block}: {found}" for block, line in shown if (found := synopsis_problem(line))]
    assert wrong == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("marft-graph train w --run-dir r --learning-rat 1", "--learning-rat"),
        ("marft-graph train w --run-dir r --group-size 0", "group_size is 0"),
        ("marft-graph learn w", "no command"),
        ("make demos", "demos"),
        ("pip install .[tools]", "tools"),
        ("python benchmarks/seeds.py --outs runs", "--outs"),
        ("python benchmarks/none.py", "none.py"),
        ("accelerate launch -m marft_graph train w --run-dirs r", "--run-dirs"),
        ("curl http://example.org", "not run"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, said: str) -> None:
    (words,) = commands(Block(ROOT / "README.md", 1, "sh", command))
    assert said in (problem(words) or "")


SMALL = """
iterations: 1
examples_per_iteration: 2
group_size: 2
minibatches: 1
max_new_tokens: 8
eval_every: 0
eval_examples: 8
"""


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clone with small settings, a folder WORKFLOW, and an API that knows the answers."""
    shutil.copytree(
        ROOT / "workflows", tmp_path / "workflows", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path in (tmp_path / "workflows").glob("*/config.yaml"):
        settings = {**yaml.safe_load(path.read_text()), **yaml.safe_load(SMALL)}
        path.write_text(yaml.safe_dump(settings))
    shutil.copytree(tmp_path / "workflows" / "math_duo", tmp_path / "workflows" / "WORKFLOW")
    (tmp_path / "WORKFLOW").symlink_to("workflows/WORKFLOW")
    from workflows.math_duo.task import load_data

    answers = {row["question"]: row["answer"] for split in load_data() for row in split}

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        asked = body["messages"][-1]["content"]
        return {"content": next((a for q, a in answers.items() if q in asked), "no idea")}

    server = ChatServer(answer)
    with serving(server):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.chdir(tmp_path)
        yield tmp_path


@contextlib.contextmanager
def serving(server: ChatServer) -> Iterator[None]:
    import threading

    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def own_commands(page: Path) -> list[tuple[Block, list[str]]]:
    return [
        (block, command[1:])
        for block in blocks(page)
        if block.language == "sh" and not block.reason
        for command in commands(block)
        if command[0] == "marft-graph"
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a page is a whole road: record, warm start, train, compare, export
@pytest.mark.parametrize(
    "page", [pytest.param(page, id=name_of(page)) for page in PAGES if own_commands(page)]
)
def test_commands_run(page: Path, workshop: Path) -> None:
    for block, arguments in own_commands(page):
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{block}: {' '.join(arguments)}: {result.output}"


# Settings, messages, links


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_settings_are_accepted(block: Block) -> None:
    if not block.reason:
        TrainConfig.from_mapping({"base_model": "m", **yaml.safe_load(block.text)})


@functools.cache
def said_by_the_package() -> tuple[str, ...]:
    """Every text and every argument's name in the package's code, with … for what is filled in."""
    found = set()
    for path in (ROOT / "marft_graph").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.arg):
                found.add(node.arg)
    return tuple(sorted(found))


def is_said(line: str) -> bool:
    """Whether the package has a text with the parts of a line, in their order."""
    parts = [part.strip() for part in line.split("…")]
    for text in said_by_the_package():
        at = 0
        for part in parts:
            at = text.find(part, at)
            if at < 0:
                break
            at += len(part)
        else:
            return True
    return False


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "message"], ids=str)
def test_shown_messages_are_those_of_the_package(block: Block) -> None:
    assert [line for line in block.text.splitlines() if not is_said(line)] == []


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert not is_said("… cannot learn: the app calls the model with temperature 2 there. …")


def test_figures_and_settings_in_troubleshooting_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", page))
    assert len(named) > 15
    assert named - {*said_by_the_package(), *TrainConfig.__dataclass_fields__} == set()


def test_every_file_and_picture_that_is_linked_exists() -> None:
    wrong = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
        wrong += [f"{name_of(page)}: {one}" for one in links if not (page.parent / one).exists()]
    assert wrong == []
