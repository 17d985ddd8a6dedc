"""Every example runs, is short, and together they use every public name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import marft_graph

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[0-9]*.py"))
ARGUMENTS = {"03_train_and_bind.py": ["--iterations", "1"]}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_example_runs(example: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(example), *ARGUMENTS.get(example.name, [])]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=170, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert list(tmp_path.iterdir()) == []  # an example leaves nothing behind


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 60


def test_every_public_name_is_used_in_an_example() -> None:
    text = "\n".join(example.read_text(encoding="utf-8") for example in EXAMPLES)
    unused = [name for name in marft_graph.__all__ if not re.search(rf"\b{name}\b", text)]
    assert unused == []
