"""Worker threads for synchronous nodes, tools and rewards, some of which may never return.

The threads are daemons: nothing that hangs in one keeps the process alive. What a rollout that is
over left running counts no longer: other work gets a thread in its place.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from marft_graph.rollout.scopes import carried

_T = TypeVar("_T")
_MOST_THREADS = 1024
# A thread without work ends after this.
_IDLE_SECONDS = 5.0

_owners: ContextVar[tuple[object, ...]] = ContextVar("marft_owners", default=())
"""Whose work the running code is: a rollout's, an episode's."""


class WorkItem:
    """A function given to the worker threads, and the answer that it is waiting for."""

    def __init__(self, future: Future[Any], run: Callable[[], Any]) -> None:
        self.future = future
        self.run = run
        self.owners = _owners.get()
        self.thread: int | None = None
        self.native: int | None = None
        self.awaited: Future[Any] | None = None
        self.is_slow = False

    @property
    def is_waiting(self) -> bool:
        """Whether the item waits for an answer that is not there yet."""
        return self.awaited is not None and not self.awaited.done()


class Watcher(Protocol):
    """Who is told what the threads do."""

    def item_started(self, item: WorkItem) -> None:
        """A worker thread begins an item."""

    def item_finished(self) -> None:
        """A worker thread has delivered its item's result."""

    def item_abandoned(self, item: WorkItem) -> None:
        """Nobody waits for an item any more, though its thread still runs it."""


_pools: weakref.WeakSet[WorkerThreads] = weakref.WeakSet()
"""One that is closed is kept alive by its threads that are not free."""


class WorkerThreads(ThreadPoolExecutor):
    """Daemon worker threads that report to a watcher.

    The standard pool joins its threads when the interpreter exits; a tool that hangs would keep the
    process alive for ever. It is a `ThreadPoolExecutor` only because asyncio insists on one.

    Args:
        watcher: is told what the threads do.
        max_workers: functions that run at once, beside those of owners (see `room_for`).
    """

    def __init__(self, watcher: Watcher, max_workers: int) -> None:
        super().__init__(max_workers=max_workers)
        self._watcher = watcher
        self._base = max_workers
        self._wanted: dict[object, int] = {}
        self._queue: deque[WorkItem] = deque()
        self._ready = threading.Condition()
        self._running: set[WorkItem] = set()
        self._abandoned: set[WorkItem] = set()
        self._threads_alive = 0
        self._is_closed = False
        _pools.add(self)

    @property
    def abandoned(self) -> int:
        """Threads that run a function nobody waits for any more."""
        return len(self._abandoned)

    @property
    def can_start_more(self) -> bool:
        """Whether an item waits for a thread and will get one."""
        return bool(self._queue) and len(self._running) < self._limit

    @property
    def _limit(self) -> int:
        """Functions that run at once; abandoned ones do not count."""
        return max(self._base, min(_MOST_THREADS, self._base + sum(self._wanted.values())))

    @contextmanager
    def room_for(self, owner: object, threads: int) -> Iterator[None]:
        """While the context lasts, so many more functions run at once; it ends with `give_up`."""
        with self._ready:
            self._wanted[owner] = threads
        try:
            yield
        finally:
            with self._ready:
                del self._wanted[owner]
            self.give_up(owner)

    def give_up(self, owner: object) -> None:
        """Drop what an owner (a rollout, an episode) has submitted, or abandon it where it runs."""
        with self._ready:
            dropped = [item for item in self._queue if owner in item.owners]
            self._queue = deque(item for item in self._queue if owner not in item.owners)
            running = [item for item in self._running if owner in item.owners]
        for item in dropped:
            item.future.cancel()
        for item in running:
            self.abandon(item.future)

    def abandon(self, future: Future[Any]) -> None:
        """Count a function no longer: whoever waited for it has given it up."""
        with self._ready:
            items = [item for item in self._running if item.future is future]
            for item in items:
                self._running.remove(item)
                self._abandoned.add(item)
            self._spawn()
        for item in items:
            self._watcher.item_abandoned(item)

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Queue a function; see `concurrent.futures.Executor.submit`."""
        future: Future[_T] = Future()
        run = carried(fn)  # as the standard pools do while a run is active
        item = WorkItem(future, lambda: run(*args, **kwargs))
        with self._ready:
            if self._is_closed:
                raise RuntimeError("cannot schedule new functions after shutdown")
            self._queue.append(item)
            self._spawn()
            self._ready.notify()
        return future

    def _spawn(self) -> None:
        """Start a thread, where the others are too few for what waits."""
        alive = self._threads_alive - len(self._abandoned)
        if alive < min(self._limit, len(self._running) + len(self._queue)):
            self._threads_alive += 1
            threading.Thread(target=self._work, name="marft-worker", daemon=True).start()

    def _work(self) -> None:
        while self._run_next():
            pass  # a thread that waits for work keeps nothing of what it has done

    def _run_next(self) -> bool:
        """Wait for an item and run it; False: there is none, and the thread ends."""
        item = self._next()
        if item is None:
            return False
        try:
            self._run(item)
        finally:
            self._watcher.item_finished()
            with self._ready:
                self._running.discard(item)
                self._abandoned.discard(item)
                self._ready.notify()
        return True

    def _next(self) -> WorkItem | None:
        """The item that this thread shall run; None: there is none, and the thread ends."""
        with self._ready:
            is_idle = False
            while not self.can_start_more:
                if not self._queue and (is_idle or self._is_closed):
                    self._threads_alive -= 1
                    return None
                is_idle = not self._ready.wait(_IDLE_SECONDS)
            item = self._queue[0]
            self._watcher.item_started(item)
            self._queue.popleft()
            self._running.add(item)
            return item

    @staticmethod
    def _run(item: WorkItem) -> None:
        if not item.future.set_running_or_notify_cancel():
            return
        try:
            result = item.run()
        except StopIteration as stop:  # asyncio's futures do not take one: nobody would be told
            error = RuntimeError("StopIteration, as of next() on what has no more items")
            error.__cause__ = stop
            item.future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - delivered to whoever awaits the item
            item.future.set_exception(error)
        else:
            item.future.set_result(result)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; threads end once they are free. Hung threads are not waited for."""
        with self._ready:
            self._is_closed = True
            dropped = list(self._queue) if cancel_futures else []
            if cancel_futures:
                self._queue.clear()
            running = list(self._running)
            self._ready.notify_all()
        for item in dropped:
            item.future.cancel()
        if cancel_futures:
            for item in running:
                self.abandon(item.future)


@contextmanager
def owned_by(owner: object) -> Iterator[None]:
    """What is submitted in this context belongs to `owner`."""
    token = _owners.set((*_owners.get(), owner))
    try:
        yield
    finally:
        _owners.reset(token)


def hung_threads() -> int:
    """Worker threads whose node, tool or reward does not return, though nobody waits for it."""
    return sum(pool.abandoned for pool in list(_pools))
