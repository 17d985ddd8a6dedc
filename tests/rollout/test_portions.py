"""Portions of a rollout, shared by a crew whose workers are threads that can be made to fail."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from marft_graph.errors import EngineError, RewardError
from marft_graph.rollout.cancellation import Cancellation
from marft_graph.rollout.portions import Crew, WorkerLost, portions

PARTS = portions(20, 2)
Step = Callable[["Hand", range], list[int]]


@dataclass
class Yard:
    """Where the workers of a test are hired, and what they do."""

    step: Step
    start: Callable[[Hand], None] = lambda hand: None
    hands: list[Hand] = field(default_factory=list)
    done: Counter[range] = field(default_factory=Counter)

    def hire(self) -> Hand:
        self.hands.append(Hand(self, len(self.hands)))
        return self.hands[-1]

    def crew(self, size: int = 2, patience: float = 30.0) -> Crew[range, int]:
        return Crew(self.hire, size, patience=patience)


@dataclass(eq=False)
class Hand:
    """A worker: a thread for each thing that it is told to do."""

    yard: Yard
    number: int
    stopped: threading.Event = field(default_factory=threading.Event)

    def start(self) -> Future[None]:
        return self._do(lambda: self.yard.start(self))

    def run(self, work: range) -> Future[list[int]]:
        def step() -> list[int]:
            found = self.yard.step(self, work)
            self.yard.done[work] += 1
            return found

        return self._do(step)

    def stop(self) -> None:
        self.stopped.set()

    def _do(self, work: Callable[[], object]) -> Future:
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - for the crew
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


def numbers(hand: Hand, work: range) -> list[int]:
    return list(work)


def long(work: range) -> float:
    return 60.0


@pytest.fixture
def yards() -> Iterator[Callable[..., Yard]]:
    made: list[Yard] = []

    def make(step: Step = numbers, **more) -> Yard:
        made.append(Yard(step, **more))
        return made[-1]

    yield make
    for hand in (hand for yard in made for hand in yard.hands):
        hand.stop()


@pytest.mark.parametrize(("count", "workers"), [*itertools.product([1, 2, 7, 64, 1000], [1, 2, 5])])
def test_portions_are_neighbours_that_cover_everything_once_and_get_smaller(count, workers):
    parts = portions(count, workers)
    assert [i for part in parts for i in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert sizes[0] == -(-count // (2 * workers))


def test_results_come_in_order_though_the_first_portion_is_the_last_to_end(yards):
    others = threading.Semaphore(0)

    def step(hand: Hand, work: range) -> list[int]:
        if work is PARTS[0]:
            for _ in PARTS[1:]:
                assert others.acquire(timeout=30)
        else:
            others.release()
        return list(work)

    yard = yards(step)
    assert yard.crew().run(PARTS, long) == list(range(20))
    assert max(yard.done.values()) == 1


def test_a_slow_portion_holds_one_worker_and_the_others_do_the_rest(yards):
    """The slow one ends only when everything else is done: nobody may wait for it."""
    rest = threading.Semaphore(0)
    by: dict[range, int] = {}

    def step(hand: Hand, work: range) -> list[int]:
        by[work] = hand.number
        if work is PARTS[1]:
            for _ in PARTS[1:]:
                assert rest.acquire(timeout=30)
        else:
            rest.release()
        return list(work)

    assert yards(step).crew().run(PARTS, long) == list(range(20))
    slow = by.pop(PARTS[1])
    assert set(by.values()) == {1 - slow}


def test_what_a_lost_worker_had_is_done_by_another_and_counts_once(yards, caplog):
    def step(hand: Hand, work: range) -> list[int]:
        if work is PARTS[2] and hand.number < 2:
            raise WorkerLost("its process was killed")
        return list(work)

    yard = yards(step)
    crew = yard.crew()
    with caplog.at_level(logging.WARNING):
        assert crew.run(PARTS, long) == list(range(20))
    assert set(yard.done.values()) == {1}
    lost = [hand.number for hand in yard.hands if hand.stopped.is_set()]
    assert crew.lost == len(lost) == len(yard.hands) - 2 > 0
    assert "a rollout worker was lost: its process was killed" in caplog.text


def test_a_worker_that_takes_too_long_is_stopped_and_its_late_answer_is_not_taken(yards):
    late = threading.Event()
    slow: list[Hand] = []

    def step(hand: Hand, work: range) -> list[int]:
        if work is PARTS[0] and not slow:
            slow.append(hand)
            assert hand.stopped.wait(30)
            late.set()
            return [-1] * len(work)
        if work is PARTS[-1]:
            assert late.wait(30)
        return list(work)

    yard = yards(step)
    crew = yard.crew()
    limits = {PARTS[0]: 0.2}
    found = crew.run(PARTS, lambda work: limits.pop(work, 60.0))
    assert found == list(range(20))
    assert crew.lost == 1


def test_work_that_ends_every_worker_stops_the_rollout_and_is_named(yards):
    def step(hand: Hand, work: range) -> list[int]:
        if work is PARTS[3]:
            raise WorkerLost("killed for its memory")
        return list(work)

    yard = yards(step)
    told = rf"3 rollout workers were lost with range\({PARTS[3].start}.*killed for its memory"
    with pytest.raises(EngineError, match=told):
        yard.crew(size=3).run(PARTS, long)


def test_when_nobody_can_be_started_the_error_has_the_reason_of_the_last(yards):
    def start(hand: Hand) -> None:
        raise WorkerLost(f"no machine for {hand.number}")

    yard = yards(start=start)
    crew = yard.crew()
    with pytest.raises(EngineError, match=r"no rollout worker is left, .* no machine for 5"):
        crew.run(PARTS, long)
    assert crew.lost == len(yard.hands) == 6  # two, and two more for each


def test_a_worker_that_does_not_start_in_time_is_done_without(yards, caplog):
    def start(hand: Hand) -> None:
        if hand.number == 1:
            hand.stopped.wait(30)

    def step(hand: Hand, work: range) -> list[int]:
        time.sleep(0.05)
        return list(work)

    yard = yards(step, start=start)
    crew = yard.crew(patience=0.15)
    assert crew.run(PARTS, long) == list(range(20))
    assert crew.lost == 1
    assert "did not start in time (engine_patience)" in caplog.text


def test_an_error_of_the_work_is_raised_as_it_is_and_stops_who_was_busy(yards):
    def step(hand: Hand, work: range) -> list[int]:
        if work is PARTS[0]:
            raise RewardError("the reward function raised KeyError: 'a'")
        hand.stopped.wait(30)
        return list(work)

    yard = yards(step)
    crew = yard.crew()
    with pytest.raises(RewardError, match="KeyError: 'a'"):
        crew.run(PARTS, long)
    assert all(hand.stopped.is_set() for hand in yard.hands)
    assert crew.lost == 0
    yard.step = numbers
    assert crew.run(PARTS, long) == list(range(20))


def test_workers_stay_from_one_rollout_to_the_next_until_they_are_stopped(yards):
    yard = yards()
    crew = yard.crew()
    for _ in range(3):
        crew.run(PARTS, long)
    assert len(yard.hands) == 2
    crew.stop()
    assert all(hand.stopped.is_set() for hand in yard.hands)


def test_a_rollout_that_is_cancelled_ends_at_once_and_the_next_one_has_new_workers(yards):
    cancellation = Cancellation()
    both_busy = threading.Barrier(2, action=cancellation.ask)

    def hold(hand: Hand, work: range) -> list[int]:
        if hand.number < 2:
            both_busy.wait(10)
            assert hand.stopped.wait(30)
        return list(work)

    yard = yards(hold)
    crew = yard.crew()
    with pytest.raises(asyncio.CancelledError):
        crew.run(PARTS, long, cancellation)
    assert [hand.stopped.is_set() for hand in yard.hands] == [True, True]
    with pytest.raises(asyncio.CancelledError):  # it stays asked for
        crew.run(PARTS, long, cancellation)
    assert crew.run(PARTS, long) == list(range(20))
    assert crew.lost == 0
    crew.stop()
