"""`trace` records an app's own models, and `warm-start` makes adapters that `train` continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from marft_graph.cli import main
from marft_graph.deploy.manifest import read_manifest
from marft_graph.run.trajectories import read_traces

GRAPH = """
from tests.apps import DuoState, END, START, StateGraph
from tests.rollout.test_own_models import Teacher

teacher = Teacher()


def planner(state: DuoState):
    return {"plan": teacher.invoke(state["question"]).text}


async def actor(state: DuoState):
    return {"answer": (await teacher.ainvoke(state["plan"])).text}


builder = StateGraph(DuoState)
builder.add_node("planner", planner)
builder.add_node("actor", actor)
builder.add_edge(START, "planner")
builder.add_edge("planner", "actor")
builder.add_edge("actor", END)
graph = builder.compile()
"""
TASK = """
def load_data(dataset="d"):
    rows = [{"question": c} for c in "abcdefgh"]
    return rows, rows[:4]

def reward(example, state):
    return float(example["question"] in "abcd")
"""


def marft(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def workflow(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    settings = f"base_model: {tiny_model}\nadvantage: group\nmax_new_tokens: 6\niterations: 1\n"
    settings += "examples_per_iteration: 2\ngroup_size: 2\neval_examples: 2\n"
    files = {"graph.py": GRAPH, "task.py": TASK, "config.yaml": settings}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def traces(workflow: Path) -> Path:
    shown = marft("trace", workflow, "--out", workflow / "t.parquet", "--repeat", 2)
    assert shown.exit_code == 0, shown.output
    assert "planner: 16 calls" in shown.stdout
    assert "mean return 0.500, 16 episodes" in shown.stdout
    return workflow / "t.parquet"


def test_trace_records_every_call_by_node(traces: Path) -> None:
    import datasets

    episodes = read_traces(traces)
    assert [call.node for call in episodes[0].calls] == ["planner", "actor"]
    assert episodes[0].calls[1].parents == (0,)
    assert episodes[0].calls[1].messages[-1]["content"] == "a is fine is fine"
    table = datasets.load_dataset("parquet", data_files=str(traces), split="train")
    assert set(table["phase"]) == {"own"}
    assert {"node", "messages", "tools", "usage", "seconds"} <= set(table.column_names)


def test_trace_takes_examples_from_a_file_and_refuses_a_used_one(
    workflow: Path, traces: Path, tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"question": q}) + "\n" for q in ("x", "y", "z")))
    target, out = f"{workflow / 'graph.py'}:graph", tmp_path / "out.parquet"
    shown = marft("trace", target, "--data", data, "--out", out, "--examples", 2, "--node", "actor")
    assert shown.exit_code == 0, shown.output
    assert "actor: 2 calls" in shown.stdout
    assert "planner" not in shown.stdout
    for wrong, why in (
        (["trace", target, "--out", out], "exists; give another --out"),
        (["trace", target, "--out", tmp_path / "new"], "no task.py with load_data; give --data"),
    ):
        refused = marft(*wrong)
        assert refused.exit_code == 2
        assert why in refused.stderr


def test_warm_start_makes_adapters_that_train_continues(
    workflow: Path, traces: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    command: list[Any] = ["warm-start", workflow, "--from", traces, "--out", out]
    shown = marft(*command, "--min-return", 1, "--passes", 2, "--learning-rate", 0.01)
    assert shown.exit_code == 0, shown.output
    assert "planner: 8 answers, loss " in shown.stdout
    assert set(read_manifest(out).nodes) == {"planner", "actor"}
    trained = marft("train", workflow, "--run-dir", tmp_path / "run", "--start-from", out)
    assert trained.exit_code == 0, trained.output
    refused = marft(*command[:-1], tmp_path / "other", "--min-return", 2)
    assert refused.exit_code == 2
    assert "no demonstration is left" in refused.stderr
