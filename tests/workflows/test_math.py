r"""MATH's format is read, and answers are graded by what stands in their `\boxed{}`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from marft_graph import FakeEngine, compile_graph
from marft_graph.workflow import load_target
from tests.workflows.play import play
from workflows.math import task
from workflows.math_duo import task as math_duo

FOLDER = task.OWN.parent
TRAIN, HELD_OUT = task.load_data()
ROWS = [*TRAIN, *HELD_OUT]


def test_our_own_problems_have_the_format_of_math() -> None:
    assert (len(TRAIN), len(HELD_OUT)) == (16, 8)
    assert {row["problem"] for row in TRAIN}.isdisjoint(row["problem"] for row in HELD_OUT)
    for row in ROWS:
        assert row["level"] in {f"Level {number}" for number in range(1, 6)}
        assert row["type"]


def test_every_solution_is_right_and_every_other_rows_answer_wrong() -> None:
    answers = {row["answer"] for row in ROWS}
    for row in ROWS:
        assert task.is_right(row["solution"], row["answer"])
        same = (
            {"1", "12", "13", row["answer"]} if row["answer"] in ("12", "13") else {row["answer"]}
        )
        for other in sorted(answers - same)[::6]:
            assert not task.is_right(f"$\\boxed{{{other}}}$", row["answer"]), (row, other)


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        (r"\boxed{0.375}", r"\frac{3}{8}", True),
        (r"\boxed{\dfrac{6}{16}}", r"\frac{3}{8}", True),
        (r"\boxed{3,2}", "2,3", True),
        (r"\boxed{(x-3)(x+4)}", "x^2+x-12", True),
        (r"\boxed{x^2+x+12}", "x^2+x-12", False),
        (r"\boxed{70}", r"70^\circ", True),
        (r"\boxed{\sqrt{50}}", r"5\sqrt{2}", True),
        (r"\boxed{[3,\infty)}", r"(3,\infty)", False),
        (r"\boxed{1} no, \boxed{2}", "2", True),
        (r"\boxed{2} no, \boxed{1}", "2", False),
        (r"\boxed 2", "2", True),
        (r"\boxed{\text{eva}}", r"\text{Eva}", False),
        (r"\boxed{\textbf{Eva}}", r"\text{Eva}", True),
        (r"\boxed{Ann}", r"\text{Eva}", False),
        (r"\boxed{\text{(C)}}", r"\text{(C)}", True),
        (r"\boxed{1011}", "1011_2", True),
        ("42", "42", False),
        (r"\boxed{42", "42", False),
        (r"\boxed{}", "42", False),
        (r"\boxed{9^{9^{9^{9}}}}", "42", False),
    ],
)
def test_what_is_boxed_is_compared_as_mathematics(text: str, expected: str, right: bool) -> None:
    assert task.is_right(text, expected) is right


def test_two_solvers_do_not_see_each_other_and_the_editor_sees_both() -> None:
    flex_mg = compile_graph(load_target(str(FOLDER)).graph)
    assert flex_mg.parallel_groups == (("careful", "direct"),) or flex_mg.parallel_groups == (
        ("direct", "careful"),
    )
    assert flex_mg.dependency("careful", "direct") == "never"
    assert flex_mg.dependency("editor", "direct") == "always"


def test_the_editors_answer_is_rewarded() -> None:
    row = HELD_OUT[0]
    for answer, expected in ((row["answer"], 1.0), ("0", 0.0)):
        said = {"direct": "a", "careful": "b", "editor": f"So \\boxed{{{answer}}}."}
        episode = play(FOLDER, row, FakeEngine(said))
        assert episode.ok, episode.error
        assert episode.total_reward == expected


def test_all_subjects_of_a_data_set_on_the_hub_are_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(name: str, configuration: str) -> DatasetDict:
        row = {"problem": configuration, "solution": r"\boxed{1}", "level": "Level 1", "type": name}
        return DatasetDict(train=Dataset.from_list([row] * 2), test=Dataset.from_list([row]))

    monkeypatch.setattr(math_duo, "get_dataset_config_names", lambda name: ["algebra", "geometry"])
    monkeypatch.setattr(math_duo, "load_dataset", load)
    train, held_out = task.load_data("EleutherAI/hendrycks_math")
    assert train["problem"][:] == ["algebra", "algebra", "geometry", "geometry"]
    assert held_out["answer"][:] == ["1", "1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "solution": r"\boxed{1}"}, "it needs problem and solution"),
        ({"problem": "How much?", "solution": "1"}, "solution of 'How much.' boxes no answer"),
    ],
)
def test_rows_that_are_not_those_of_math_are_named(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    Dataset.from_list([row] * 10).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        task.load_data(str(tmp_path / "rows.parquet"))
