"""What a run tells while it goes on: its two logs of figures, and the progress on the terminal.

A row is a plain mapping with an `iteration`; which figures it has is the trainer's business. Where
a user asked for trackers, `trackers` gives them the same rows.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from marft_graph.errors import CheckpointError
from marft_graph.run.folder import write_text_atomically

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


class MetricsLog:
    """The two logs of a run folder.

    `metrics.jsonl` has one JSON object for each iteration; `evaluations.jsonl` one for each
    evaluation on held-out examples, where iteration 0 is before training. An evaluation's figures
    are also in the metrics of its iteration.

    Rows are strict JSON: a figure that is not finite is written as null, and the row's
    `non_finite` says which it was (`{"agents.actor.loss_policy": "nan"}`).

    Args:
        run_dir: the run's folder.
        track: is given every row once it is written.
    """

    def __init__(
        self, run_dir: str | Path, track: Callable[[Mapping[str, Any]], None] = lambda row: None
    ) -> None:
        """Opens the logs of a run; a line that an earlier process left unfinished is dropped."""
        self._track = track
        self._metrics = Path(run_dir) / METRICS
        self._evaluations = Path(run_dir) / EVALUATIONS
        try:
            self._metrics.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self._metrics.parent}: {error}") from error
        for path in (self._metrics, self._evaluations):
            if path.is_file() and not path.read_bytes().endswith(b"\n"):
                _rewrite(path, _read(path))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one iteration's row, on disk when this returns.

        Raises:
            CheckpointError: the disk is full or the file not writable.
        """
        line = _line(row)
        try:
            with self._metrics.open("a", encoding="utf-8") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write {self._metrics}: {error}") from error
        self._track(row)

    def write_evaluation(self, row: Mapping[str, Any]) -> None:
        """Log an evaluation, in place of an earlier one after the same iteration."""
        others = [r for r in _read(self._evaluations) if r["iteration"] != row["iteration"]]
        _rewrite(self._evaluations, [*others, row])
        metrics = _read(self._metrics)
        for known in metrics:
            if known["iteration"] == row["iteration"]:
                known.update(row)
                _rewrite(self._metrics, metrics)
        self._track(row)

    def truncate(self, iteration: int) -> None:
        """Drop the rows after `iteration`, as a run does that continues from an older state."""
        for path in (self._metrics, self._evaluations):
            _rewrite(path, [row for row in _read(path) if row["iteration"] <= iteration])


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` in their order; none where there is no such file.

    An unfinished last line, as a killed process leaves it, is logged and left out.

    Raises:
        CheckpointError: another line is no row; the message has its number.
    """
    return _read(Path(run_dir) / METRICS)


def read_evaluations(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `evaluations.jsonl`, as `read_metrics` reads its own."""
    return _read(Path(run_dir) / EVALUATIONS)


def _rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    try:
        write_text_atomically(path, "".join(map(_line, rows)))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def _read(path: Path) -> list[dict[str, Any]]:
    if not os.path.isfile(path):
        return []
    *lines, tail = path.read_bytes().split(b"\n")
    rows = [_row(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]
    if tail:
        logger.warning("%s: the last line is unfinished and left out", path)
    return rows


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
        raise CheckpointError(f"{where} is no row of metrics: it has no iteration")
    return row


def _line(row: Mapping[str, Any]) -> str:
    if not isinstance(row.get("iteration"), int):
        raise ValueError(f"a row of metrics needs a whole number `iteration`; got {row!r}")
    non_finite: dict[str, str] = {}
    plain = _finite(row, "", non_finite)
    if non_finite:
        plain["non_finite"] = {**plain.get("non_finite", {}), **non_finite}
    return json.dumps(plain, ensure_ascii=True, allow_nan=False) + "\n"


def _finite(value: Any, name: str, non_finite: dict[str, str]) -> Any:
    """The value with null for what is not finite; `non_finite` gets the dotted names of those."""
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        return {key: _finite(item, f"{prefix}{key}", non_finite) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        non_finite[name] = str(value)
        return None
    return value


class TrainingProgress:
    """Progress of a training run on stderr: a bar on a terminal, elsewhere a line every 10 %.

    A context manager; `update` takes the row of each finished iteration.

    Args:
        iterations: of the whole run.
        start: iterations that were done before, where a run is continued.
        enabled: False shows nothing.
        console: where to show; stderr by default.
    """

    def __init__(
        self,
        iterations: int,
        *,
        start: int = 0,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self._iterations = iterations
        self._start = start
        self._console = console or Console(stderr=True)
        self._enabled = enabled and iterations > 0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._updates = 0
        self._since = 0.0
        self._tenths_shown = 10 * start // iterations if self._enabled else 0

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "", total=self._iterations, completed=self._start, figures="starting"
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show an iteration's return, mean KL of the agents, tokens/s and the time left."""
        if not self._enabled:
            return
        if self._updates == 0:
            # The run may have been continued, or have begun with an evaluation: time is counted
            # from the start of the first iteration that is shown here.
            waited = row.get("seconds_waited", row["seconds_rollout"])
            self._since = time.monotonic() - waited - row["seconds_update"]
        self._updates += 1
        done = row["iteration"]
        per_iteration = (time.monotonic() - self._since) / self._updates
        figures = f"{_figures(row)}  {_clock(per_iteration * (self._iterations - done))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures)
            return
        tenths = 10 * done // self._iterations
        if tenths > self._tenths_shown or self._updates == 1:
            self._tenths_shown = tenths
            line = f"iteration {done}/{self._iterations}  {figures}"
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _figures(row: Mapping[str, Any]) -> str:
    kls = [s["kl"] for s in row.get("agents", {}).values() if s.get("kl") is not None]
    kl = "-" if not kls else f"{sum(kls) / len(kls):.4f}"
    mean = "-" if row.get("return_mean") is None else f"{row['return_mean']:.3f}"
    speed = row["tokens_sampled"] / max(row["seconds_rollout"], 1e-9)
    return f"return {mean}  KL {kl}  {speed:,.0f} tokens/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
