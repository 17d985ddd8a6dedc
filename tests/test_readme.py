"""What the README tells a reader to type works, on an app that stands outside the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import marft_graph

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# In the style of the public templates: a messages state, a prebuilt agent, an API model at import.
APP = '''
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="gpt-4o-mini", api_key="not-set")


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def sub(a: int, b: int) -> int:
    """Subtract b from a."""
    return a - b


graph = create_agent(model, [add, sub], system_prompt="Use a tool.")
'''


def test_the_snippet_trains_a_template_app_outside_the_repository(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(from marft_graph import TrainConfig.*?)```", README, re.S)
    shorter = {
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(str(ROOT / "workflows" / "tiny_base")),
        "iterations=50": "iterations=2",
    }
    for old, new in shorter.items():
        assert snippet.count(old) == 1
        snippet = snippet.replace(old, new)
    snippet += 'print(app.invoke({"messages": [("user", "What is 3+4?")]})["messages"][-1].type)\n'
    (tmp_path / "my_app.py").write_text(APP)
    (tmp_path / "train.py").write_text(snippet)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "ai"
    assert (tmp_path / "runs" / "run-1" / "report.html").is_file()
    assert len((tmp_path / "runs/run-1/metrics.jsonl").read_text().splitlines()) == 2


def test_the_table_of_the_api_names_every_public_name() -> None:
    table = README.partition("## Public API")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|[^|]*\|", table, re.M))))
    assert named == set(marft_graph.__all__)


def test_every_picture_and_file_that_is_linked_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
