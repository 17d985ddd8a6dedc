"""Asking a rollout that runs in another thread to end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Cancellation:
    """A request that rollouts can be given, to end them from another thread.

    A rollout that begins once it is asked for ends at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_asked = False
        self._cancel: Callable[[], object] | None = None

    def ask(self) -> None:
        """End the rollout that runs, and every later one; returns without waiting for it."""
        with self._lock:
            self._is_asked = True
            if self._cancel is not None:
                self._cancel()

    @contextmanager
    def reaches(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """While a task runs on its loop, it is what is cancelled."""
        loop = task.get_loop()
        with self.calls(lambda: loop.call_soon_threadsafe(task.cancel)):
            yield

    @contextmanager
    def calls(self, cancel: Callable[[], object]) -> Iterator[None]:
        """While the context lasts, `cancel` is called when it is asked for, or has been."""
        with self._lock:
            self._cancel = cancel
            if self._is_asked:
                cancel()
        try:
            yield
        finally:
            with self._lock:
                self._cancel = None
