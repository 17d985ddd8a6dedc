"""A small training run that tests vary: its data, reward and settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marft_graph import TrainConfig

EXAMPLES = [{"question": "q" * (1 + i % 5), "answer": str(i)} for i in range(12)]


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """More for answers with more low letters: noisy, but different within a group."""
    return sum(char < "k" for char in state["answer"]) / 10


def config(model: Path, **changes: Any) -> TrainConfig:
    settings = {
        "base_model": str(model),
        "iterations": 2,
        "examples_per_iteration": 2,
        "group_size": 4,
        "max_new_tokens": 6,
        "learning_rate": 1e-3,
        "advantage": "group",
        "eval_every": 1,
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})
