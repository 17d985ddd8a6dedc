"""What debate is trained on: calculations made from a seed, and the reward."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[2]))

from workflows.math_duo.task import calculations

HELD_OUT = 200


def generate(seed: int = 0) -> tuple[Dataset, Dataset]:
    """Every calculation (question, answer) once: 200 of them held out, the others to train on."""
    pool = calculations()
    random.Random(seed).shuffle(pool)
    rows = [
        {"question": f"{a}{operation}{b}", "answer": str(a + b if operation == "+" else a - b)}
        for a, operation, b in pool
    ]
    return Dataset.from_list(rows[HELD_OUT:]), Dataset.from_list(rows[:HELD_OUT])


def load_data(dataset: str = "generated") -> tuple[Dataset, Dataset]:
    """Train and held-out examples, with columns question and answer (a number as text).

    Raises:
        ValueError: `dataset` is not `generated`, the only one there is.
    """
    if dataset != "generated":
        raise ValueError(f"dataset is {dataset!r}; this workflow has 'generated' only")
    return generate()


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """1 if the judge and both debaters agree on the right number, in digits; else 0."""
    return float(state["answer"].strip() == example["answer"])
