"""Checkpoint folders: whole or not there, and every kind of damage named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from marft_graph.errors import CheckpointError
from marft_graph.run.checkpoint import (
    latest_checkpoint,
    prune,
    verify,
    write_folder_atomically,
)


def fill(folder: Path) -> None:
    (folder / "adapters" / "actor").mkdir(parents=True)
    (folder / "adapters" / "actor" / "weights.bin").write_bytes(b"A" * 100)
    (folder / "learner.bin").write_bytes(b"B" * 100)
    (folder / "state.json").write_text("{}", encoding="utf-8")


def step(run_dir: Path, number: int) -> Path:
    return write_folder_atomically(run_dir / "checkpoints" / f"step_{number}", fill)


def steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_written_folder_verifies_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = step(tmp_path, 1)
    verify(path)
    assert steps(tmp_path) == ["step_1"]
    files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert sorted(files) == ["adapters/actor/weights.bin", "learner.bin", "state.json"]
    assert files["learner.bin"]["size"] == 100


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = step(tmp_path, 1)
    (path / "learner.bin").write_bytes(b"B" * 99)
    with pytest.raises(CheckpointError, match=r"learner\.bin has 99 bytes, the manifest says 100"):
        verify(path)


def test_a_flipped_byte_is_named(tmp_path: Path) -> None:
    path = step(tmp_path, 1)
    (path / "adapters/actor/weights.bin").write_bytes(b"A" * 50 + b"@" + b"A" * 49)
    with pytest.raises(CheckpointError, match=r"content of adapters/actor/weights\.bin differs"):
        verify(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = step(tmp_path, 1)
    (path / "learner.bin").unlink()
    with pytest.raises(CheckpointError, match=r"learner\.bin is missing"):
        verify(path)


def test_an_extra_file_is_named(tmp_path: Path) -> None:
    path = step(tmp_path, 1)
    (path / "adapters/more.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapters/more\.bin is not in its manifest"):
        verify(path)


def test_swapped_files_of_one_size_are_named(tmp_path: Path) -> None:
    path = step(tmp_path, 1)
    one, two = path / "adapters/actor/weights.bin", path / "learner.bin"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(CheckpointError, match=r"content of adapters/actor/weights\.bin differs"):
        verify(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"learner.bin": {"size": 1}}}']
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    path = step(tmp_path, 1)
    (path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(path)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no readable manifest\.json"):
        verify(tmp_path)


def test_a_writer_that_raises_leaves_the_old_folder_and_no_rest(tmp_path: Path) -> None:
    path = step(tmp_path, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder_atomically(path, fail)
    verify(path)
    assert steps(tmp_path) == ["step_1"]


def test_a_full_disk_says_so_and_leaves_no_rest(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        write_folder_atomically(tmp_path / "checkpoints" / "step_1", full)
    assert steps(tmp_path) == []


def test_an_existing_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = step(tmp_path, 1)
    write_folder_atomically(path, lambda folder: (folder / "new").touch())
    verify(path)
    assert sorted(entry.name for entry in path.iterdir()) == ["manifest.json", "new"]
    assert steps(tmp_path) == ["step_1"]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / "step_1.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    verify(step(tmp_path, 1))
    assert steps(tmp_path) == ["step_1"]


def test_latest_is_the_highest_step_and_skips_damage_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert latest_checkpoint(tmp_path) is None
    for number in (9, 10, 100):
        step(tmp_path, number)
    (tmp_path / "checkpoints" / "step_200.tmp").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_100"
    (tmp_path / "checkpoints" / "step_100" / "learner.bin").write_bytes(b"?")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_10"
    assert "step_100" in caplog.text
    assert "learner.bin" in caplog.text


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for number in (1, 2, 3, 10):
        step(tmp_path, number)
    prune(tmp_path, 2)
    assert steps(tmp_path) == ["step_10", "step_3"]


def test_a_damaged_checkpoint_never_pushes_out_an_intact_one(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        step(tmp_path, number)
    (tmp_path / "checkpoints" / "step_3" / "learner.bin").unlink()
    prune(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_2"
    assert "step_1" not in steps(tmp_path)


def test_pruning_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, 0)
