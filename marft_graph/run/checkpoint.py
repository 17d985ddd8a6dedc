"""Folders that are either whole or not there: written beside, fsynced, renamed, checkable.

Owns `checkpoints/step_N` of a run as a set of files with a manifest. What the files mean (adapters,
optimizer moments) is the trainer's business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from marft_graph.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d+)(\.old)?")
_LEFTOVER = re.compile(r"step_\d+\.(tmp|old|deleted)")


def write_folder_atomically(
    path: str | Path, writer: Callable[[Path], None], *, manifest: bool = True
) -> Path:
    """Make the folder `path` from what `writer` writes into the folder it is given.

    The files are written to `NAME.tmp` beside it, listed with size and sha256 in `manifest.json`,
    fsynced and renamed; a process killed at any moment leaves the old folder (which may then be
    called `NAME.old`), the new one or none, never a part. A folder that exists is replaced once
    the new one is complete.

    Args:
        path: the folder.
        writer: writes the files into the folder that it is given.
        manifest: False where `writer` writes the list of files itself.

    Raises:
        CheckpointError: the disk is full or the folder not writable; nothing is left behind.
            Whatever else `writer` raises passes through, likewise.
    """
    target = Path(path)
    staging, old = target.with_name(target.name + ".tmp"), target.with_name(target.name + ".old")
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        writer(staging)
        if manifest:
            _write_manifest(staging)
        for entry in [*staging.rglob("*"), staging]:
            _fsync(entry)
        if target.exists():
            if old.exists():
                shutil.rmtree(old)
            target.rename(old)
        staging.rename(target)
        for parent in (target.parent, target.parent.parent):
            _fsync(parent)
        if old.exists():
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:  # the latter hides an OSError in its text
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"cannot write {target}: {error}") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def verify(path: str | Path) -> None:
    """Check every file of a folder against its manifest.

    Raises:
        CheckpointError: names the first file that is missing, changed or not in the manifest.
    """
    folder = Path(path)
    listed = _read_manifest(folder)
    for name, entry in listed.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing")
        size = file.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(
                f"{folder} is damaged: {name} has {size} bytes, the manifest says {entry['size']}"
            )
        if _digest(file) != entry["sha256"]:
            raise CheckpointError(
                f"{folder} is damaged: the content of {name} differs from what was written"
            )
    for name in _files(folder):
        if name not in listed:
            raise CheckpointError(f"{folder} is damaged: {name} is not in its manifest")


def has_checkpoints(run_dir: str | Path) -> bool:
    """Whether a run has any checkpoint, intact or not."""
    return bool(_newest_first(Path(run_dir)))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest `checkpoints/step_N` that verifies, or None; damaged ones are logged by name."""
    for path in _newest_first(Path(run_dir)):
        if _intact(path):
            return path
    return None


def prune(run_dir: str | Path, keep: int, best: int | None = None) -> None:
    """Delete all checkpoints older than the `keep`-th newest intact one, but for the `best` step.

    Damaged ones do not count: one that cannot be read never pushes out one that can.

    Raises:
        ValueError: `keep` is below 1.
        CheckpointError: a folder cannot be deleted.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least 1 checkpoint must stay")
    kept = 0
    try:
        _tidy(Path(run_dir))
        for path in _newest_first(Path(run_dir)):
            if kept == keep and path.name != f"step_{best}":
                # Under another name first: a process killed meanwhile leaves no half checkpoint.
                path = path.rename(path.with_name(f"step_{_number(path)}.deleted"))
                shutil.rmtree(path)
            elif kept < keep and _intact(path):
                kept += 1
    except OSError as error:
        raise CheckpointError(f"cannot delete old checkpoints: {error}") from error


def _tidy(run_dir: Path) -> None:
    """Remove what a process left that was killed while it wrote or deleted."""
    for path in _entries(run_dir):
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.suffix == ".old" and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path)


def _intact(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError as error:
        logger.warning("skipping a checkpoint: %s", error)
        return False
    return True


def _entries(run_dir: Path) -> list[Path]:
    folder = run_dir / "checkpoints"
    return list(folder.iterdir()) if folder.is_dir() else []


def _newest_first(run_dir: Path) -> list[Path]:
    """Checkpoints; also one that a killed process had set aside to put its successor there."""
    steps = [path for path in _entries(run_dir) if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(steps, key=lambda path: (_number(path), not path.suffix), reverse=True)


def _number(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def _write_manifest(folder: Path) -> None:
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)}
        for name in _files(folder)
    }
    (folder / MANIFEST).write_bytes(_manifest_of(files))


def _manifest_of(files: dict[str, dict[str, Any]]) -> bytes:
    manifest = {"files": files, "manifest_sha256": _digest_of(files)}
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content.decode())
        files: dict[str, dict[str, Any]] = manifest["files"]
        # 0.1.0 wrote no digest of the manifest itself.
        if set(manifest) != {"files"} and content != _manifest_of(files):
            raise CheckpointError(f"{path} is damaged: it differs from what was written")
        if not all(set(entry) == {"size", "sha256"} for entry in files.values()):
            raise CheckpointError(f"{path} is damaged: each file needs size and sha256")
    except OSError as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return files


def _files(folder: Path) -> list[str]:
    """Relative names of all files but the manifest itself, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def _digest_of(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX systems can open a folder
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
