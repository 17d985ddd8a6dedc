"""The trio hands in what its verifier approves, and tries again for what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from marft_graph import Episode, FakeEngine, compile_graph
from marft_graph.workflow import load_target
from tests.workflows.play import play
from workflows.math_trio import task
from workflows.math_trio.graph import MAX_ROUNDS

FOLDER = Path(__file__).parents[2] / "workflows" / "math_trio"
EXAMPLE = {"question": "7 eggs here, 5 there. How many does Ann see?", "answer": "12"}


def run(actor: list[str], verifier: list[str]) -> Episode:
    engine = FakeEngine({"reasoner": "7+5", "actor": actor, "verifier": verifier})
    return play(FOLDER, EXAMPLE, engine)


def test_the_three_agents_form_a_loop() -> None:
    flex_mg = compile_graph(load_target(str(FOLDER)).graph)
    assert flex_mg.agents == ("reasoner", "actor", "verifier")
    assert flex_mg.dependency("verifier", "actor") == "always"
    assert flex_mg.dependency("actor", "verifier") == "never"  # whose verdict no prompt shows


def test_an_approved_answer_ends_the_run() -> None:
    episode = run(["12"], ["yes"])
    assert [call.node for call in episode.calls] == ["reasoner", "actor", "verifier"]
    assert episode.calls[-1].messages[1]["content"] == "7+5=12"
    assert episode.total_reward == 1.0


def test_what_is_not_approved_goes_back_to_the_reasoner() -> None:
    episode = run(["13", "12"], ["no", "Yes"])
    assert [call.node for call in episode.calls] == ["reasoner", "actor", "verifier"] * 2
    assert episode.total_reward == 1.0


def test_rounds_are_limited_and_what_nobody_approved_earns_nothing() -> None:
    episode = run(["12"], ["no"])
    assert len(episode.calls) == 3 * MAX_ROUNDS
    assert episode.total_reward == 0.0


@pytest.mark.parametrize(
    ("draft", "approved", "expected"),
    [("12", True, 1.0), ("12", False, 0.0), ("13", True, 0.0), ("twelve", True, 0.0)],
)
def test_the_reward_asks_for_the_right_digits_and_for_approval(
    draft: str, approved: bool, expected: float
) -> None:
    assert task.reward(EXAMPLE, {"draft": draft, "approved": approved}) == expected


def test_held_out_problems_are_those_of_the_duo() -> None:
    train, held_out = task.load_data()
    assert len(held_out) == 256
    assert not set(train["question"]) & set(held_out["question"])
