"""A comparison of policies as text for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from marft_graph.run.comparison_page import last_words

_WIDTH = 100


def table(comparison: Mapping[str, Any]) -> str:
    """What `Comparison.to_dict` holds, as a table, verdicts, nodes and changed examples."""
    policies = comparison["policies"]
    how = "greedy" if comparison["greedy"] else "sampled"
    figures: list[Sequence[str]] = [
        ("policy", f"return ({how})", "tokens", "seconds", "cost", "failed")
    ]
    figures += [_figures(row) for row in policies]
    nodes: list[Sequence[str]] = [
        ("node", "policy", "calls", "read", "written", "truncated", "seconds")
    ]
    for node in sorted({node for row in policies for node in row["nodes"]}):
        nodes += [_node(node, row) for row in policies if node in row["nodes"]]
    parts = [_columns(figures), _verdicts(comparison), _columns(nodes)]
    for kind in ("better", "worse"):
        parts.append(_changed(f"Examples that got {kind}", comparison[kind]))
    return "\n\n".join(part for part in parts if part)


def _figures(row: Mapping[str, Any]) -> tuple[str, ...]:
    own = row["evaluation"]
    read, written = row["tokens_per_episode"]
    cost = row["cost_per_episode"]
    return (
        row["name"],
        f"{own['return_mean']:.3f} ± {own['return_stderr']:.3f}",
        f"{read:.0f} + {written:.0f}",
        f"{row['seconds_per_episode']:.2f}",
        "-" if cost is None else f"{cost:.6f}",
        f"{own['episodes_failed']} of {own['episodes']}",
    )


def _node(node: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    own = row["nodes"][node]
    return (
        node,
        row["name"],
        f"{own['calls_per_episode']:.2f}",
        f"{own['prompt_tokens']:.1f}",
        f"{own['completion_tokens']:.1f}",
        f"{own['truncated_share']:.1%}",
        f"{own['seconds']:.2f}",
    )


def _verdicts(comparison: Mapping[str, Any]) -> str:
    lines = []
    for name, found in comparison["differences"].items():
        lines.append(
            f"{name} against {comparison['against']}: {found['verdict']} "
            f"({found['mean']:+.3f}, 95 % interval {found['low']:+.3f} to {found['high']:+.3f}, "
            f"{found['pairs']} examples)"
        )
    return "\n".join(lines)


def _changed(title: str, examples: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for own in examples:
        example = json.dumps(own["example"], ensure_ascii=False, default=repr)
        lines.append(_cut(f"  {own['policy']} {own['difference']:+.2f}  {example}"))
        for when in ("before", "after"):
            said = " | ".join(
                f"{call['node']}: {last_words([call['answer']])}" for call in own[when]["calls"]
            )
            lines.append(_cut(f"    {when}: {' '.join(said.split())}"))
    return "\n".join([title, *lines]) if lines else ""


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 2] + " …"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
