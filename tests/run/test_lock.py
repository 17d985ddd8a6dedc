"""One run folder, one run: also where its holder was killed, and across processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from marft_graph import Trainer
from marft_graph.errors import CheckpointError
from marft_graph.run.lock import LOCK, RunLock
from tests.training import config, reward

HOLD = """
import sys
from marft_graph.run.lock import RunLock
lock = RunLock()
lock.acquire(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder's lock."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_told_who_has_the_folder(tmp_path: Path) -> None:
    with (
        holder(tmp_path) as process,
        pytest.raises(
            CheckpointError,
            match=rf"in use by process {process.pid} on {re.escape(socket.gethostname())} since",
        ),
    ):
        RunLock().acquire(tmp_path)


def test_what_a_killed_holder_left_locks_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert str(process.pid) in (tmp_path / LOCK).read_text()
    lock = RunLock()
    lock.acquire(tmp_path)
    assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    lock.release()


def test_a_lock_without_a_readable_owner_still_locks(tmp_path: Path) -> None:
    lock = RunLock()
    lock.acquire(tmp_path)
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(CheckpointError, match="in use by another process; wait"):
        RunLock().acquire(tmp_path)
    lock.release()


def test_a_released_or_forgotten_lock_is_free(tmp_path: Path) -> None:
    first = RunLock()
    first.acquire(tmp_path)
    first.acquire(tmp_path)  # ours already
    first.release()
    second = RunLock()
    second.acquire(tmp_path)
    del second
    RunLock().acquire(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write to the run folder"):
        RunLock().acquire(tmp_path / "file" / "run")


def test_neither_a_second_run_nor_resume_nor_overwrite_gets_into_a_running_one(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    refused: list[str] = []

    def intruding(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        if not refused and trainer.iteration == 1:
            for word in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
                    make(**word)
                refused.append(str(word))
            with pytest.raises(CheckpointError, match="not empty"):
                make()
        return reward(example, state)

    trainer = make(reward=intruding, config=config(tiny_model, iterations=1, reward_concurrency=1))
    result = trainer.train(progress=False)
    assert len(refused) == 2
    assert (result.run_dir / "export" / "manifest.json").exists()
    assert make(resume=True).iteration == 1  # and the folder is free again


def test_of_two_runs_that_claimed_one_new_folder_the_second_is_refused(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    first, second = (make(config=config(tiny_model, iterations=0)) for _ in range(2))
    first.train(progress=False)
    with pytest.raises(CheckpointError, match="another run has used"):
        second.train(progress=False)


def test_a_run_that_was_refused_lets_the_folder_go(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    make(config=config(tiny_model, iterations=0)).train(progress=False)
    with pytest.raises(ValueError, match="learning_rate"):
        make(config=config(tiny_model, learning_rate=1.0), resume=True)
    assert make(config=config(tiny_model, iterations=0), resume=True).iteration == 0
