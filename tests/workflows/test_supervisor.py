"""The supervisor's word decides who works next, and what the app is asked holds no answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from marft_graph import FakeEngine, compile_graph
from marft_graph.workflow import load_target
from tests.workflows.play import play
from workflows.supervisor.graph import MOST_TURNS

FOLDER = Path(__file__).parents[2] / "workflows" / "supervisor"
EXAMPLE = {"question": "Ann has 7 figs and buys 5. How many?", "answer": "12"}
DONE = ["supervisor", "reasoner", "supervisor", "actor", "supervisor"]


def test_the_actor_reads_the_plan_and_the_supervisor_who_has_worked() -> None:
    flex_mg = compile_graph(load_target(str(FOLDER)).graph)
    assert set(flex_mg.agents) == {"supervisor", "reasoner", "actor"}
    for one, other in (("actor", "reasoner"), ("supervisor", "actor"), ("supervisor", "reasoner")):
        assert flex_mg.dependency(one, other) == "possible"
    assert flex_mg.dependency("actor", "supervisor") == "never"  # which only sends it to work


@pytest.mark.parametrize(
    ("said", "nodes", "expected"),
    [
        (["reasoner", "actor", "FINISH"], DONE, 1.0),
        ([" reasoner\n", "actor", "stop"], DONE, 1.0),
        (["FINISH"], ["supervisor"], 0.0),
        (["reasoner", "FINISH"], DONE[:3], 0.0),  # the example's own answer is no answer
        (["actor", "FINISH"], ["supervisor", "actor", "supervisor"], 1.0),
    ],
)
def test_the_worker_that_is_named_works(said: list[str], nodes: list[str], expected: float) -> None:
    engine = FakeEngine({"supervisor": said, "reasoner": "7+5", "actor": "12"})
    episode = play(FOLDER, EXAMPLE, engine)
    assert [call.node for call in episode.calls] == nodes
    assert episode.total_reward == expected


def test_the_work_ends_whatever_the_supervisor_says() -> None:
    episode = play(FOLDER, EXAMPLE, FakeEngine({"supervisor": "reasoner", "reasoner": "7+5"}))
    assert episode.ok
    assert sum(call.node == "reasoner" for call in episode.calls) == MOST_TURNS
    last = episode.calls[-1].messages[-2]["content"]
    assert last.endswith("Done: reasoner, reasoner, reasoner, reasoner")
