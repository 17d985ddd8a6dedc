"""A node that first asks its model while a run trains: stop, freeze, or train it from then on."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.graph import START, StateGraph
from safetensors.torch import load_file

from marft_graph import Trainer, bind
from marft_graph.errors import UndecidedCallError
from tests.apps import DuoState
from tests.training import EXAMPLES, config, reward


class Counted(FakeListChatModel):
    """The app's own model, which counts what it is asked."""

    responses: list[str] = ["own"]  # noqa: RUF012 - a field of a pydantic model
    asked_in_all: ClassVar[int] = 0

    def _call(self, *args: Any, **kwargs: Any) -> str:
        type(self).asked_in_all += 1
        return "own"


own = Counted()
runs = itertools.count()


def unread() -> Any:
    return importlib.import_module(".".join(("tests", "test_new_nodes"))).own


def planner(state: DuoState) -> Any:
    return {"plan": own.invoke(state["question"]).text}


def late(state: DuoState) -> Any:
    """Asks no model until the dry run and a first rollout are over."""
    if next(runs) < 16 or not state["question"]:
        return {"answer": "quiet"}
    return {"answer": unread().invoke(state["plan"] or "nothing").text}


def app() -> Any:
    graph = StateGraph(DuoState).add_node("planner", planner).add_node("late", late)
    return graph.add_edge(START, "planner").add_edge("planner", "late").compile()


@pytest.fixture(autouse=True)
def fresh() -> None:
    global runs
    runs = itertools.count()
    Counted.asked_in_all = 0


def trainer(model: Path, run: Path, new_nodes: str, **more: Any) -> Trainer:
    changes = {"iterations": 3, "eval_every": 0, "checkpoint_every": 1, "new_nodes": new_nodes}
    changes |= more.pop("changes", {})
    return Trainer(
        app(),
        train_dataset=EXAMPLES,
        reward=reward,
        config=config(model, **changes),
        run_dir=run,
        **more,
    )


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "return_mean" in row]


def test_it_stops_the_run_where_nothing_else_is_said(tiny_model: Path, tmp_path: Path) -> None:
    with trainer(tiny_model, tmp_path / "run", "stop") as stopping:
        assert stopping.nodes == ("planner",)
        with pytest.raises(UndecidedCallError, match="node 'late'"):
            stopping.train(progress=False)
    assert Counted.asked_in_all == 0


def test_frozen_its_own_model_answers_and_metrics_say_so(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with trainer(tiny_model, tmp_path / "run", "freeze") as freezing:
        freezing.train(progress=False)
        assert freezing.nodes == ("planner",)
    assert Counted.asked_in_all > 0
    assert rows(tmp_path / "run")[-1]["new_nodes"] == ["late"]
    assert len([r for r in caplog.records if "node 'late' asks its own" in r.message]) == 1


def test_trained_it_gets_an_adapter_that_resume_and_export_know(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with trainer(tiny_model, run, "train") as growing:
        result = growing.train(progress=False)
        assert growing.nodes == ("planner", "late")
    assert Counted.asked_in_all == 0
    assert [row["iteration"] for row in rows(run)] == [1, 2, 3]
    assert set(rows(run)[-1]["agents"]) == {"planner", "late"}
    adapters = run / "checkpoints" / "step_3" / "adapters"
    moved = load_file(next((adapters / "late").rglob("*.safetensors")))
    assert any(bool(value.any()) for name, value in moved.items() if "lora_B" in name)
    answered = bind(app(), result.export).invoke({"question": "q"})
    assert answered["answer"] not in ("own", "quiet")
    global runs
    runs = itertools.count()  # the dry run of the next process does not see it either
    with trainer(tiny_model, run, "train", resume=True, changes={"iterations": 4}) as resumed:
        assert resumed.nodes == ("planner", "late")
        assert resumed.iteration == 3
        resumed.train(progress=False)
    assert rows(run)[-1]["iteration"] == 4


def test_what_others_have_learnt_is_kept_when_a_node_is_added(
    tiny_model: Path, tmp_path: Path
) -> None:
    with trainer(tiny_model, tmp_path / "run", "train", changes={"advantage": "gae"}) as growing:
        before: dict[str, torch.Tensor] = {}
        add = growing._add_node

        def adding(node: str) -> None:
            before.update(growing._learner.state())
            add(node)
            after = growing._learner.state()
            assert before
            assert all(torch.equal(after[name], value) for name, value in before.items())

        growing._add_node = adding  # type: ignore[method-assign]
        growing.train(progress=False)
    assert any("planner" in name for name in before)
