"""What the README says of the package as a whole; its commands and code run in test_docs.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

import marft_graph
from marft_graph.run.tracking import read_metrics
from tests.support import save_random_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_api_names_every_public_name() -> None:
    table = README.partition("## Public API")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|[^|]*\|", table, re.M))))
    assert named == set(marft_graph.__all__)


def test_the_first_screen_has_commands_pictures_and_code() -> None:
    screen = "\n".join(README.splitlines()[:50])
    assert "make demo" in screen
    assert screen.count("](docs/images/") == 2
    assert "from marft_graph import TrainConfig, Trainer, bind" in screen


def ten_lines() -> str:
    """The README's first block of Python, with the name of a model in this folder."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)[:1]
    assert block.count('"Qwen/Qwen2.5-0.5B-Instruct"') == 1
    return block.replace('"Qwen/Qwen2.5-0.5B-Instruct"', '"./model"')


@pytest.fixture
def terse_model(tmp_path: Path) -> Path:
    """A random model most of whose tokens end an answer, so that 50 iterations take seconds."""
    folder = save_random_model(tmp_path / "model", context=4096)
    size = len(AutoTokenizer.from_pretrained(folder))
    GenerationConfig(eos_token_id=list(range(size // 10, size))).save_pretrained(folder)
    return folder


def test_the_ten_lines_run_to_their_last_iteration_as_they_stand(
    tmp_path: Path, terse_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_app.py").write_text(
        "from langchain_openai import ChatOpenAI\n"
        "from langgraph.graph import START, MessagesState, StateGraph\n"
        "model = ChatOpenAI(model='gpt-4o-mini')\n"
        "def answer(state):\n"
        "    return {'messages': [model.invoke(state['messages'])]}\n"
        "graph = StateGraph(MessagesState).add_node('answer', answer)\n"
        "graph = graph.add_edge(START, 'answer').compile()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        exec(compile(ten_lines(), "README", "exec", dont_inherit=True), {"__name__": "readme"})
    finally:
        sys.modules.pop("my_app", None)
    rows = read_metrics(tmp_path / "runs" / "run-1")
    assert [row["iteration"] for row in rows] == list(range(1, 51))
    assert (tmp_path / "runs" / "run-1" / "export" / "manifest.json").is_file()
