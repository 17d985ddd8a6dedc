"""Two debaters answer side by side, and only what the judge and both of them say stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from marft_graph import Episode, FakeEngine, compile_graph
from marft_graph.workflow import load_target
from tests.workflows.play import play
from workflows.debate import task
from workflows.debate.graph import NO_AGREEMENT

FOLDER = Path(__file__).parents[2] / "workflows" / "debate"
EXAMPLE = {"question": "7+5", "answer": "12"}


def run(first: str, second: str, ruling: str) -> Episode:
    engine = FakeEngine({"debater_a": first, "debater_b": second, "judge": ruling})
    return play(FOLDER, EXAMPLE, engine)


def test_the_debaters_are_parallel_and_the_judge_observes_both() -> None:
    flex_mg = compile_graph(load_target(str(FOLDER)).graph)
    assert set(flex_mg.agents) == {"debater_a", "debater_b", "judge"}
    assert flex_mg.dependency("debater_b", "debater_a") == "never"
    assert flex_mg.dependency("debater_a", "debater_b") == "never"
    assert flex_mg.dependency("judge", "debater_a") == "always"
    assert flex_mg.dependency("judge", "debater_b") == "always"


def test_the_judge_reads_both_answers() -> None:
    episode = run("12", "twelve", "12")
    judge = episode.calls[-1]
    assert judge.parents == (0, 1)
    assert judge.messages[1]["content"] == "7+5\nA: 12\nB: twelve"


@pytest.mark.parametrize(
    ("voices", "answer", "expected"),
    [
        (("12", "12", "12"), "12", 1.0),
        (("12", "twelve", "12"), NO_AGREEMENT, 0.0),
        (("twelve", "twelve", "12"), NO_AGREEMENT, 0.0),
        (("twelve", "twelve", "twelve"), "twelve", 0.0),
        (("13", "13", "13"), "13", 0.0),
    ],
)
def test_an_answer_stands_where_all_agree_and_pays_where_it_is_right(
    voices: tuple[str, str, str], answer: str, expected: float
) -> None:
    episode = run(*voices)
    assert episode.state["answer"] == answer
    assert episode.total_reward == expected


def test_no_calculation_is_both_trained_and_held_out() -> None:
    train, held_out = task.load_data()
    assert (len(train), len(held_out)) == (134, 200)
    questions = [*train["question"], *held_out["question"]]
    assert len(set(questions)) == 334


def test_the_data_follow_their_seed() -> None:
    assert task.generate(seed=1)[1].to_list() == task.generate(seed=1)[1].to_list()
    assert task.generate(seed=1)[1].to_list() != task.generate(seed=2)[1].to_list()


def test_another_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="has 'generated' only"):
        task.load_data("gsm8k")
