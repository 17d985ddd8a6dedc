"""An app that waits for a person between its agents: trained through its interrupts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from marft_graph import TrainConfig, Trainer
from marft_graph.errors import EpisodesFailedError
from marft_graph.run.tracking import read_metrics
from marft_graph.workflow import Workflow, load_target

ROOT = Path(__file__).parents[2]


def approval_graph(duo: Any) -> Any:
    """The two agents of math_duo, with a person between them who sees the plan."""

    def approve(state: Mapping[str, Any]) -> dict[str, str]:
        return {"plan": interrupt({"plan": state["plan"]})}

    nodes = duo.builder.nodes
    builder = StateGraph(duo.builder.state_schema)
    builder.add_node("reasoner", nodes["reasoner"].runnable)
    builder.add_node("approve", approve)
    builder.add_node("actor", nodes["actor"].runnable)
    builder.add_edge(START, "reasoner").add_edge("reasoner", "approve")
    builder.add_edge("approve", "actor").add_edge("actor", END)
    return builder.compile(checkpointer=InMemorySaver())


def approved(example: Mapping[str, Any], state: Mapping[str, Any], asked: Any) -> str:
    """A scripted reviewer: it lets every plan pass as it is."""
    return str(asked.value["plan"])


@pytest.fixture(scope="module")
def duo() -> Workflow:
    return load_target(str(ROOT / "workflows" / "math_duo"))


def trainer(duo: Workflow, run_dir: Path, reviewer: Any, **settings: Any) -> Trainer:
    assert duo.load_data is not None
    assert duo.reward is not None
    train, held_out = duo.load_data("generated")
    chosen = {name: value for name, value in duo.settings.items() if name != "dataset"}
    return Trainer(
        approval_graph(duo.graph),
        train_dataset=train,
        eval_dataset=held_out,
        reward=duo.reward,
        config=TrainConfig.from_mapping({**chosen, "device": "cpu", **settings}),
        run_dir=run_dir,
        on_interrupt=reviewer,
    )


def test_every_episode_fails_without_a_reviewer_and_none_with_one(
    duo: Workflow, tmp_path: Path
) -> None:
    small = {"iterations": 1, "examples_per_iteration": 2, "group_size": 2, "eval_examples": 2}
    with trainer(duo, tmp_path / "alone", None, **small) as alone:
        held_out = pytest.raises(EpisodesFailedError, match="all 2 evaluation episodes failed")
        with held_out as failed:
            alone.train(progress=False)
    assert "on_interrupt=" in str(failed.value)
    with trainer(duo, tmp_path / "reviewed", approved, **small) as reviewed:
        result = reviewed.train(progress=False)
    (row,) = [row for row in read_metrics(result.run_dir) if "episodes" in row]
    assert (row["episodes"], row["episodes_failed"]) == (4, 0)
    assert set(row["agents"]) == {"reasoner", "actor"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_approval_graph_learns_through_its_interrupts(
    seed: int, duo: Workflow, tmp_path: Path
) -> None:
    with trainer(duo, tmp_path / "run", approved, seed=seed, eval_every=0) as reviewed:
        result = reviewed.train(progress=False)
    rows = [row for row in read_metrics(result.run_dir) if "episodes" in row]
    assert [row["episodes_failed"] for row in rows] == [0] * len(rows)
    assert result.before is not None
    assert result.after is not None
    assert result.before.return_mean <= 0.3
    assert result.after.return_mean >= 0.85
