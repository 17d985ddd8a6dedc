"""The limits and choices of a rollout, in one value that is handed on whole.

`run_episodes` makes it of its keyword arguments, `config.rollout_settings` of a run's settings;
what comes below takes from it what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from marft_graph.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How episodes are run, sampled and rewarded; the same for all episodes of a rollout."""

    concurrency: int = 256
    """Episodes that run at once, at least 1."""
    episode_timeout: float = 600.0
    """Seconds that an episode may take."""
    call_timeout: float | None = None
    """Seconds that a model call may take, its time in the engine's queue included; None: any."""
    reward_timeout: float = 60.0
    """Seconds that one reward may take."""
    reward_concurrency: int = 64
    """Reward functions that run at once, at least 1."""
    temperature: float | None = None
    """Sampling temperature, at least 0; None: what the app asks for, else 1."""
    max_new_tokens: int = 256
    """Tokens of a completion where the app sets no limit, at least 1."""
    cap_new_tokens: bool = False
    """Whether `max_new_tokens` also bounds calls for which the app allows more."""
    recursion_limit: int | None = None
    """Steps of a graph, at least 1; None: what the app sets by `with_config`, else 25."""
    constrain_output: bool = False
    """Whether calls that ask for structured output, or force a tool, can write nothing else."""
    schema_in_prompt: bool = True
    """Whether models are told what form of answer the app asks for."""
    fault_rewards: Mapping[str, float] = field(default_factory=dict)
    """By name of an exception's class: the outcome of an episode that it ends."""
    reward_errors: Literal["stop", "drop"] = "stop"
    """Whether a reward function that fails stops the rollout or drops its episode."""
    new_nodes: Literal["stop", "freeze", "train"] = "stop"
    """What becomes of a node that asks its model and is neither trained nor frozen on purpose: the
    rollout ends with an error, its own model answers, or an adapter named after it."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "reward_concurrency", "max_new_tokens"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("episode_timeout", "call_timeout", "reward_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise ConfigError(f"{name} is {seconds}; it must be above 0")
        if self.temperature is not None:
            check_at_least("temperature", self.temperature, 0)
        if self.reward_errors not in ("stop", "drop"):
            raise ConfigError(
                f"reward_errors is {self.reward_errors!r}; it must be one of stop, drop"
            )
        if self.new_nodes not in ("stop", "freeze", "train"):
            raise ConfigError(
                f"new_nodes is {self.new_nodes!r}; it must be one of stop, freeze, train"
            )


def check_at_least(name: str, value: float, least: int) -> None:
    """Refuse a number that is too small, before anything waits for it.

    Raises:
        ConfigError: it is below `least`, or no number.
    """
    if not value >= least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")
