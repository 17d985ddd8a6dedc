"""What went wrong in a run, as HTML for its report: failures by reason, collapses, servers, memory.

Reads the rows of a run's metrics, and traces for the errors; all text is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from marft_graph.run.comparison_page import readable_text
from marft_graph.run.curves import Curve, line_chart
from marft_graph.run.trajectories import read_traces

Row = Mapping[str, Any]

_SHOWN = 6
"""Reasons of failures that get a curve and their first error."""
_SERVERS = {
    "servers_lost": "times a server was lost",
    "servers_restarted": "times a server of the run's own was started again",
    "calls_retried": "calls that were tried again",
}


def troubles_section(
    rows: Sequence[Row], evaluations: Sequence[Row], errors: Mapping[str, str] | None = None
) -> str:
    """Everything that went wrong, or that nothing did.

    Args:
        rows: of `metrics.jsonl`.
        evaluations: rows of `evaluations.jsonl`.
        errors: the first error of a training episode for each reason, as `first_errors` finds it.
    """
    parts = [
        _collapses(rows),
        "<h2>Failures</h2>",
        _failures(rows, "failed_by_reason", "training"),
        _errors(errors or {}),
        _failures_over_time(rows),
        _failures(evaluations, "eval_failed_by_reason", "held-out"),
        *(f"<p>{readable_text(line)}</p>" for line in _notes(rows)),
    ]
    return "".join(parts)


def first_errors(rows: Sequence[Row], run_dir: Path) -> dict[str, str]:
    """For the most frequent reasons, the error of the first training episode that failed for it.

    Raises:
        CheckpointError: traces are damaged.
    """
    frequent = [reason for reason, _ in _counts(rows, "failed_by_reason").most_common(_SHOWN)]
    found: dict[str, str] = {}
    for row in rows:
        new = [r for r in row.get("failed_by_reason") or {} if r in frequent and r not in found]
        path = run_dir / "traces" / f"iter_{row['iteration']:06d}.parquet"
        if not new or not path.exists():
            continue
        for episode in read_traces(path):
            reason = episode.status.removeprefix("failed: ")
            if not episode.ok and reason in new and reason not in found:
                found[reason] = f"iteration {row['iteration']}: {episode.error}"
    return found


def _errors(errors: Mapping[str, str]) -> str:
    """Behind a click each: an error may have a page of output in it."""
    return "".join(
        f"<details><summary>The first: {readable_text(reason)}</summary>"
        f"<pre>{readable_text(error)}</pre></details>"
        for reason, error in errors.items()
    )


def _failures_over_time(rows: Sequence[Row]) -> str:
    frequent = _counts(rows, "failed_by_reason").most_common(_SHOWN)
    curves = [
        Curve(
            reason,
            [
                (row["iteration"], (row.get("failed_by_reason") or {}).get(reason, 0))
                for row in rows
            ],
        )
        for reason, _ in frequent
    ]
    chart = line_chart("Failed training episodes", curves)
    return f"<figure>{chart}</figure>" if chart else ""


def _collapses(rows: Sequence[Row]) -> str:
    found = [(row["iteration"], row["collapsed"]) for row in rows if row.get("collapsed")]
    if not found:
        return ""
    return (
        "<h2>Collapses</h2><p>After each, the last good checkpoint was put back with lower "
        f"learning rates.</p>{_table(('iteration', 'what was wrong'), found)}"
    )


def _failures(rows: Iterable[Row], name: str, kind: str) -> str:
    reasons = _counts(rows, name)
    if not reasons:
        return f"<p>No {kind} episode failed.</p>"
    return (
        f"<p>{reasons.total()} {kind} episodes failed; they are dropped, never trained on.</p>"
        f"{_table(('reason', 'episodes'), reasons.most_common())}"
    )


def _counts(rows: Iterable[Row], name: str) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.get(name) or {})
    return reasons


def _notes(rows: Sequence[Row]) -> list[str]:
    """One sentence for each other trouble that there was."""
    notes = []
    if rewarded := sum(row.get("faults_rewarded", 0) for row in rows):
        notes.append(
            f"{rewarded} training episodes ended with an error that is the policy's own fault "
            "(fault_rewards), and earned what was set for it."
        )
    if hung := max((row.get("threads_hung", 0) for row in rows), default=0):
        notes.append(
            f"At most {hung} threads at once were left behind in nodes, tools or rewards that do "
            "not return."
        )
    if short := sum(row.get("out_of_memory", 0) for row in rows):
        size = min(row["microbatch_tokens"] for row in rows if row.get("out_of_memory"))
        notes.append(
            f"Updates ran out of memory {short} times and were done again, with micro-batches of "
            f"{size} tokens in the end."
        )
    servers: Row = next((row["engine"] for row in reversed(rows) if row.get("engine")), {})
    counted = [f"{servers[name]} {words}" for name, words in _SERVERS.items() if servers.get(name)]
    if counted:
        notes.append(f"vLLM servers: {', '.join(counted)}.")
    return notes


def _table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{readable_text(str(cell))}</td>' for cell in line)}</tr>"
        for line in lines
    )
    return f"<table><tr>{head}</tr>{body}</table>"
