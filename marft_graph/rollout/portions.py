"""A rollout in portions, and the crew that works through them: who has which, and who was lost.

Whatever ends a worker, its portion goes to another one, and an answer counts once. What a worker
is (an actor of Ray, or a test's own) and what it does with a portion is its own business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from marft_graph.errors import EngineError
from marft_graph.rollout.cancellation import Cancellation

logger = logging.getLogger(__name__)

W = TypeVar("W", contravariant=True)
T = TypeVar("T")
_TRIES = 3
"""A portion that this many workers were lost with is not given to another one."""
_SPARES = 2
"""Workers that are started in a rollout for those that are lost in it, by worker of the crew."""


class WorkerLost(EngineError):
    """A worker died, or its machine did; its work can be done by another one."""


class Worker(Protocol[W, T]):
    """Somebody who can be given one portion at a time."""

    def start(self) -> Future[None]:
        """Get ready for work; called once."""
        ...

    def run(self, work: W) -> Future[list[T]]:
        """Do a portion of the work; a future that fails with `WorkerLost` blames the worker."""
        ...

    def stop(self) -> None:
        """End now, whatever it is doing."""
        ...


def portions(count: int, workers: int) -> list[range]:
    """Divide so many examples into neighbours: each is half of a worker's share of what is left.

    The first ones are large, as examples that run together share batches and waiting times, the
    last ones small, so that the workers end at about the same time. It depends on nothing else:
    whoever runs a portion, its batches are the same.

    >>> portions(8, 2)
    [range(0, 2), range(2, 4), range(4, 5), range(5, 6), range(6, 7), range(7, 8)]
    """
    found, start = [], 0
    while start < count:
        size = max(1, -((start - count) // (2 * workers)))
        found.append(range(start, start + size))
        start += size
    return found


@dataclass(eq=False, slots=True)
class _Member(Generic[W, T]):
    """A worker, and what it does until when."""

    worker: Worker[W, T]
    starting: Future[None] | None
    due: float
    running: Future[list[T]] | None = None
    number: int | None = None
    """Of its portion."""

    @property
    def waits_for(self) -> Future[None] | Future[list[T]] | None:
        """What it has not answered yet; None: it has nothing to do."""
        return self.starting or self.running

    @property
    def ended(self) -> bool:
        """Whether it has an answer."""
        return self.waits_for is not None and self.waits_for.done()


class Crew(Generic[W, T]):
    """Workers that share portions; those that are lost are replaced.

    Args:
        hire: makes a worker, not started yet.
        size: workers that there should be.
        patience: seconds that a worker may take to start.
    """

    def __init__(self, hire: Callable[[], Worker[W, T]], size: int, *, patience: float) -> None:
        self._hire = hire
        self._size = size
        self._patience = patience
        self._members: list[_Member[W, T]] = []
        self._spares = 0
        self.lost = 0
        """Workers that were lost so far."""

    def run(
        self,
        parts: Sequence[W],
        deadline: Callable[[W], float],
        cancellation: Cancellation | None = None,
    ) -> list[T]:
        """What the workers make of all portions, in the portions' order.

        Args:
            parts: the portions, whose texts say what they are.
            deadline: seconds that a portion may take, before its worker counts as lost.
            cancellation: ends the work where another thread asks for it.

        Raises:
            asyncio.CancelledError: it was asked for; workers that were busy are stopped.
            EngineError: no worker is left, or a portion was the end of several ones.
            MarftError: a worker's work failed; the others are stopped.
        """
        is_cancelled: Future[None] = Future()

        def cancel() -> None:
            if not is_cancelled.done():
                is_cancelled.set_result(None)

        with (cancellation or Cancellation()).calls(cancel):
            return self._done(parts, deadline, is_cancelled)

    def stop(self) -> None:
        """End all workers."""
        self._stop(list(self._members))

    def _done(
        self, parts: Sequence[W], deadline: Callable[[W], float], is_cancelled: Future[None]
    ) -> list[T]:
        queue = deque(range(len(parts)))
        made: dict[int, list[T]] = {}
        tries: Counter[int] = Counter()
        self._spares = _SPARES * self._size
        try:
            while len(self._members) < self._size:
                self._add()
            while len(made) < len(parts):
                self._hand_out(queue, parts, deadline)
                for member, reason in self._events(made, is_cancelled):
                    self._lose(member, reason)
                    if member.number is not None:
                        queue.appendleft(member.number)
                        tries[member.number] += 1
                        _check_tries(parts[member.number], tries[member.number], reason)
        except BaseException:
            self._stop([member for member in self._members if member.waits_for is not None])
            raise
        return [item for number in range(len(parts)) for item in made[number]]

    def _add(self) -> None:
        worker = self._hire()
        self._members.append(_Member(worker, worker.start(), time.monotonic() + self._patience))

    def _hand_out(
        self, queue: deque[int], parts: Sequence[W], deadline: Callable[[W], float]
    ) -> None:
        """Give every worker without work a portion."""
        for member in self._members:
            if queue and member.waits_for is None:
                member.number = queue.popleft()
                part = parts[member.number]
                member.due = time.monotonic() + deadline(part)
                member.running = member.worker.run(part)

    def _events(
        self, made: dict[int, list[T]], is_cancelled: Future[None]
    ) -> list[tuple[_Member[W, T], str]]:
        """Wait for an answer or a deadline; take the answers; tell which workers are lost, and why.

        Raises:
            MarftError: a worker's work failed.
            asyncio.CancelledError: nobody wants the answers any more.
        """
        busy = [member for member in self._members if member.waits_for is not None]
        first = min(member.due for member in busy)
        waiting: list[Future[Any]] = [is_cancelled]
        waiting += [member.waits_for for member in busy if member.waits_for is not None]
        patience = max(0.0, first - time.monotonic())
        wait(waiting, timeout=patience, return_when=FIRST_COMPLETED)
        if is_cancelled.done():
            raise asyncio.CancelledError
        lost = []
        for member in busy:
            if not member.ended:
                if time.monotonic() >= member.due:
                    lost.append((member, _overdue(member)))
                continue
            try:
                if member.starting is not None:
                    member.starting = member.starting.result()
                elif member.running is not None and member.number is not None:
                    made[member.number] = member.running.result()
                    member.running = member.number = None
            except WorkerLost as error:
                lost.append((member, str(error)))
        return lost

    def _lose(self, member: _Member[W, T], reason: str) -> None:
        """Take a worker out, say so, and hire another one.

        Raises:
            EngineError: there is none left, and there have been enough.
        """
        self._stop([member])
        self.lost += 1
        if self._spares > 0:
            self._spares -= 1
            self._add()
        logger.warning(
            "a rollout worker was lost: %s. What it had to do goes to another one (of %d)",
            reason,
            len(self._members),
        )
        if not self._members:
            raise EngineError(
                f"no rollout worker is left, after {_SPARES * self._size} new ones in this "
                f"rollout; the last one: {reason}"
            )

    def _stop(self, members: Sequence[_Member[W, T]]) -> None:
        for member in members:
            self._members.remove(member)
            member.worker.stop()


def _overdue(member: _Member[W, T]) -> str:
    if member.starting is not None:
        return "it did not start in time (engine_patience)"
    return "it took longer with its episodes than their deadlines allow"


def _check_tries(part: object, tries: int, reason: str) -> None:
    if tries >= _TRIES:
        raise EngineError(f"{tries} rollout workers were lost with {part}; the last one: {reason}")
