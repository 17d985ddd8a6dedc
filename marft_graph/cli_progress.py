"""What a person sees while a run trains: one progress bar with the newest figures.

Reads the same rows that `metrics.jsonl` gets, and knows nothing else of the trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_LINE_SECONDS = 10.0


@contextmanager
def training_progress(
    console: Console, iterations: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A callback for the rows of `metrics.jsonl`; draws a bar, or lines where no terminal is."""
    if not console.is_terminal:
        yield _line_printer(console, iterations)
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=iterations, figures="")

        def show(row: Mapping[str, Any]) -> None:
            progress.update(task, completed=_done(row), figures=figures(row))

        yield show


def figures(row: Mapping[str, Any]) -> str:
    """Return, KL to the base and sampling speed of an iteration, on one line.

    >>> figures({"return_mean": 0.5, "kl": {"a": 0.01, "b": 0.03}, "tokens_sampled": 900,
    ...          "seconds_rollout": 0.5, "seconds_update": 1.0})
    'return 0.500  KL 0.0200  600 tokens/s'
    """
    parts = []
    if row.get("return_mean") is not None:
        parts.append(f"return {row['return_mean']:.3f}")
    kl = [value for value in row.get("kl", {}).values() if value is not None]
    if kl:
        parts.append(f"KL {sum(kl) / len(kl):.4f}")
    seconds = row.get("seconds_rollout", 0.0) + row.get("seconds_update", 0.0)
    if seconds > 0:
        parts.append(f"{row.get('tokens_sampled', 0) / seconds:,.0f} tokens/s")
    if row.get("episodes_failed"):
        parts.append(f"{row['episodes_failed']} failed")
    if row.get("eval_return") is not None:
        parts.append(f"held-out {row['eval_return']:.3f}")
    return "  ".join(parts)


def _line_printer(console: Console, iterations: int) -> Callable[[Mapping[str, Any]], None]:
    """Log lines for files and pipes: the first row, the last, and one now and then."""
    started = time.monotonic()
    printed = float("-inf")
    first: int | None = None

    def show(row: Mapping[str, Any]) -> None:
        nonlocal printed, first
        now, done = time.monotonic(), _done(row)
        first = done - 1 if first is None else first
        evaluated = row.get("eval_return") is not None
        if now - printed < _PLAIN_LINE_SECONDS and done < iterations and not evaluated:
            return
        printed = now
        left = (now - started) / (done - first) * (iterations - done)
        console.print(
            f"iteration {done}/{iterations}  {figures(row)}  {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )

    return show


def _done(row: Mapping[str, Any]) -> int:
    """Iterations finished; rows count from 1."""
    return int(row["iteration"])
