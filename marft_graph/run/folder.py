"""The run folder: which one a run may use, and the two files that describe the run.

Never deletes or replaces what it was not told to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from marft_graph.errors import CheckpointError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.graph.picture import to_svg


def claim_run_folder(run_dir: str | Path | None, *, overwrite: bool, resume: bool) -> Path:
    """The folder that a run may write to; the next free `runs/run-N` where none is named.

    Raises:
        CheckpointError: the folder is in use and neither word was said, or is no run folder.
    """
    if run_dir is None:
        number = 1
        while Path(f"runs/run-{number}").exists():
            number += 1
        return Path(f"runs/run-{number}")
    path = Path(run_dir)
    used = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if resume:
        if not (path / "config.yaml").is_file():
            raise CheckpointError(f"nothing to resume: {path} is no run folder")
        return path
    if used and not overwrite:
        raise CheckpointError(
            f"{path} is not empty; give another run folder, or say --resume to continue it or "
            "--overwrite to delete it (resume=True, overwrite=True)"
        )
    if used:
        if not (path / "config.yaml").is_file():
            raise CheckpointError(f"{path} is no run folder; it will not be deleted")
        shutil.rmtree(path)
    return path


def describe_run(run_dir: Path, settings: Mapping[str, Any], flex_mg: FlexMG) -> None:
    """Write `config.yaml`, `graph.json` and `graph.svg` into the folder, made where needed."""
    (run_dir / "traces").mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    (run_dir / "config.yaml").write_text(text, encoding="utf-8")
    graph = json.dumps(flex_mg.to_dict(), indent=2, ensure_ascii=False)
    (run_dir / "graph.json").write_text(graph + "\n", encoding="utf-8")
    (run_dir / "graph.svg").write_text(to_svg(flex_mg), encoding="utf-8")
