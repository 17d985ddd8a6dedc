"""The example's langgraph.json names the bound app as a graph that a server can load and copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.pregel import Pregel

from marft_graph import Trainer
from marft_graph.workflow import load_target
from tests.training import config

ROOT = Path(__file__).parents[2]


def test_the_langgraph_json_serves_the_bound_app(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    duo = load_target(str(ROOT / "workflows" / "math_duo"))
    with Trainer(
        duo.graph,
        train_dataset=[{"question": "q"}],
        reward=lambda e, s: 0.0,
        config=config(tiny_model),
        run_dir=tmp_path / "run",
    ) as trainer:
        monkeypatch.setenv("MARFT_EXPORT", str(trainer.export(tmp_path / "out")))
    served = load_target(str(ROOT / "examples" / "serve" / "langgraph.json")).graph
    assert isinstance(served, Pregel)
    copied = served.copy(update={"checkpointer": InMemorySaver()})
    state = copied.invoke({"question": "7+5?"}, {"configurable": {"thread_id": "1"}})
    assert {"plan", "answer"} <= state.keys()  # the adapters answered: there is no API key here
    named = json.loads((ROOT / "examples" / "serve" / "langgraph.json").read_text())
    assert named["graphs"] == {"math_duo": "./app.py:graph"}
