"""Rewards to build from: several combined, a reward model, and checks of length, form and maths.

    from marft_graph import Trainer
    from marft_graph.rewards import combine, length_penalty, math_equal

    def correct(example, state):
        return math_equal(state["answer"], example["answer"])

    def brevity(example, state):
        return length_penalty(state["answer"], limit=200, buffer=50)

    Trainer(graph, ..., reward=combine(correct, (brevity, 0.1)))

A reward function is called with the example and the graph's final state. What a node should be paid
for while it runs is said there, by `marft_graph.emit_reward`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from marft_graph.errors import ConfigError
from marft_graph.rewards.maths import math_equal
from marft_graph.rollout.rewards import CombinedReward, RewardFunction, Rewards, combine

if TYPE_CHECKING:
    from marft_graph.rewards.model import RewardModel

__all__ = [
    "CombinedReward",
    "RewardFunction",
    "RewardModel",
    "Rewards",
    "combine",
    "json_valid",
    "length_penalty",
    "matches",
    "math_equal",
]


def length_penalty(
    text: str, *, limit: int, buffer: int, unit: Literal["words", "characters"] = "words"
) -> float:
    """A soft penalty for text that is too long: 0, then down to -1 on a straight line.

    With n the length, L the limit and B the buffer,

        0 if n <= L - B,    (L - B - n) / B if L - B < n <= L,    -1 if n > L

    which is the soft overlong punishment of DAPO (arXiv 2503.14476, section 3.4), here in words or
    characters instead of tokens.

    Args:
        text: what an agent wrote.
        limit: length from which the penalty is -1.
        buffer: length before `limit` over which it falls from 0; 0: it falls at once.
        unit: what is counted; words are what white space separates.

    Raises:
        ConfigError: `limit` or `buffer` is negative, or `buffer` is longer than `limit`.

    >>> [length_penalty("a" * n, limit=10, buffer=4, unit="characters") for n in (6, 7, 10, 11)]
    [0.0, -0.25, -1.0, -1.0]
    >>> length_penalty("three short words", limit=4, buffer=2)
    -0.5
    """
    if not 0 <= buffer <= limit:
        raise ConfigError(f"buffer is {buffer}; it must be between 0 and limit, which is {limit}")
    if unit not in ("words", "characters"):
        raise ConfigError(f"unit is {unit!r}; it must be words or characters")
    length = len(text.split()) if unit == "words" else len(text)
    over = length - (limit - buffer)
    if over <= 0:
        return 0.0
    return -1.0 if length > limit else -over / buffer


def matches(text: str, pattern: str | re.Pattern[str]) -> bool:
    r"""Whether a whole text has the form of a regular expression.

    White space around the text does not count. In a pattern given as a string, `.` also matches
    line breaks.

    >>> matches("<think>2+2\nis 4</think> 4\n", r"<think>.+</think>\s*\d+")
    True
    >>> matches("I think 4", r"<think>.+</think>\s*\d+")
    False
    """
    compiled = re.compile(pattern, re.DOTALL) if isinstance(pattern, str) else pattern
    return compiled.fullmatch(text.strip()) is not None


def json_valid(text: str, keys: Sequence[str] = ()) -> bool:
    """Whether a text is strict JSON (no NaN, no Infinity), and an object with these keys if given.

    >>> json_valid('{"answer": 12}', keys=["answer"]), json_valid('{"answer": NaN}')
    (True, False)
    >>> json_valid("[1, 2]"), json_valid("[1, 2]", keys=["answer"])
    (True, False)
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(value, dict) and all(key in value for key in keys))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def __getattr__(name: str) -> Any:
    # Imported when first used: most rewards need no torch.
    if name == "RewardModel":
        from marft_graph.rewards.model import RewardModel

        return RewardModel
    raise AttributeError(f"module 'marft_graph.rewards' has no attribute {name!r}")
