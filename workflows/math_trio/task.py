"""What math_trio is trained on: the problems of math_duo, and a reward that asks for approval."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[2]))

from workflows.math_duo import task as math_duo


def load_data(dataset: str = "generated") -> tuple[Dataset, Dataset]:
    """Train and held-out problems (question, answer), from where math_duo takes its own."""
    return math_duo.load_data(dataset)


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """1 if the team hands in a draft that is right, in digits; it hands in what it approved."""
    if not state["approved"]:
        return 0.0
    return math_duo.reward(example, {"answer": state["draft"]})
