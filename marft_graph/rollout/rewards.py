"""Calling the user's reward functions, and making sure that what they say is a reward.

A reward that raises, hangs or answers nonsense stops the run: no failure becomes a number.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import math
import reprlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, SupportsFloat, TypeVar

from marft_graph.episode import Episode, Reward, check_reward_size
from marft_graph.errors import ConfigError, RewardError
from marft_graph.rollout.copies import own_copy
from marft_graph.rollout.process_loop import REWARD_TASK
from marft_graph.rollout.scopes import outside_runs
from marft_graph.rollout.worker_threads import WorkerThreads

T = TypeVar("T")

RewardResult = float | Mapping[str, float] | Reward
RewardFunction = Callable[[Mapping[str, Any], Any], RewardResult | Awaitable[RewardResult]]
"""`reward(example, state)`: the team's outcome, the nodes' own rewards, or both."""
Weighted = RewardFunction | tuple[RewardFunction, float]
Rewards = RewardFunction | Mapping[RewardFunction, float] | Sequence[Weighted]
"""One reward function, or several: a list, or a mapping of functions to their weights."""


@dataclass(frozen=True, slots=True)
class RewardPart:
    """One of several reward functions."""

    name: str
    function: RewardFunction
    weight: float


class CombinedReward:
    """The weighted sum of several reward functions, itself a reward function; see `combine`."""

    def __init__(self, parts: Sequence[RewardPart]) -> None:
        self.parts = tuple(parts)

    async def __call__(self, example: Mapping[str, Any], state: Any) -> Reward:
        """Call all parts at once, synchronous ones in threads; a rollout does so by itself."""
        results = await asyncio.gather(
            *(_result_of(part.function, own_copy(example), state) for part in self.parts)
        )
        return self.total([as_reward(result) for result in results])

    def total(self, rewards: Sequence[Reward]) -> Reward:
        """The weighted sum of the parts' rewards; `parts` has each before its weight."""
        nodes: dict[str, list[float]] = {}
        values: dict[str, float] = {}
        for part, reward in zip(self.parts, rewards, strict=True):
            for node, value in reward.nodes.items():
                nodes.setdefault(node, []).append(part.weight * value)
            values |= reward.parts
            values[part.name] = math.fsum([reward.outcome, *reward.nodes.values()])
        return Reward(
            outcome=math.fsum(
                part.weight * reward.outcome
                for part, reward in zip(self.parts, rewards, strict=True)
            ),
            nodes={node: math.fsum(terms) for node, terms in nodes.items()},
            parts=values,
        )


def combine(*parts: Weighted) -> CombinedReward:
    """One reward function that adds up several, each with its weight.

    The parts may be sync or async, and answer with a number, a dict by node or a `Reward`. What
    each said before its weight is kept in `Episode.reward_parts`, under the function's name (a
    second one of that name gets a `_2`), and its mean is in `metrics.jsonl` under `rewards`.

    Args:
        parts: `(function, weight)`, or a function alone for weight 1.

    Raises:
        ConfigError: there is no part, or one is no function with a finite weight.

    >>> def correct(example, state):
    ...     return example["answer"] == state["answer"]
    >>> def length(example, state):
    ...     return len(state["answer"])
    >>> both = combine(correct, (length, -0.25))
    >>> reward = asyncio.run(both({"answer": "12"}, {"answer": "12"}))
    >>> reward.outcome, reward.parts
    (0.5, {'correct': 1.0, 'length': 2.0})
    """
    if not parts:
        raise ConfigError("combine() needs at least one reward function")
    named: list[RewardPart] = []
    for part in parts:
        function, weight = part if isinstance(part, tuple) and len(part) == 2 else (part, 1.0)
        if not callable(function):
            raise ConfigError(
                f"{reprlib.repr(part)} is no reward; each is a function, or (function, weight)"
            )
        _check_arguments(function)
        name = _name_of(function)
        if isinstance(weight, str) or not isinstance(weight, SupportsFloat):
            raise ConfigError(f"the weight of {name!r} is {weight!r}; it must be a finite number")
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of {name!r} is {weight}; it must be a finite number")
        used = {other.name for other in named}
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        free = name if name not in used else next(n for n in numbered if n not in used)
        named.append(RewardPart(free, function, float(weight)))
    return CombinedReward(named)


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "lambda" if name == "<lambda>" else str(name)


def as_reward_function(reward: Rewards) -> RewardFunction:
    """One reward function, whichever way it was given.

    Raises:
        ConfigError: it is neither a function nor several.
    """
    if isinstance(reward, Mapping):
        return combine(*reward.items())
    if isinstance(reward, list | tuple):
        return combine(*reward)
    if not callable(reward):
        raise ConfigError(
            f"reward is {reprlib.repr(reward)}; it must be a function `reward(example, state)`, a "
            "list of such functions, or a dict of functions to weights"
        )
    _check_arguments(reward)
    return reward


def _check_arguments(reward: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with an example and a state."""
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # some functions that are not written in Python have none
        return
    try:
        signature.bind({}, {})
    except TypeError as error:
        raise ConfigError(
            f"the reward {_name_of(reward)!r} takes {signature}; it is called as "
            f"reward(example, state): {error}"
        ) from None


class RewardCalls:
    """Calls reward functions for a rollout: at most so many at once, each with a deadline.

    A synchronous function that runs past its deadline is given up: its thread goes on by itself,
    and its place is another one's.

    Args:
        workers: runs synchronous functions.
        timeout: seconds that one function may take once it has begun.
        concurrency: functions that run at once.
    """

    def __init__(self, workers: WorkerThreads, *, timeout: float, concurrency: int) -> None:
        self._workers = workers
        self._timeout = timeout
        self._places = asyncio.Semaphore(concurrency)

    async def call(
        self,
        reward: RewardFunction,
        example: Mapping[str, Any],
        state: Any,
        *,
        nodes: Collection[str],
    ) -> Reward:
        """The reward of one episode.

        Args:
            reward: the user's function.
            example: what the episode ran on.
            state: final state of the graph.
            nodes: names that a dict of rewards may use.

        Raises:
            RewardError: a function raised, took too long, or returned no reward; the message shows
                the example.
        """
        try:
            if not isinstance(reward, CombinedReward):
                return await self._one("the reward function", reward, example, state, nodes)
            rewards = await asyncio.gather(
                *(
                    self._one(f"the reward function {p.name!r}", p.function, example, state, nodes)
                    for p in reward.parts
                )
            )
            return reward.total(rewards)
        except RewardError as error:
            cause = error.__cause__
            raise RewardError(f"{error}, on example {shown(example)}") from cause

    async def _one(
        self,
        what: str,
        reward: RewardFunction,
        example: Mapping[str, Any],
        state: Any,
        nodes: Collection[str],
    ) -> Reward:
        try:
            with outside_runs():  # a judge asks its own model, whoever runs
                result = await self._result(reward, own_copy(example), state)
        except Exception as error:
            if isinstance(error, _TooSlow):
                problem = f"took longer than {self._timeout:g} seconds (reward_timeout)"
            else:
                problem = f"raised {type(error).__name__}: {error}"
            raise RewardError(f"{what} {problem}") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():  # the rollout ends, not the reward alone
                raise
            raise RewardError(f"{what} raised CancelledError: {error}") from error
        return as_reward(result, nodes, what)

    async def _result(self, reward: RewardFunction, example: Mapping[str, Any], state: Any) -> Any:
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        if _is_async(reward):
            try:
                return await _before(_asked(reward, example, state), self._timeout)
            finally:
                self._places.release()
        thread = self._workers.submit(reward, example, state)
        try:
            result = await _of_thread(thread, self._timeout)
            if inspect.isawaitable(result):
                return await _before(_awaited(result), deadline - loop.time())
            return result
        finally:
            self._places.release()
            if not thread.done():
                self._workers.abandon(thread)


class _TooSlow(Exception):
    """The reward function ran past its deadline."""


async def _of_thread(thread: Future[T], seconds: float) -> T:
    """What a thread comes to, waiting no longer than that; cheaper than `_before`."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await asyncio.wrap_future(thread)
    except TimeoutError:
        if limit.expired():
            raise _TooSlow from None
        raise  # the function's own


async def _before(work: Awaitable[Any], seconds: float) -> Any:
    """What `work` comes to, waiting no longer than that even where it ignores its cancelling."""
    future = asyncio.ensure_future(work)
    if isinstance(future, asyncio.Task):
        future.set_name(REWARD_TASK)
    future.add_done_callback(_seen)
    try:
        done, _ = await asyncio.wait([future], timeout=max(0.0, seconds))
    except asyncio.CancelledError:
        future.cancel()
        raise
    if not done:
        future.cancel()
        raise _TooSlow
    return future.result()


def _seen(future: asyncio.Future[Any]) -> None:
    """An error that comes after the deadline is nobody's: it is not logged as one not retrieved."""
    if not future.cancelled():
        future.exception()


def _is_async(reward: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(
        getattr(reward, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


async def _result_of(reward: RewardFunction, example: Mapping[str, Any], state: Any) -> Any:
    if _is_async(reward):
        return await _asked(reward, example, state)
    result = await asyncio.to_thread(reward, example, state)
    return await result if inspect.isawaitable(result) else result


async def _asked(reward: RewardFunction, example: Mapping[str, Any], state: Any) -> Any:
    """An async reward; called when its task starts, so one cancelled before that leaves nothing."""
    return await _awaited(reward(example, state))


async def _awaited(result: Any) -> Any:
    return await result


def as_reward(
    result: Any, nodes: Collection[str] | None = None, what: str = "the reward function"
) -> Reward:
    """A reward function's answer as a `Reward`.

    Args:
        result: what the function returned.
        nodes: names that a dict may use; None: any.
        what: whose answer it is, for messages.

    >>> as_reward({"actor": 1}, ["reasoner", "actor"])
    Reward(outcome=0.0, nodes={'actor': 1.0})
    """
    parts: Mapping[str, float] = {}
    if isinstance(result, Reward):
        outcome, own, parts = result.outcome, result.nodes, result.parts
    elif isinstance(result, Mapping):
        outcome, own = 0.0, result
    else:
        outcome, own = result, {}
    for name in own:
        if nodes is not None and name not in nodes:
            raise RewardError(
                f"{what} rewards {name!r}, which is no node of the graph; the nodes "
                f"are {', '.join(map(repr, sorted(nodes)))}"
            )
    return Reward(
        outcome=finite_number(outcome, f"{what} returned", "the outcome"),
        nodes={
            name: finite_number(value, f"{what} returned", repr(name))
            for name, value in own.items()
        },
        parts={name: float(value) for name, value in parts.items()},
    )


def finite_number(value: Any, said: str, of: str = "") -> float:
    """A value as a finite float.

    Args:
        value: what should be a number: also a bool, or a NumPy or torch scalar.
        said: who gave it, for the message: "the reward function returned".
        of: what it stands for, where it is one of several.

    Raises:
        RewardError: it is none.
    """
    what = f" for {of}" if of else ""
    accepted = "a reward is one finite number" + (", or a dict of node names to numbers" * bool(of))
    if value is None or isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        raise RewardError(f"{said} {reprlib.repr(value)}{what}; {accepted}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RewardError(f"{said} {reprlib.repr(value)}{what}; {accepted}") from error
    if not math.isfinite(number):
        raise RewardError(f"{said} {number}{what}; {accepted}")
    check_reward_size(number, f"{said}{what}")
    return number


def mean_parts(episodes: Iterable[Episode]) -> dict[str, dict[str, float]]:
    """`{"rewards": {name: mean}}` over the episodes that did not fail; empty without parts.

    >>> episodes = [Episode({}, (), reward_parts={"correct": x}) for x in (1.0, 0.0)]
    >>> mean_parts(episodes)
    {'rewards': {'correct': 0.5}}
    """
    values: dict[str, list[float]] = {}
    for episode in episodes:
        for name, value in episode.reward_parts.items() if episode.ok else ():
            values.setdefault(name, []).append(value)
    means = {name: math.fsum(own) / len(own) for name, own in values.items()}
    return {"rewards": means} if means else {}


def shown(example: Mapping[str, Any]) -> str:
    """An example, shortened for a message."""
    text = ", ".join(f"{key!r}: {reprlib.repr(value)}" for key, value in example.items())
    return "{" + (text if len(text) <= 300 else text[:297] + "...") + "}"
