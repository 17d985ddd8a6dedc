"""Apps that fail in every way: each episode accounted for, nothing leaks, nothing hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults.soak import FAULTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def soak(module: str, *options: object, seconds: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", *map(str, options)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=seconds,  # a deadlock fails here
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_accounted_for(found: dict[str, Any], episodes: int) -> None:
    tally = Counter(found["tally"])
    assert tally.total() == episodes
    assert tally.pop("none: ok") > 0
    for kind, reason in FAULTS.items():
        assert tally.pop(f"{kind}: failed: {reason}") > 0, kind
    # On a machine that is busy with other things, some run past their deadline instead.
    assert all(name.endswith(": failed: timeout") for name in tally), tally
    threads, handles = ({m[name] for m in found["measures"]} for name in ("threads", "handles"))
    assert len(threads) == len(handles) == 1, found["measures"]


@pytest.mark.timeout(200)
def test_episodes_that_fail_in_every_way_are_accounted_for() -> None:
    found = soak("soak", "--episodes", 200, "--rollouts", 2, "--timeout", 8, seconds=190)
    assert_accounted_for(found, 200)
    assert max(found["hung"]) > 0  # cancelled, and their threads known


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_of_them_leave_no_memory_behind() -> None:
    found = soak("soak", "--episodes", 10_000, "--rollouts", 20, "--timeout", 8, seconds=3500)
    assert_accounted_for(found, 10_000)
    memory = [measure["memory"] for measure in found["measures"]]
    warm = max(memory[:4])
    assert memory[-1] < 1.05 * warm, memory


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sixty_iterations_of_training_leave_nothing_behind() -> None:
    found = soak("soak_training", "--iterations", 60, "--timeout", 4, seconds=1700)
    assert len(found["rows"]) == 60
    assert all(row["episodes"] == 16 for row in found["rows"])
    assert all(row["episodes_failed"] >= 8 for row in found["rows"])  # 2 of each of 4 kinds
    warm = found["measures"][10:]
    for name in ("threads", "handles"):  # a worker may still be on its way out when it is counted
        counts = [measure[name] for measure in warm]
        assert max(counts[25:]) <= max(counts[:25]), counts
        assert max(counts) - min(counts) <= 1, counts
    memory = [measure["memory"] for measure in warm]
    assert memory[-1] < 1.05 * memory[0], memory
