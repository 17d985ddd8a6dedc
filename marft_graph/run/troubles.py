"""What went wrong in a run, as HTML for its report: failures by reason, collapses, servers, memory.

Reads the rows of a run's metrics; all text is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from marft_graph.run.comparison_page import readable_text

Row = Mapping[str, Any]

_SERVERS = {
    "servers_lost": "times a server was lost",
    "servers_restarted": "times a server of the run's own was started again",
    "calls_retried": "calls that were tried again",
}


def troubles_section(rows: Sequence[Row], evaluations: Sequence[Row]) -> str:
    """Everything that went wrong, or that nothing did.

    Args:
        rows: of `metrics.jsonl`.
        evaluations: rows of `evaluations.jsonl`.
    """
    parts = [
        _collapses(rows),
        "<h2>Failures</h2>",
        _failures(rows, "failed_by_reason", "training"),
        _failures(evaluations, "eval_failed_by_reason", "held-out"),
        *(f"<p>{readable_text(line)}</p>" for line in _notes(rows)),
    ]
    return "".join(parts)


def _collapses(rows: Sequence[Row]) -> str:
    found = [(row["iteration"], row["collapsed"]) for row in rows if row.get("collapsed")]
    if not found:
        return ""
    return (
        "<h2>Collapses</h2><p>After each, the last good checkpoint was put back with lower "
        f"learning rates.</p>{_table(('iteration', 'what was wrong'), found)}"
    )


def _failures(rows: Iterable[Row], name: str, kind: str) -> str:
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.get(name) or {})
    if not reasons:
        return f"<p>No {kind} episode failed.</p>"
    return (
        f"<p>{reasons.total()} {kind} episodes failed; they are dropped, never trained on.</p>"
        f"{_table(('reason', 'episodes'), reasons.most_common())}"
    )


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
