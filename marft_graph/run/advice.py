"""Signs in a run's metrics that something could be better, in words, with what to try.

Unlike `health`, which stops a collapse while it happens, this is for a person who reads the report:
a sign is no proof. Pure functions of the metrics' rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from marft_graph.names import agent_of_adapter

T = TypeVar("T")
Row = Mapping[str, Any]

_RECENT = 10
"""The last tenth of a run is what a sign is read from, but no fewer than three iterations."""
FAILED, TRUNCATED, ZERO_ADVANTAGES, CLIPPED = 0.05, 0.1, 0.7, 0.3
"""Shares above which there is a warning: of episodes, completions, advantages, ratios."""
KL, LOGPROB_GAP = 1.0, 0.05
"""Nats per token above which there is a warning."""
ENTROPY_LEFT = 0.1
"""Share of its first entropy below which an agent's entropy is a warning."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A sign and what to do about it."""

    sign: str
    remedy: str


@dataclass(frozen=True, slots=True)
class _Sign:
    """A figure of an agent that is worth a word beyond a limit."""

    figure: str
    is_bad: Callable[[float], bool]
    words: str
    remedy: str


_SIGNS = (
    _Sign(
        "truncated_share",
        lambda share: share > TRUNCATED,
        "{value:.0%} of {agent}'s answers were cut off at the token limit",
        "A higher max_new_tokens, or a reward for brevity (rewards.length_penalty).",
    ),
    _Sign(
        "advantage_zero_share",
        lambda share: share > ZERO_ADVANTAGES,
        "{value:.0%} of {agent}'s calls taught nothing: their advantage was 0",
        "So it is where all episodes of an example earn the same. Try examples that are neither "
        "always nor never solved, a reward with steps in between, a larger group_size, or "
        "filter_rounds. Where the task is solved, training may end.",
    ),
    _Sign(
        "kl",
        lambda kl: kl > KL,
        "{agent} is far from its base, {value:.2f} nats per token",
        "Read its answers below. A kl_coef above 0 or a lower learning_rate holds it closer.",
    ),
    _Sign(
        "clip_fraction",
        lambda share: share > CLIPPED,
        "{value:.0%} of {agent}'s ratios were clipped: its steps are too large",
        "A lower learning_rate, fewer epochs or fewer minibatches.",
    ),
    _Sign(
        "logprob_gap_mean",
        lambda gap: gap > LOGPROB_GAP,
        "engine and learner disagree about {agent}'s tokens by {value:.3f} nats on average",
        "importance_cap: 2, or the same dtype in both.",
    ),
    _Sign(
        "explained_variance",
        lambda share: share < 0,
        "{agent}'s critic predicts its returns worse than their mean would ({value:.2f} of the "
        "variance explained)",
        "More critic_epochs, critic_warmup, another critic_learning_rate, or advantage: group.",
    ),
)


def advice(rows: Sequence[Row], evaluations: Sequence[Row]) -> list[Advice]:
    """What is worth a look in a run, the whole run first, then agent by agent.

    Args:
        rows: of `metrics.jsonl`.
        evaluations: rows of `evaluations.jsonl`.

    >>> row = {"iteration": 1, "episodes": 8, "episodes_failed": 4, "agents": {}}
    >>> [found.sign for found in advice([row], [])]
    ['50 % of the training episodes failed']
    """
    agents = dict.fromkeys(agent for row in rows for agent in row["agents"])
    return [
        *_of_run(rows, evaluations),
        *(found for agent in agents for found in _of_agent(agent, rows)),
    ]


def recent_figure(agent: str, figure: str, rows: Sequence[Row]) -> float | None:
    """Mean of an agent's figure over the `last_tenth` of the iterations that have it."""
    values = figures(agent, figure, rows)
    return statistics.fmean(last_tenth(values)) if values else None


def first_figure(agent: str, figure: str, rows: Sequence[Row]) -> float | None:
    """The same over the first tenth."""
    values = figures(agent, figure, rows)
    return statistics.fmean(values[: _width(values)]) if values else None


def figures(agent: str, figure: str, rows: Sequence[Row]) -> list[float]:
    """An agent's figure in every iteration that has it."""
    found = (row["agents"].get(agent, {}).get(figure) for row in rows)
    return [value for value in found if isinstance(value, int | float)]


def last_tenth(values: Sequence[T]) -> Sequence[T]:
    """What the reports call recent: the last tenth, but three at least."""
    return values[-_width(values) :]


def _width(values: Sequence[Any]) -> int:
    return max(3, len(values) // _RECENT)


def _of_run(rows: Sequence[Row], evaluations: Sequence[Row]) -> Iterator[Advice]:
    episodes = sum(row["episodes"] for row in rows)
    failed = sum(row["episodes_failed"] for row in rows)
    if episodes and failed > FAILED * episodes:
        yield Advice(
            f"{100 * failed / episodes:.0f} % of the training episodes failed",
            "Failures has the reasons and the first error of each. An exception that is the "
            "policy's own fault can earn a reward instead (fault_rewards).",
        )
    if len(evaluations) < 2:
        return
    best = max(evaluations, key=lambda row: row["eval_return"])
    last = evaluations[-1]
    noise = 2 * max(best.get("eval_stderr") or 0.0, last.get("eval_stderr") or 0.0)
    if last["eval_return"] < best["eval_return"] - noise:
        yield Advice(
            f"the held-out return was best after iteration {best['iteration']} "
            f"({best['eval_return']:.3f}) and is {last['eval_return']:.3f} now",
            "load_best: true ends with the best checkpoint, early_stop ends training in time.",
        )


def _of_agent(agent: str, rows: Sequence[Row]) -> Iterator[Advice]:
    for sign in _SIGNS:
        value = recent_figure(agent, sign.figure, rows)
        if value is not None and sign.is_bad(value):
            yield Advice(sign.words.format(agent=agent_of_adapter(agent), value=value), sign.remedy)
    start, end = (find(agent, "entropy", rows) for find in (first_figure, recent_figure))
    if start is not None and end is not None and end < ENTROPY_LEFT * start:
        yield Advice(
            f"the entropy of {agent_of_adapter(agent)} fell from {start:.3f} to {end:.3f} nats per "
            "token: it says nearly the same every time",
            "That is right where the task has one answer. Else a higher entropy_coef, kl_coef or "
            "temperature, or a lower learning_rate.",
        )
