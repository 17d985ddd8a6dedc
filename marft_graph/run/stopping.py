"""SIGINT and SIGTERM while a run goes on: the first one asks, the second one stops at once.

Who asked has the time of a deadline to see the running step finished; then it is interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop. `signum` says how; the exit code of a process is 128 + `signum`."""

    def __init__(self, signum: int, *, is_first: bool) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.is_first = is_first
        """Whether there is time to save the run: no second signal has come."""


class StopRequest:
    """What the signals have asked for so far."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._timer: threading.Timer | None = None
        self._is_late = False
        self._is_over = False
        self._lock = threading.Lock()

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    def check(self, *, is_asked: bool = False) -> None:
        """Raise `Stopped` where a signal has come, or another process has been asked to stop."""
        if self.signum is not None or is_asked:
            raise Stopped(self.signum or signal.SIGTERM, is_first=True)

    def met(self) -> None:
        """The step is finished: only a second signal interrupts what is written now."""
        with self._lock:
            self._is_over = True
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, signum: int, frame: FrameType | None, timeout: float) -> None:
        if self.signum is None:
            self.signum = signum
            logger.warning(
                "%s: finishing this step (at most %g s), then writing a checkpoint; "
                "a second signal stops at once",
                signal.Signals(signum).name,
                timeout,
            )
            self._timer = threading.Timer(timeout, self._expire)
            self._timer.daemon = True
            self._timer.start()
            return
        is_late, self._is_late = self._is_late, False
        raise Stopped(self.signum if is_late else signum, is_first=is_late)

    def _expire(self) -> None:
        """Interrupt the main thread, wherever it is."""
        with self._lock:
            if not self._is_over:
                self._is_late = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


@contextlib.contextmanager
def stop_requests(timeout: float) -> Iterator[StopRequest]:
    """What SIGINT and SIGTERM ask for; a second one, or `timeout` seconds, raise `Stopped`.

    Outside the main thread, where signals cannot be caught, nothing is ever asked.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {
        number: signal.signal(number, lambda n, frame: request._handle(n, frame, timeout))
        for number in STOP_SIGNALS
    }
    try:
        yield request
    finally:
        request.met()
        for number, handler in previous.items():
            signal.signal(number, handler)
