"""What router is trained on: requests of three kinds made from a seed, and the reward."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[2]))

from workflows.math_duo.task import calculations

KINDS = ("sum", "reverse", "upper")
WORDS = (
    *("cat", "dog", "sun", "map", "pen", "cup", "fox", "hat", "jar"),
    *("key", "log", "net", "owl", "pig", "rug", "toy", "van", "web"),
)


def sum_request(a: int, operation: str, b: int) -> tuple[str, str]:
    """A request for a calculation, and what is right to answer.

    >>> sum_request(7, "+", 5)
    ('What is 7+5?', '12')
    """
    return f"What is {a}{operation}{b}?", str(a + b if operation == "+" else a - b)


def word_request(kind: str, word: str) -> tuple[str, str]:
    """A request that changes a word (reverse or upper), and what is right to answer.

    >>> word_request("reverse", "cat")
    ('Write cat backwards.', 'tac')
    """
    if kind == "reverse":
        return f"Write {word} backwards.", word[::-1]
    return f"Write {word} in capitals.", word.upper()


def generate(seed: int = 0, held_out: int = 240, train: int = 960) -> tuple[Dataset, Dataset]:
    """Requests (question, answer), a third of each kind.

    The held-out ones ask for calculations and words that are never trained on. A third of the
    calculations and of the words is held out; as there are 18 words only, requests repeat.
    """
    rng = random.Random(seed)
    sums, words = calculations(), list(WORDS)
    rng.shuffle(sums)
    rng.shuffle(words)
    cuts = len(sums) // 3, len(words) // 3
    return (
        _draw(rng, train, sums[cuts[0] :], words[cuts[1] :]),
        _draw(rng, held_out, sums[: cuts[0]], words[: cuts[1]]),
    )


def _draw(
    rng: random.Random,
    count: int,
    sums: Sequence[tuple[int, str, int]],
    words: Sequence[str],
) -> Dataset:
    """Requests for some calculations and words, each kind in its turn."""
    rows = []
    for n in range(count):
        kind = KINDS[n % len(KINDS)]
        if kind == "sum":
            question, answer = sum_request(*rng.choice(sums))
        else:
            question, answer = word_request(kind, rng.choice(words))
        rows.append({"question": question, "answer": answer})
    return Dataset.from_list(rows)


def load_data(dataset: str = "generated") -> tuple[Dataset, Dataset]:
    """Train and held-out examples, with columns question and answer.

    Raises:
        ValueError: `dataset` is not `generated`, the only one there is.
    """
    if dataset != "generated":
        raise ValueError(f"dataset is {dataset!r}; this workflow has 'generated' only")
    return generate()


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """1 if the answer is exactly the right one, else 0."""
    return float(state["answer"].strip() == example["answer"])
