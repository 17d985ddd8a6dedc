"""kill -9 during small runs; `make faults` does the same a hundred times."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_that_are_killed_end_as_if_they_had_not_been() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill", "--times", "10"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"10 +bit-identical after resuming", done.stdout), done.stdout
    (killed,) = re.findall(r"(\d+) +killed$", done.stdout, re.MULTILINE)
    assert int(killed) >= 3, done.stdout  # else nothing was tried
