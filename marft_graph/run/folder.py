"""The run folder: which one a run may use, and the files that describe the run.

Never deletes or replaces what it was not told to.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from marft_graph.errors import CheckpointError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.graph.picture import to_svg
from marft_graph.run.lock import LOCK, RunLock

_BASES = "base_models.json"
# What a run that was killed before it had begun may have left.
_BEGINNINGS = frozenset({LOCK, "traces", "graph.json", "graph.svg", _BASES})


def claim_run_folder(
    run_dir: str | Path | None, lock: RunLock, *, overwrite: bool, resume: bool
) -> Path:
    """The folder that a run may write to; the next free `runs/run-N` where none is named.

    A folder with a run in it is locked at once, others when the run begins.

    Raises:
        CheckpointError: the folder is in use and neither word was said, is no run folder, or
            another process has it.
    """
    if run_dir is None:
        number = 1
        while Path(f"runs/run-{number}").exists():
            number += 1
        return Path(f"runs/run-{number}")
    path = Path(run_dir)
    _check_can_be_made(path)
    if resume:
        if not os.path.isfile(path / "config.yaml"):
            raise CheckpointError(f"nothing to resume: {path} is no run folder")
        lock.acquire(path)
        return path
    used = _is_used(path)
    if used and not overwrite:
        raise CheckpointError(
            f"{path} is not empty; give another run folder, or say --resume to continue it or "
            "--overwrite to delete it (resume=True, overwrite=True)"
        )
    if used:
        if not (path / "config.yaml").is_file():
            raise CheckpointError(f"{path} is no run folder; it will not be deleted")
        lock.acquire(path)
        _empty(path)
    return path


def begin_in(run_dir: Path, lock: RunLock) -> None:
    """Lock a folder for a new run.

    Raises:
        CheckpointError: another run has it, or has been in it since it was claimed.
    """
    lock.acquire(run_dir)
    if (run_dir / "config.yaml").exists():
        lock.release()
        raise CheckpointError(f"another run has used {run_dir} meanwhile; give another run folder")


def _check_can_be_made(path: Path) -> None:
    """Refuse a folder that cannot be written, now rather than after the models were loaded."""
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if os.path.exists(there) and not os.path.isdir(there):
        raise CheckpointError(f"cannot make the run folder {path}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write the run folder {path}: {there} is not writable")


def _is_used(path: Path) -> bool:
    """Whether there is anything in a folder but what a run writes before it begins."""
    if not os.path.isdir(path):  # not Path.is_dir, which raises where a name is too long
        return os.path.exists(path)
    names = {entry.name for entry in path.iterdir() if entry.suffix != ".tmp"}
    traces = path / "traces"
    return not names <= _BEGINNINGS or (traces.is_dir() and any(traces.iterdir()))


def _empty(path: Path) -> None:
    """Delete a run, `config.yaml` last and the held lock not at all."""
    entries = sorted(path.iterdir(), key=lambda entry: entry.name == "config.yaml")
    try:
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot delete the run in {path}: {error}") from error


def describe_run(
    run_dir: Path,
    settings: Mapping[str, Any],
    flex_mg: FlexMG,
    base_files: Mapping[str, Mapping[str, str]],
) -> None:
    """Write what describes the run into its folder, which is made where needed.

    `graph.json` and `graph.svg`, `base_models.json` (base model -> `fingerprint`), and
    `config.yaml`, which comes last: where it is, the folder is a run's.

    Raises:
        CheckpointError: the disk is full or the folder not writable.
    """
    graph = json.dumps(flex_mg.to_dict(), indent=2, ensure_ascii=False) + "\n"
    bases = json.dumps(base_files, indent=2, ensure_ascii=False) + "\n"
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    try:
        (run_dir / "traces").mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("graph.json", graph),
            ("graph.svg", to_svg(flex_mg)),
            (_BASES, bases),
            ("config.yaml", text),
        ):
            write_text_atomically(run_dir / name, content)
    except OSError as error:
        raise CheckpointError(f"cannot write the run folder {run_dir}: {error}") from error


def read_graph(run_dir: Path) -> FlexMG:
    """The graph that a run trained.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        graph = json.loads((run_dir / "graph.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run_dir} is no run folder: cannot read graph.json: {error}"
        ) from error
    return FlexMG.from_dict(graph)


def read_base_files(run_dir: Path) -> dict[str, dict[str, str]]:
    """The `fingerprint` of each base model of a run; none in a run of 0.1.0.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run_dir / _BASES
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(base): dict(files.items()) for base, files in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: {error!r}") from error


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file beside, fsync and rename it: it is never half there.

    Raises:
        OSError: it cannot be written; an earlier file of that name is as it was.
    """
    staging = path.with_name(path.name + ".tmp")
    try:
        with staging.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        staging.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise


def remove_leftovers(run_dir: Path) -> None:
    """Delete the files and folders that a killed process was writing beside others."""
    shutil.rmtree(run_dir / ".export-adapters", ignore_errors=True)
    shutil.rmtree(run_dir / "export.tmp", ignore_errors=True)
    for folder in (run_dir, run_dir / "traces"):
        for path in folder.glob("*.tmp"):
            if path.is_file():
                path.unlink()
