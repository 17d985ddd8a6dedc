"""The router's word decides who answers; a name that nobody has is a failure, not a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from marft_graph import Episode, FakeEngine, compile_graph
from marft_graph.workflow import load_target
from tests.workflows.play import play
from workflows.router import task
from workflows.router.graph import NOBODY

FOLDER = Path(__file__).parents[2] / "workflows" / "router"
EXAMPLE = {"question": "Write cat backwards.", "answer": "tac"}


def run(name: str) -> Episode:
    engine = FakeEngine({"router": name, "sum": "3", "reverse": "tac", "upper": "CAT"})
    return play(FOLDER, EXAMPLE, engine)


def test_specialists_read_the_request_alone() -> None:
    flex_mg = compile_graph(load_target(str(FOLDER)).graph)
    assert set(flex_mg.agents) == {"router", "sum", "reverse", "upper"}
    for name in task.KINDS:
        assert flex_mg.dependency(name, "router") == "never"
        assert flex_mg.dependency("router", name) == "never"
        assert all(flex_mg.dependency(name, other) == "never" for other in task.KINDS)


@pytest.mark.parametrize(
    ("name", "nodes", "answer", "expected"),
    [
        ("reverse", ["router", "reverse"], "tac", 1.0),
        (" reverse\n", ["router", "reverse"], "tac", 1.0),
        ("upper", ["router", "upper"], "CAT", 0.0),
        ("helper", ["router"], NOBODY, 0.0),
        ("nobody", ["router"], NOBODY, 0.0),
        ("", ["router"], NOBODY, 0.0),
    ],
)
def test_the_specialist_that_is_named_answers(
    name: str, nodes: list[str], answer: str, expected: float
) -> None:
    episode = run(name)
    assert episode.ok
    assert [call.node for call in episode.calls] == nodes
    assert episode.state["answer"] == answer
    assert episode.total_reward == expected


def test_held_out_requests_are_never_trained_on() -> None:
    train, held_out = task.load_data()
    assert (len(train), len(held_out)) == (960, 240)
    assert not set(train["question"]) & set(held_out["question"])
    # A third of the 334 calculations and of the 18 words, the latter in two kinds of request.
    assert len(set(held_out["question"])) <= 111 + 6 + 6
    held_out_words = {q.split()[1] for q in held_out["question"] if q.startswith("Write")}
    assert len(held_out_words) == 6
    assert not held_out_words & {q.split()[1] for q in train["question"]}


def test_the_data_follow_their_seed() -> None:
    assert task.generate(seed=1)[1].to_list() == task.generate(seed=1)[1].to_list()
    assert task.generate(seed=1)[1].to_list() != task.generate(seed=2)[1].to_list()


def test_another_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="has 'generated' only"):
        task.load_data("gsm8k")
