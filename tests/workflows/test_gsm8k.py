"""GSM8K's gold answers are graded right and wrong ones wrong, in the words that models use.

By default over the sample in the workflow's folder; with MARFT_GSM8K=DIR over GSM8K's own files.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from fractions import Fraction

import pytest

from marft_graph import FakeEngine
from tests.workflows.play import play
from workflows.gsm8k import task

FOLDER = task.SAMPLE.parent
SOURCE = os.environ.get("MARFT_GSM8K", "sample")
ROWS = [row for split in task.load_data(SOURCE) for row in split]
WAYS: dict[str, Callable[[str], str]] = {
    "hashes": lambda n: f"So that is it.\n#### {n}",
    "boxed": lambda n: f"After 3 steps: $\\boxed{{{n}}}$.",
    "sentence": lambda n: f"First 2 + 2 = 4. The answer is {n}. I took 7 steps.",
    "bold": lambda n: f"The final answer is **{n}**",
    "thousands and cents": lambda n: f"Answer: ${float(n):,.3f}",
    "alone": lambda n: n,
}


def shifted(number: str, change: Fraction | int) -> str:
    """A number changed by an amount, written as GSM8K writes numbers."""
    changed = Fraction(number) + change
    if changed.denominator == 1:
        return str(changed.numerator)
    return f"{float(changed):.10g}"


def misses(number: str) -> dict[str, str]:
    """What is nearly right."""
    value = Fraction(number)
    found = {
        "one more": shifted(number, 1),
        "one less": shifted(number, -1),
        "other sign": shifted(number, -2 * value),
        "ten times": shifted(number, 9 * value),
        "hundredth": shifted(number, Fraction(-99, 100) * value),
        "half more": shifted(number, Fraction(1, 2)),
        "minutes for hours": shifted(number, 59 * value),
    }
    return {name: text for name, text in found.items() if Fraction(text) != value}


def test_every_gold_solution_is_right_as_it_is_written() -> None:
    wrong = [
        row["question"]
        for row in ROWS
        if not task.is_right(f"{row['solution']}\n#### {row['answer']}", row["answer"])
    ]
    assert wrong == []


@pytest.mark.parametrize("way", WAYS)
def test_every_gold_answer_is_right_in_the_words_of_models(way: str) -> None:
    wrong = [
        (row["answer"], WAYS[way](row["answer"]))
        for row in ROWS
        if not task.is_right(WAYS[way](row["answer"]), row["answer"], row["question"])
    ]
    assert wrong == []


def test_wrong_answers_are_wrong_and_there_are_at_least_300() -> None:
    rng = random.Random(0)
    cases = []
    for row in ROWS:
        gold, ways = row["answer"], list(WAYS.values())
        others = [row["answer"] for row in rng.sample(ROWS, 3)]
        others = [number for number in others if Fraction(number) != Fraction(gold)]
        cases += [(gold, rng.choice(ways)(n), row) for n in (*misses(gold).values(), *others)]
    accepted = [
        (gold, text)
        for gold, text, row in cases
        if task.is_right(text, gold) or task.is_right(text, gold, row["question"])
    ]
    assert len(cases) >= 300
    assert accepted == []


TIME = "How many minutes does the trip take?"


@pytest.mark.parametrize(
    ("text", "question", "expected"),
    [
        ("30 minutes", TIME, True),
        ("The trip takes 30 mins.", TIME, True),
        ("30 hours", TIME, False),
        ("#### 30 hours", TIME, False),
        ("\\boxed{30\\text{ seconds}}", TIME, False),
        ("The answer is 0.5 hours.", TIME, False),
        ("30 kilometers", TIME, True),  # no unit of time: the number is what counts
        ("30 dollars", "How much money, in dollars, is left?", True),
        ("30 cents", "How many dollars are left?", False),
        ("30 feet", "What is its length in yards?", False),
        ("30 hours", "How old is he?", True),
    ],
)
def test_another_unit_of_the_kind_that_is_asked_for_is_wrong(
    text: str, question: str, expected: bool
) -> None:
    assert task.is_right(text, "30", question) is expected


def test_every_question_that_asks_for_a_unit_refuses_its_neighbours() -> None:
    asking = [row for row in ROWS if task._asked_unit(row["question"])]
    assert asking
    for row in asking:
        asked = task._asked_unit(row["question"])
        family = next(f for f in task._UNITS if asked in f)
        assert task.is_right(f"{row['answer']} {asked}s", row["answer"], row["question"])
        for other in set(family) - {asked}:
            text = f"The answer is {row['answer']} {other}s."
            assert not task.is_right(text, row["answer"], row["question"])


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("The answer is $1,234.00.", "1234", True),
        ("\\boxed{\\$1,234}", "1234", True),
        ("18.0", "18", True),
        ("1/2", "0.5", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("1 1/2 cups", "1.5", True),
        ("50%", "50", True),
        ("-$5", "-5", True),
        ("16-3=13", "13", True),
        ("The answer is 5 + 3 = 8.", "8", True),
        ("The answer is 18 eggs for 3 days.", "18", True),
        ("18 or 19", "19", False),
        ("eighteen", "18", False),
        ("", "18", False),
        ("#### ", "18", False),
        ("18\n#### 17", "18", False),
        ("1.234", "1234", False),
        ("0.5", "50", False),
        ("-5", "5", False),
    ],
)
def test_the_final_answer_counts(text: str, gold: str, expected: bool) -> None:
    assert task.is_right(text, gold) is expected


def test_the_checkers_answer_is_rewarded_and_the_label_is_not_shown() -> None:
    row = ROWS[0]
    for answer, expected in ((f"#### {row['answer']}", 1.0), (f"#### {row['answer']}1", 0.0)):
        episode = play(FOLDER, row, FakeEngine({"solver": "so ...", "checker": answer}))
        assert episode.ok, episode.error
        assert episode.total_reward == expected
        assert [call.node for call in episode.calls] == ["solver", "checker"]
        shown = " ".join(m["content"] for c in episode.calls for m in c.messages[:-1])
        assert row["solution"] not in shown
        assert not re.search(r"####(?! 42)", shown)


def test_the_sample_is_apart_and_small() -> None:
    train, held_out = task.load_data()
    assert (len(train), len(held_out)) == (32, 16)
    assert not set(train["question"]) & set(held_out["question"])
