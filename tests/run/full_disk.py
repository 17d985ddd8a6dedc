"""Trains until a small disk is full; prints what happened as JSON. A process of its own.

    python -m tests.run.full_disk MODEL FOLDER BYTES

FOLDER becomes a tmpfs of that many bytes, seen by this process alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

_NEWNS, _NEWUSER = 0x20000, 0x10000000


def mount_small_disk(folder: Path, size: int) -> str:
    """Why it cannot be done; empty where it was."""
    libc = ctypes.CDLL(None, use_errno=True)
    user = os.getuid()
    if libc.unshare(_NEWNS if user == 0 else _NEWNS | _NEWUSER) != 0:
        return os.strerror(ctypes.get_errno())
    if user != 0:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    for arguments in (
        (b"none", b"/", None, 0x4000 | 0x40000, None),  # private: nothing of it leaves
        (b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()),
    ):
        if libc.mount(*arguments) != 0:
            return os.strerror(ctypes.get_errno())
    return ""


def main() -> None:
    model, folder, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    if problem := mount_small_disk(folder, size):
        sys.stdout.write(json.dumps({"cannot": problem}))
        return
    from marft_graph import Trainer
    from marft_graph.errors import MarftError
    from marft_graph.run.checkpoint import latest_checkpoint
    from tests.apps import duo
    from tests.training import EXAMPLES, config, reward

    def trainer(**words: bool) -> Trainer:
        settings = config(
            model, iterations=30, checkpoint_every=1, keep_checkpoints=30, eval_every=0, lora_rank=4
        )
        return Trainer(
            duo(),
            train_dataset=EXAMPLES,
            reward=reward,
            config=settings,
            run_dir=folder / "run",
            **words,
        )

    error = ""
    try:
        trainer().train(progress=False)
    except MarftError as raised:
        error = f"{type(raised).__name__}: {raised}"
    left = sorted(path.name for path in (folder / "run").rglob("*.tmp"))
    good = latest_checkpoint(folder / "run")
    for path in (folder / "run" / "checkpoints").iterdir():  # as a user makes room
        if path != good:
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()
    resumed = trainer(resume=True).iteration
    found = {"error": error, "left": left, "good": good and good.name, "resumed": resumed}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
