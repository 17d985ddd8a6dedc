"""One run folder, one process: a lock that the operating system lets go when its holder dies.

The lock is on the open file, not in its text: a file left by a process that was killed locks
nothing. The text only says who holds it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from marft_graph.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

LOCK = "run.lock"


class RunLock:
    """Keeps every other process, and every other Trainer of this one, out of a run folder."""

    def __init__(self) -> None:
        self._handle: int | None = None

    def acquire(self, run_dir: str | Path) -> None:
        """Take the folder, which is made where needed; nothing happens where it is ours already.

        Raises:
            CheckpointError: another run has it, which the message names by process and host; or
                the folder cannot be written.
        """
        if self._handle is not None:
            return
        path = Path(run_dir) / LOCK
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot write to the run folder {run_dir}: {error}") from error
        try:
            _lock(handle, path)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}
            os.ftruncate(handle, 0)
            os.pwrite(handle, (json.dumps(owner) + "\n").encode(), 0)
        except BlockingIOError:
            os.close(handle)
            raise CheckpointError(f"{run_dir} is in use by {_holder(path)}") from None
        except OSError as error:
            os.close(handle)
            raise CheckpointError(f"cannot write to the run folder {run_dir}: {error}") from error
        self._handle = handle

    def release(self) -> None:
        """Let the folder go; the file stays, as deleting it could let two processes in."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):  # a full disk must not hide the error before it
                os.ftruncate(handle, 0)
            os.close(handle)

    def __del__(self) -> None:
        self.release()


def _lock(handle: int, path: Path) -> None:
    """Lock an open file, or raise BlockingIOError where another one has it."""
    if sys.platform == "win32":
        logger.warning("%s: this system has no file locks; start only one run in this folder", path)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # some network file systems
        logger.warning("%s cannot be locked (%s); start only one run in this folder", path, error)


def _holder(path: Path) -> str:
    try:
        owner: Any = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        who = "another process"
    return f"{who}; wait until it ends, stop it, or give another run folder"
