"""Every workflow goes through inspect, train, eval and export with the commands of its README."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from marft_graph.cli import main

WORKFLOWS = Path(__file__).parents[2] / "workflows"
NAMES = (
    *("code_duo", "flight_booking", "shop", "supervisor", "tool_agent"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gsm8k", "math")),
)
SHORT = {
    "--iterations": 2,
    "--examples-per-iteration": 1,
    "--group-size": 2,
    "--eval-examples": 2,
    "--max-new-tokens": 8,
    "--minibatches": 1,
    "--eval-every": 0,
}


def marft(*args: object) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_work_on_the_workflow(name: str, tmp_path: Path) -> None:
    folder, run = WORKFLOWS / name, tmp_path / "run"
    assert (folder / "README.md").is_file()
    assert " agent" in marft("inspect", folder).stdout
    options = [part for pair in SHORT.items() for part in pair]
    printed = marft("train", folder, "--run-dir", run, *options).stdout
    assert "Held-out return" in printed
    assert "0 failed" not in printed
    marft("export", run, tmp_path / "out")
    given = ["--adapters", tmp_path / "out", "--base", "--examples", 2, "--sampled"]
    assert "out against base: " in marft("eval", folder, *given).stdout
