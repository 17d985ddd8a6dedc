"""The metrics file and what the terminal shows of it."""

from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from marft_graph.errors import CheckpointError
from marft_graph.run.tracking import MetricsLog, TrainingProgress, read_evaluations, read_metrics


def row(iteration: int, **more: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "episodes": 64,
        "episodes_failed": 0,
        "return_mean": 0.5,
        "seconds_rollout": 0.5,
        "seconds_update": 1.5,
        "tokens_sampled": 1000,
        "agents": {"reasoner": {"kl": 0.01}, "actor": {"kl": 0.03}},
        **more,
    }


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run")
    log.write(row(1, failed_by_reason={"näher\ud800": 1}))
    log.write(row(2))
    assert read_metrics(tmp_path / "run") == [row(1, failed_by_reason={"näher\ud800": 1}), row(2)]


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_rows_are_strict_json_and_say_what_was_not_finite(tmp_path: Path) -> None:
    agents = {"actor": {"loss_policy": math.nan, "kl": 0.1}}
    MetricsLog(tmp_path).write(row(1, agents=agents, return_mean=-math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    back = json.loads(text, parse_constant=refuse)
    assert back["agents"]["actor"] == {"loss_policy": None, "kl": 0.1}
    assert back["return_mean"] is None
    assert back["non_finite"] == {"agents.actor.loss_policy": "nan", "return_mean": "-inf"}


def test_an_evaluation_is_logged_and_joins_its_iterations_row(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write_evaluation({"iteration": 0, "eval_return": 0.2})
    log.write(row(1))
    log.write_evaluation({"iteration": 1, "eval_return": 0.8})
    log.write_evaluation({"iteration": 1, "eval_return": 0.9})  # continued run
    assert read_metrics(tmp_path) == [row(1, eval_return=0.9)]
    assert read_evaluations(tmp_path) == [
        {"iteration": 0, "eval_return": 0.2},
        {"iteration": 1, "eval_return": 0.9},
    ]


def test_a_continued_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for iteration in range(5):
        log.write(row(iteration))
        log.write_evaluation({"iteration": iteration, "eval_return": 0.5})
    log.truncate(2)
    log.write(row(3, return_mean=0.75))
    assert [(r["iteration"], r["return_mean"]) for r in read_metrics(tmp_path)] == [
        (0, 0.5),
        (1, 0.5),
        (2, 0.5),
        (3, 0.75),
    ]
    assert [r["iteration"] for r in read_evaluations(tmp_path)] == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "evaluations.jsonl"}


def test_a_line_that_a_killed_process_left_unfinished_is_dropped_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MetricsLog(tmp_path).write(row(1))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"iteration": 2, "epis')
    with caplog.at_level(logging.WARNING):
        assert read_metrics(tmp_path) == [row(1)]
    assert "unfinished" in caplog.text
    MetricsLog(tmp_path).write(row(2))
    assert read_metrics(tmp_path) == [row(1), row(2)]


@pytest.mark.parametrize("line", ["{", "[]", "{}"])
def test_a_damaged_line_is_named_by_number(tmp_path: Path, line: str) -> None:
    text = f"{json.dumps(row(1))}\n{line}\n{json.dumps(row(3))}\n"
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="line 2 of"):
        read_metrics(tmp_path)


def test_a_row_needs_its_iteration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="iteration"):
        MetricsLog(tmp_path).write({"episodes": 3})
    assert read_metrics(tmp_path) == []


def shown(terminal: bool, iterations: int, *, first: int = 1, enabled: bool = True) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    with TrainingProgress(
        iterations, start=first - 1, enabled=enabled, console=console
    ) as progress:
        for iteration in range(first, iterations + 1):
            progress.update(row(iteration))
    return stream.getvalue()


def test_without_a_terminal_a_tenth_of_the_run_is_one_line() -> None:
    lines = shown(terminal=False, iterations=100).splitlines()
    assert len(lines) == 11  # the first iteration, and every tenth
    assert lines[0].startswith("iteration 1/100  return 0.500  KL 0.0200  2,000 tokens/s  ")
    assert lines[1].startswith("iteration 10/100  ")
    assert lines[-1].endswith("0:00 left")
    # The row says 2 s for an iteration, and 99 are to come.
    assert lines[0].endswith("3:18 left")


def test_a_continued_run_counts_on() -> None:
    lines = shown(terminal=False, iterations=100, first=91).splitlines()
    assert [line.split()[1] for line in lines] == ["91/100", "100/100"]


def test_a_terminal_gets_a_bar() -> None:
    output = shown(terminal=True, iterations=3)
    assert "training" in output
    assert "3/3" in output
    assert "return 0.500" in output


def test_nothing_is_shown_when_switched_off_or_without_iterations() -> None:
    assert shown(terminal=True, iterations=3, enabled=False) == ""
    assert shown(terminal=False, iterations=0) == ""


def test_figures_that_are_not_there_are_dashes() -> None:
    stream = io.StringIO()
    with TrainingProgress(1, console=Console(file=stream, width=120)) as progress:
        progress.update(row(1, return_mean=None, agents={"actor": {"loss_value": 0.1}}))
    assert "return -  KL -" in stream.getvalue()
