"""The event loop of this process: every rollout, evaluation and comparison runs on it.

An app lives in one event loop, and so do the things that it or its reward keeps: HTTP clients,
semaphores, queues with a task behind them. Here they find the same loop in every iteration, in the
dry run before it and in a comparison after it. The loop runs in a thread of its own from its first
use until the process ends, so what the app left running there goes on between rollouts.

A loop that one callback blocks cannot keep anybody's deadline. Whoever waits for a rollout then
gives it up, with the line that blocks, and the next rollout gets a new loop.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from marft_graph.rollout.cancellation import Cancellation
from marft_graph.rollout.quiescence import Quiescence
from marft_graph.rollout.worker_threads import owned_by

_T = TypeVar("_T")
_BASE_THREADS = 32
"""Worker threads for what belongs to no rollout."""
_CANCEL_SECONDS = 4.0
_EXIT_SECONDS = 2.0
# How often it is looked whether the loop still turns.
_LOOK_SECONDS = 0.5

_LIBRARIES = ("<", *sysconfig.get_paths().values(), os.path.dirname(os.path.dirname(__file__)))
"""How the names of files begin that are not the user's."""
REWARD_TASK = "marft-reward"
"""Name of the tasks in which asynchronous rewards run."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """The event loop is inside one callback that does not end."""

    seconds: float
    is_reward: bool
    """Whether an asynchronous reward function blocks it."""
    where: str
    """File, line and function of the innermost frame that is the user's."""


class ProcessLoop:
    """An event loop in a daemon thread, with worker threads for synchronous code."""

    def __init__(self) -> None:
        self.quiescence = Quiescence(_BASE_THREADS)
        self._loop = self.quiescence.loop
        self._is_stopping = False
        self._is_given_up = False
        self._thread = threading.Thread(target=self._turn, name="marft-loop", daemon=True)
        self._thread.start()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on the loop, and hence cannot wait for it."""
        return threading.current_thread() is self._thread

    def run(
        self,
        work: Callable[[], Coroutine[Any, Any, _T]],
        *,
        threads: int,
        cancellation: Cancellation,
        on_blocked: Callable[[Blocked], Exception | None],
    ) -> _T:
        """What `work` comes to on the loop, in the caller's context.

        Args:
            work: makes the coroutine.
            threads: synchronous functions that it may run at once.
            cancellation: ends it where another thread asks for it.
            on_blocked: what to raise where something blocks the loop; None: it may go on.

        Raises:
            asyncio.CancelledError: it was cancelled.
        """
        owner = object()
        context = contextvars.copy_context()
        result: Future[_T] = Future()
        tasks: list[asyncio.Task[_T]] = []

        async def cancellable() -> _T:
            current = asyncio.current_task()
            assert current is not None  # a coroutine that runs is a task's
            with cancellation.reaches(current):
                return await work()

        def begin() -> None:
            with owned_by(owner):
                task = self._loop.create_task(cancellable())
            tasks.append(task)
            task.add_done_callback(lambda done: _hand_over(done, result))

        with self.quiescence.workers.room_for(owner, threads):
            self._loop.call_soon_threadsafe(begin, context=context)
            try:
                return self._outcome(result, on_blocked)
            except BaseException:
                if not result.done():  # Ctrl-C, or a loop that does not turn
                    self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
                    if not self._is_given_up:
                        wait([result], timeout=_CANCEL_SECONDS)
                raise

    def _outcome(self, result: Future[_T], on_blocked: Callable[[Blocked], Exception | None]) -> _T:
        while True:
            try:
                return result.result(timeout=_LOOK_SECONDS)
            except CancelledError:
                raise asyncio.CancelledError from None
            except TimeoutError:
                if result.done():  # the work's own
                    raise
            blocked = self._blocked()
            error = None if blocked is None else on_blocked(blocked)
            if error is not None:
                self._is_given_up = True
                _forget(self)
                raise error

    def _blocked(self) -> Blocked | None:
        seconds = self.quiescence.seconds_blocked
        if seconds < _LOOK_SECONDS:
            return None
        task = asyncio.current_task(self._loop)
        is_reward = task is not None and task.get_name() == REWARD_TASK
        return Blocked(seconds, is_reward, _where(self._thread))

    def _turn(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._is_stopping:
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                continue  # raised by the app; its task has it too, and the loop goes on for others

    def stop(self) -> None:
        """End all tasks and the thread; what the app opened on the loop may be closed later."""

        async def end() -> None:
            this_task = asyncio.current_task()
            tasks = [task for task in asyncio.all_tasks() if task is not this_task]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_EXIT_SECONDS / 2)
            await self._loop.shutdown_asyncgens()

        def begin() -> None:
            self._loop.create_task(end()).add_done_callback(lambda _: finish())

        def finish() -> None:
            self._is_stopping = True
            self._loop.stop()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(begin)
        self._thread.join(_EXIT_SECONDS)


def _hand_over(task: asyncio.Task[_T], result: Future[_T]) -> None:
    if task.cancelled():
        result.cancel()
        return
    error = task.exception()
    if error is not None:
        result.set_exception(error)
    else:
        result.set_result(task.result())


def _where(thread: threading.Thread) -> str:
    """The innermost line that is no library's."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = traceback.extract_stack(frame) if frame is not None else []
    users = [f for f in stack if not f.filename.startswith(_LIBRARIES)]
    return f"{users[-1].filename}:{users[-1].lineno}, in {users[-1].name}" if users else "?"


_home: ProcessLoop | None = None
_lock = threading.Lock()


@contextlib.contextmanager
def process_loop() -> Iterator[ProcessLoop]:
    """The loop of this process; on its own thread, a new one for what runs inside of a rollout."""
    global _home
    with _lock:
        home = _home = _home or ProcessLoop()
    if not home.is_own_thread:
        yield home
        return
    inner = ProcessLoop()
    try:
        yield inner
    finally:
        inner.stop()


def _forget(loop: ProcessLoop) -> None:
    """Let the next rollout have a new loop."""
    global _home
    with _lock:
        if _home is loop:
            _home = None


def _after_fork() -> None:
    """A child process has none of its parent's threads."""
    global _home, _lock
    _home, _lock = None, threading.Lock()


@atexit.register
def _stop_home() -> None:
    loop = _home
    if loop is not None:
        loop.stop()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
