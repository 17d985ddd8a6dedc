"""Python's garbage collector while many episodes run at once.

At its usual threshold the collector looks through all live objects again and again, and an episode
has thousands: it took 40 % of a rollout's processor time. Knows nothing of graphs.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (100_000, 20, 50)
_lock = threading.Lock()
_users = 0
_usual: tuple[int, int, int] = (0, 0, 0)


@contextmanager
def fewer_collections() -> Iterator[None]:
    """Collect every 100,000 new objects; the process's own thresholds come back with the last user.

    Does nothing where the process has collection off or rarer already.
    """
    global _users, _usual
    with _lock:
        _users += 1
        if _users == 1:
            _usual = gc.get_threshold()
            if 0 < _usual[0] < _THRESHOLDS[0]:
                gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                gc.set_threshold(*_usual)
