"""A disk that is full at any write: a clear error, and what was good stays good."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import zeros

from marft_graph.errors import CheckpointError, MarftError
from marft_graph.run import folder as run_folder
from marft_graph.run.checkpoint import latest_checkpoint, verify, write_folder_atomically
from marft_graph.run.tracking import MetricsLog, read_metrics
from marft_graph.run.trajectories import write_traces
from tests.run.test_trajectories import EPISODES


def fill(folder: Path) -> None:
    (folder / "adapters").mkdir()
    save_file({"weights": zeros(10)}, folder / "adapters" / "weights.safetensors")
    (folder / "state.json").write_text("{}", encoding="utf-8")


def fail_at(monkeypatch: pytest.MonkeyPatch, fatal: int) -> list[str]:
    """Make the n-th change of the disk by Python's own functions fail; what was tried before."""
    tried: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and "r" in (args[1] if len(args) > 1 else "r"):
                return real(*args, **kwargs)
            tried.append(name)
            if len(tried) == fatal + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    import marft_graph.run.checkpoint as checkpoint

    for owner, name in (
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "open"),
        (Path, "rename"),
        (Path, "replace"),
        (os, "fsync"),
        (checkpoint.shutil, "rmtree"),
    ):
        if name == "rmtree" and fatal >= 0:
            continue  # deleting needs no room
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return tried


def test_a_checkpoint_survives_a_full_disk_at_any_of_its_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "checkpoints" / "step_2"
    write_folder_atomically(tmp_path / "checkpoints" / "step_1", fill)
    failures, said = 0, list[str]()
    while True:
        with monkeypatch.context() as patch:
            tried = fail_at(patch, failures)
            try:
                write_folder_atomically(target, fill)
            except CheckpointError as error:
                said.append(str(error))
            else:
                assert len(tried) <= failures
                break
        newest = latest_checkpoint(tmp_path)
        assert newest is not None  # the one before, or the new one where it was already in place
        verify(newest)
        assert not list(tmp_path.rglob("*.tmp"))
        failures += 1
    assert failures > 8
    assert all(f"cannot write {target}" in text for text in said)
    assert all("No space left on device" in text for text in said)
    verify(target)


def test_replacing_a_checkpoint_survives_a_full_disk_at_any_of_its_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "checkpoints" / "step_1"
    write_folder_atomically(target, fill)
    for number in range(100):
        with monkeypatch.context() as patch:
            fail_at(patch, number)
            try:
                write_folder_atomically(target, fill)
            except CheckpointError:
                pass
            else:
                break
        assert latest_checkpoint(tmp_path) is not None
    assert 8 < number < 99


@pytest.mark.parametrize("number", range(4))
def test_logs_traces_and_descriptions_say_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    log = MetricsLog(tmp_path)
    log.write({"iteration": 1})
    works: list[Callable[[], object]] = [
        lambda: log.write({"iteration": 2}),
        lambda: log.write_evaluation({"iteration": 1, "eval_return": 0.5}),
        lambda: log.truncate(0),
        lambda: write_traces(tmp_path / "t.parquet", EPISODES, iteration=1, phase="train"),
    ]

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MarftError, match=r"cannot write .*No space left on device"):
        works[number]()
    monkeypatch.undo()
    assert read_metrics(tmp_path)[0]["iteration"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_is_as_it_was_where_its_successor_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    run_folder.write_text_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        run_folder.write_text_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.timeout(300)
def test_a_run_on_a_disk_that_becomes_full_stops_clearly_and_can_go_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.full_disk", tiny_model, disk, str(1_500_000)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if "cannot" in found:
        pytest.skip(f"this system lets no test mount a disk: {found['cannot']}")
    assert found["error"].startswith("CheckpointError: cannot write"), found
    assert "No space left on device" in found["error"], found
    assert found["left"] == []
    assert found["resumed"] >= 1
    assert found["good"] == f"step_{found['resumed']}"
