"""What tool_agent is trained on: calculations made from a seed, and the reward."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from langchain_core.messages import ToolMessage

sys.path.append(str(Path(__file__).parents[2]))

from workflows.math_duo.task import calculations

HELD_OUT = 134
FOR_THE_TOOL = 0.2
"""What an answer loses that no tool gave."""


def generate(seed: int = 0) -> tuple[Dataset, Dataset]:
    """Every calculation (question, answer) once: 134 of them held out, the others to train on."""
    pool = calculations()
    random.Random(seed).shuffle(pool)
    rows = [
        {
            "question": f"What is {a}{operation}{b}?",
            "answer": str(a + b if operation == "+" else a - b),
        }
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


def inputs(example: Mapping[str, Any]) -> dict[str, Any]:
    """The agent takes messages."""
    return {"messages": [("user", example["question"])]}


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """1 if the last message is the right number, 0.2 less if no tool was used for it; else 0."""
    messages = state["messages"]
    if messages[-1].text.strip() != example["answer"]:
        return 0.0
    used = any(isinstance(message, ToolMessage) for message in messages)
    return 1.0 if used else 1.0 - FOR_THE_TOOL
