"""Determinism: when may an engine decode, so that every run composes the same batches?

When nothing in the app can submit another call before it gets an answer: the event loop waits for
the outside, and every worker thread that runs user code waits for the engine. This module owns the
event loop's selector, hence knows both; of models and graphs it knows nothing.

Ordinary apps therefore batch identically in every run with one seed. A blocking tool or a foreign
thread cannot be seen through; the gate then opens after a short patience, so nothing deadlocks.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from marft_graph.rollout.worker_threads import WorkerThreads, WorkItem

_POLL_SECONDS = 0.002
_FOREIGN_SETTLE_SECONDS = 0.015
# A thread that computes is waited for until it has used so much processor time, or so much time by
# the clock where other processes keep it from the processor.
_BUSY_LIMIT_SECONDS = 1.0
_STARVED_LIMIT_SECONDS = 20.0


class EventLoop(asyncio.SelectorEventLoop):
    """An event loop that may outlive what the app opened on it, without a word at the end."""

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be half gone
            self.close()


class Quiescence:
    """An event loop with its worker threads, and the gate that watches them.

    Args:
        max_workers: worker threads for synchronous nodes, beside those that rollouts ask for.
        patience: seconds without any progress after which the gate opens all the same.
    """

    def __init__(self, max_workers: int, *, patience: float = 0.05) -> None:
        self._patience = patience
        self._changed = threading.Condition(threading.RLock())
        self._version = 0
        self._is_idle = False
        self._loop_is_slow = False
        self._loop_thread: int | None = None
        self._probe_is_pending = False
        self._loop_item = WorkItem(Future(), lambda: None)
        self._items: dict[int, WorkItem] = {}
        self._foreign: list[Future[Any]] = []
        self._blocked = 0
        self.turned = time.monotonic()
        """When the loop last came to its selector, by the monotonic clock."""
        self.loop: asyncio.AbstractEventLoop = EventLoop(_IdleSelector(self))
        self.workers = WorkerThreads(self, max_workers)
        self.loop.set_default_executor(self.workers)
        self._is_open = True

    # What the selector, the workers and the interception report

    def loop_is_idle(self, is_idle: bool) -> None:
        """The event loop begins or ends its wait for the outside."""
        with self._changed:
            self._is_idle = is_idle
            self._loop_thread = threading.get_ident()
            self._loop_item.native = threading.get_native_id()
            self._loop_is_slow = self._loop_is_slow and not is_idle
            self._version += not is_idle
            self._changed.notify_all()

    def item_started(self, item: WorkItem) -> None:
        """A worker thread begins an item."""
        with self._changed:
            item.thread, item.native = threading.get_ident(), threading.get_native_id()
            self._items[item.thread] = item
            self._version += 1

    def item_abandoned(self, item: WorkItem) -> None:
        """Nobody waits for an item any more, though its thread still runs it."""
        with self._changed:
            if item.thread is not None and self._items.get(item.thread) is item:
                del self._items[item.thread]
            self._changed.notify_all()

    @property
    def seconds_blocked(self) -> float:
        """How long the event loop has been inside one callback that waits for no model call."""
        with self._changed:
            if self._is_idle or self._loop_item.is_waiting:
                return 0.0
            return time.monotonic() - self.turned

    def item_finished(self) -> None:
        """A worker thread has delivered its item's result."""
        with self._changed:
            self._items.pop(threading.get_ident(), None)
            self._version += 1
            # The result's callback stands in the loop's queue, but the loop may still sleep.
            self._probe()
            self._changed.notify_all()

    @contextmanager
    def blocked_on(self, future: Future[Any]) -> Iterator[None]:
        """While this thread waits for `future`, it does not count as running."""
        thread = threading.get_ident()
        with self._changed:
            item = self._loop_item if thread == self._loop_thread else self._items.get(thread)
            if item is None:  # a thread that the app made itself
                self._foreign.append(future)
            else:
                item.awaited, item.is_slow = future, False
                self._blocked += 1
            self._version += 1
            if self._blocked >= len(self._items):
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                if item is None:
                    self._foreign.remove(future)
                else:
                    item.awaited = None
                    self._blocked -= 1
                self._version += 1

    # The gate

    def wait(self) -> None:
        """Return once the app is quiet, or has made no progress for the patience."""
        started = last_progress = time.monotonic()
        seen = self._progress()
        first = dict(seen[1])
        self._probe()
        while True:
            with self._changed:
                if not self._is_open or self._is_quiet():
                    return
                self._changed.wait(_POLL_SECONDS)
                # Worker threads may be waiting for threads of the app that wait for the engine
                has_foreign = any(not future.done() for future in self._foreign)
            now, before, seen = time.monotonic(), seen, self._progress()
            if seen != before:
                last_progress = now
            if has_foreign and now - last_progress > _FOREIGN_SETTLE_SECONDS:
                return
            if now - last_progress > self._patience and (
                self._is_starved()
                or (now - started < _BUSY_LIMIT_SECONDS and _holder_may_be_starved())
            ):
                last_progress = now
            used = sum(now_used - first.setdefault(t, now_used) for t, now_used in seen[1].items())
            if (
                now - last_progress > self._patience
                or used > _BUSY_LIMIT_SECONDS
                or now - started > _STARVED_LIMIT_SECONDS
            ):
                self._mark_slow()
                return

    def _probe(self) -> None:
        """Ask the loop to run whatever is scheduled by now, before it may count as idle.

        The engine has just resolved futures: their callbacks stand in the loop's queue, but the
        loop may not have woken yet. A callback of our own comes after them.
        """
        with self._changed:
            if not self._is_open or self._probe_is_pending or self._loop_is_slow:
                return
            self._probe_is_pending = True
        try:
            self.loop.call_soon_threadsafe(self._probed)
        except RuntimeError:  # the loop was closed meanwhile
            self._probed()

    def _probed(self) -> None:
        with self._changed:
            self._probe_is_pending = False
            self._is_idle = False

    def _is_quiet(self) -> bool:
        loop_is_quiet = (
            self._loop_is_slow
            or self._loop_item.is_waiting
            or (self._is_idle and not self._probe_is_pending)
        )
        items_are_quiet = all(item.is_slow or item.is_waiting for item in self._items.values())
        foreign_are_quiet = not any(future.done() for future in self._foreign)
        return (
            loop_is_quiet
            and items_are_quiet
            and foreign_are_quiet
            and not self.workers.can_start_more
        )

    def _progress(self) -> tuple[int, dict[int, float]]:
        """Changes whenever the app does anything: reports to this object, or processor time.

        The latter in seconds by thread.
        """
        with self._changed:
            threads = [thread for thread, item in self._items.items() if not item.is_slow]
            if self._is_open and self._loop_thread is not None:
                threads.append(self._loop_thread)
            return self._version, {thread: _processor_seconds(thread) for thread in threads}

    def _is_starved(self) -> bool:
        """Whether a thread that is waited for could go on, if it were given a processor."""
        with self._changed:
            watched = [item.native for item in self._items.values() if not item.is_slow]
            if self._is_open and not self._loop_is_slow:
                watched.append(self._loop_item.native)
        return any(_is_runnable(native) for native in watched if native is not None)

    def _mark_slow(self) -> None:
        """Do not wait again for what is busy now, until it reports something new."""
        with self._changed:
            for item in self._items.values():
                item.is_slow = item.is_slow or not item.is_waiting
            self._loop_is_slow = not (self._is_idle or self._loop_item.is_waiting)

    def close(self) -> None:
        """Open the gate for good, let the worker threads go and close the loop."""
        with self._changed:
            self._is_open = False
            self._items.clear()
            self._changed.notify_all()
        self.workers.shutdown(wait=False, cancel_futures=True)
        self.loop.close()


class _IdleSelector(selectors.BaseSelector):
    """The platform's selector; a `select` that may sleep means that the loop has nothing to do."""

    def __init__(self, quiescence: Quiescence) -> None:
        self._inner = selectors.DefaultSelector()
        self._quiescence = quiescence

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._quiescence.turned = time.monotonic()
        if timeout is not None and timeout <= 0:
            return self._inner.select(timeout)
        self._quiescence.loop_is_idle(True)
        try:
            return self._inner.select(timeout)
        finally:
            self._quiescence.turned = time.monotonic()
            self._quiescence.loop_is_idle(False)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()


def _processor_seconds(thread: int) -> float:
    """Processor time of a live thread; 0 where the platform cannot tell."""
    if sys.platform == "linux":
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return 0.0


def _holder_may_be_starved() -> bool:
    """Whether any other thread of this process waits for a processor.

    It may hold the interpreter's lock, for which those that are waited for sleep.
    """
    own = threading.get_native_id()
    try:
        threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    except OSError:
        return False
    return any(_is_runnable(native) for native in threads if native != own)


def _is_runnable(native: int) -> bool:
    """Whether a thread of this process runs or waits for a processor; False where unknown."""
    try:
        stat = Path(f"/proc/self/task/{native}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "R"
