"""The agents of a run side by side, as HTML: what each cost, how far it moved, who got the credit.

Reads the rows of a run's metrics and the graph; all names are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marft_graph.graph.flex_mg import FlexMG
from marft_graph.names import agent_of_adapter
from marft_graph.run.advice import figures, first_figure, recent_figure
from marft_graph.run.comparison_page import readable_text

Row = Mapping[str, Any]

_UNMOVED = 0.001
"""Nats per token of KL to the base under which an agent has hardly changed."""
_HEADS = (
    "agent",
    "calls per episode",
    "tokens per call",
    "share of tokens",
    "KL to the base",
    "entropy",
    "share of the credit",
    "truncated",
    "return of its calls",
    "in words",
)


def nodes_section(flex_mg: FlexMG, rows: Sequence[Row]) -> str:
    """One line for each adapter, over all iterations in which it was trained; empty without any."""
    agents = list(dict.fromkeys(agent for row in rows for agent in row["agents"]))
    if not agents:
        return ""
    tokens = {agent: sum(tokens_by_iteration(agent, rows).values()) for agent in agents}
    credit = {agent: _credit(agent, rows) for agent in agents}
    nodes: dict[str, list[str]] = {}
    for node in flex_mg.agents:
        nodes.setdefault(flex_mg.adapter(node), []).append(node)
    lines = []
    for agent in agents:
        cells = (
            _named(agent, nodes.get(agent, [])),
            _number(calls_per_episode(agent, rows), ".2f"),
            _from_to(agent, "tokens_mean", rows, ".1f"),
            f"{tokens[agent] / max(sum(tokens.values()), 1):.0%}",
            _number(recent_figure(agent, "kl", rows), ".3f"),
            _from_to(agent, "entropy", rows, ".2f"),
            f"{credit[agent] / (sum(credit.values()) or 1):.0%}",
            _from_to(agent, "truncated_share", rows, ".0%"),
            _from_to(agent, "return_mean", rows, ".2f"),
            _in_words(agent, rows),
        )
        lines.append(f"<tr>{''.join(f'<td>{readable_text(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in _HEADS)
    return (
        f"<h2>Node by node</h2><p>{readable_text(_furthest(agents, rows))}</p>"
        f'<div class="wide"><table class="nodes"><tr>{head}</tr>{"".join(lines)}</table></div>'
        '<p class="soft">Two figures are the means of the first and the last tenth of the '
        "iterations, three at least; KL is the mean of the last tenth. KL and entropy are nats per "
        "token. An agent's credit is the size of its calls' advantages, added up.</p>"
    )


def tokens_by_iteration(agent: str, rows: Sequence[Row]) -> dict[int, float]:
    """Tokens that an agent sampled in each iteration, in the episodes that were learnt from."""
    return {
        row["iteration"]: row["agents"][agent]["calls"] * row["agents"][agent]["tokens_mean"]
        for row in rows
        if {"calls", "tokens_mean"} <= row["agents"].get(agent, {}).keys()
    }


def calls_per_episode(agent: str, rows: Sequence[Row]) -> float | None:
    """Calls of an agent in an episode that was learnt from; None where no row says so."""
    trained = [row for row in rows if "calls" in row["agents"].get(agent, {})]
    episodes = sum(
        row["episodes"] - max(row["episodes_failed"], row.get("episodes_filtered", 0))
        for row in trained
    )
    return sum(figures(agent, "calls", trained)) / episodes if episodes > 0 else None


def _furthest(agents: Sequence[str], rows: Sequence[Row]) -> str:
    moved = {agent: recent_figure(agent, "kl", rows) for agent in agents}
    known = sorted((kl, agent_of_adapter(agent)) for agent, kl in moved.items() if kl is not None)
    if len(known) < 2:
        return ""
    (least, still), (most, mover) = known[0], known[-1]
    return (
        f"{mover} moved furthest from the base, {most:.3f} nats per token; {still} least, "
        f"{least:.3f}."
    )


def _in_words(agent: str, rows: Sequence[Row]) -> str:
    said = []
    kl = recent_figure(agent, "kl", rows)
    if kl is not None:
        said.append("hardly changed" if kl < _UNMOVED else "changed")
    for figure, least, (less, more) in (
        ("return_mean", 0.05, ("its calls earn less", "its calls earn more")),
        ("tokens_mean", 1.0, ("writes less", "writes more")),
        ("entropy", 0.1, ("surer of its words", "less sure of its words")),
    ):
        start, end = first_figure(agent, figure, rows), recent_figure(agent, figure, rows)
        if start is not None and end is not None and abs(end - start) >= max(least, 0.1 * start):
            said.append(more if end > start else less)
    return ", ".join(said)


def _credit(agent: str, rows: Sequence[Row]) -> float:
    calls, sizes = figures(agent, "calls", rows), figures(agent, "advantage_abs_mean", rows)
    return sum(n * size for n, size in zip(calls, sizes, strict=len(calls) == len(sizes)))


def _from_to(agent: str, figure: str, rows: Sequence[Row], form: str) -> str:
    start, end = first_figure(agent, figure, rows), recent_figure(agent, figure, rows)
    if start is None or end is None:
        return ""
    before, after = format(start, form), format(end, form)
    return after if before == after else f"{before} → {after}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _named(agent: str, nodes: Sequence[str]) -> str:
    shown = agent_of_adapter(agent)
    return shown if nodes in ([], [shown]) else f"{shown} ({', '.join(nodes)})"
