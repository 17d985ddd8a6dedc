"""Calling the user's reward function, and making sure that what it says is a reward.

A reward that raises, hangs or answers nonsense stops the run: no failure becomes a number.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import reprlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, SupportsFloat

from marft_graph.episode import Reward
from marft_graph.errors import RewardError

RewardResult = float | Mapping[str, float] | Reward
RewardFunction = Callable[[Mapping[str, Any], Any], RewardResult | Awaitable[RewardResult]]
"""`reward(example, state)`: the team's outcome, the nodes' own rewards, or both."""


async def call_reward(
    reward: RewardFunction,
    example: Mapping[str, Any],
    state: Any,
    *,
    nodes: Collection[str],
    timeout: float,
) -> Reward:
    """The reward of one episode.

    Synchronous functions run in the loop's worker threads.

    Args:
        reward: the user's function.
        example: what the episode ran on.
        state: final state of the graph.
        nodes: names that a dict of rewards may use.
        timeout: seconds that the function may take.

    Raises:
        RewardError: the function raised, took too long, or returned no reward; the message shows
            the example.
    """
    try:
        result = await _run(reward, example, state, timeout)
    except Exception as error:
        if isinstance(error, _TooSlow):
            problem = f"took longer than {timeout:g} seconds (reward_timeout)"
        else:
            problem = f"raised {type(error).__name__}: {error}"
        raise RewardError(f"the reward function {problem}, on example {shown(example)}") from error
    try:
        return as_reward(result, nodes)
    except RewardError as error:
        raise RewardError(f"{error}, on example {shown(example)}") from None


class _TooSlow(Exception):
    """The reward function ran past its deadline."""


async def _run(
    reward: RewardFunction, example: Mapping[str, Any], state: Any, timeout: float
) -> Any:
    is_async = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(
        getattr(reward, "__call__", None)  # noqa: B004 - an object with an async __call__
    )
    if is_async:
        work: asyncio.Future[Any] = asyncio.ensure_future(_awaited(reward(example, state)))
    else:
        work = asyncio.get_running_loop().run_in_executor(None, reward, example, state)
    done, _ = await asyncio.wait([work], timeout=timeout)
    if not done:
        work.cancel()
        raise _TooSlow
    result = work.result()
    return await asyncio.wait_for(result, timeout) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def as_reward(result: Any, nodes: Collection[str]) -> Reward:
    """A reward function's answer as a `Reward`.

    >>> as_reward({"actor": 1}, ["reasoner", "actor"])
    Reward(outcome=0.0, nodes={'actor': 1.0})
    """
    if isinstance(result, Reward):
        outcome, own = result.outcome, result.nodes
    elif isinstance(result, Mapping):
        outcome, own = 0.0, result
    else:
        outcome, own = result, {}
    for name in own:
        if name not in nodes:
            raise RewardError(
                f"the reward function rewards {name!r}, which is no node of the graph; the nodes "
                f"are {', '.join(map(repr, sorted(nodes)))}"
            )
    return Reward(
        outcome=_number(outcome, "the outcome"),
        nodes={name: _number(value, repr(name)) for name, value in own.items()},
    )


def _number(value: Any, what: str) -> float:
    accepted = "a reward is one finite number, or a dict of node names to numbers"
    if value is None or isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        raise RewardError(f"the reward function returned {value!r} for {what}; {accepted}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"the reward function returned {reprlib.repr(value)} for {what}; {accepted}"
        ) from error
    if not math.isfinite(number):
        raise RewardError(f"the reward function returned {number} for {what}; {accepted}")
    return number


def shown(example: Mapping[str, Any]) -> str:
    """An example, shortened for a message."""
    text = ", ".join(f"{key!r}: {reprlib.repr(value)}" for key, value in example.items())
    return "{" + (text if len(text) <= 300 else text[:297] + "...") + "}"
