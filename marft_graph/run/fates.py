"""Why each node is learning or not, from the fates of its calls: on the console and in reports.

Reads rows of metrics. What a fate is, and which one a call has, is decided in `learn.fate`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from marft_graph.learn.fate import Fate
from marft_graph.run.comparison_page import readable_text

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


class IdleNodes:
    """Says of trained nodes that they were not called: once while a run goes on, and at its end.

    Args:
        nodes: those that are trained.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = tuple(nodes)
        self._told: set[str] = set()

    def see(self, iteration: int, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
        """The trained nodes that made no call in an iteration; the console hears of each once.

        Args:
            iteration: its number.
            counts: its calls by node and fate.
        """
        idle = [node for node in self._nodes if node not in counts]
        new = [node for node in idle if node not in self._told]
        self._told.update(new)
        if new:
            logger.warning(
                "iteration %d never called %s, which it trains: no episode came there, so nothing "
                "was learnt (metrics.jsonl has such nodes as never_called)",
                iteration,
                ", ".join(new),
            )
        return idle

    def sum_up(self, rows: Sequence[Row]) -> None:
        """Say at a run's end how many of its iterations did not call a trained node."""
        for line in idle_lines(rows, self._nodes):
            logger.warning("%s", line)


def idle_lines(rows: Sequence[Row], nodes: Sequence[str]) -> list[str]:
    """One sentence for each trained node that some iteration did not call."""
    known = [row for row in rows if "never_called" in row]
    lines = []
    for node in nodes:
        missed = sum(node in row["never_called"] for row in known)
        if missed and missed == len(known):
            lines.append(
                f"{node} is trained, but no iteration of the run ever called it: its adapter is "
                "as it was. Is it on a path that the examples take?"
            )
        elif missed:
            lines.append(
                f"{node} is trained, but {missed} of {len(known)} iterations never called it"
            )
    return lines


def fates_of_run(rows: Sequence[Row]) -> dict[str, Counter[Fate]]:
    """How many calls of each node came to each fate, over all iterations."""
    counted: dict[str, Counter[Fate]] = {}
    for row in rows:
        for node, counts in (row.get("fates") or {}).items():
            of_node = counted.setdefault(node, Counter())
            of_node.update({Fate(name): count for name, count in counts.items()})
    return counted


def fates_text(rows: Sequence[Row], nodes: Sequence[str]) -> str:
    """Why each node is learning or not, for a terminal; empty where no row tells fates.

    Args:
        rows: of `metrics.jsonl`.
        nodes: those that are trained.
    """
    counted = fates_of_run(rows)
    if not counted:
        return ""
    lines = ["Why is a node (not) learning? What became of its calls:"]
    for node in _in_order(counted, nodes):
        lines.append(f"  {node}: {_learnt(counted.get(node, Counter()))}")
        for fate, count, share in _shares(counted.get(node, Counter())):
            lines.append(f"    {count:>7} {share:>4.0%}  {fate.value}: {fate.words}")
    lines += [f"  {line}" for line in idle_lines(rows, nodes)]
    return "\n".join(lines)


def fates_section(rows: Sequence[Row], nodes: Sequence[str]) -> str:
    """The same as HTML, with what to do; empty where no row tells fates."""
    counted = fates_of_run(rows)
    if not counted:
        return ""
    lines = []
    for node in _in_order(counted, nodes):
        of_node = counted.get(node, Counter())
        shares = "<br>".join(
            f"{count} ({share:.0%}) {readable_text(fate.value)}: {readable_text(fate.words)}"
            for fate, count, share in _shares(of_node)
        )
        lines.append(
            f"<tr><td>{readable_text(node)}</td><td>{readable_text(_learnt(of_node))}</td>"
            f"<td>{shares}</td><td>{readable_text(_remedy(of_node))}</td></tr>"
        )
    idle = "".join(f"<p><b>{readable_text(line)}.</b></p>" for line in _ended(rows, nodes))
    return (
        f"<h2>Why is a node (not) learning?</h2>{idle}"
        '<div class="wide"><table><tr><th>node</th><th></th><th>what became of its calls</th>'
        f"<th>what to do</th></tr>{''.join(lines)}</table></div>"
        '<p class="soft">Each call of the training episodes is counted once.</p>'
    )


def fates_dict(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """The same as plain values, for JSON."""
    counted = fates_of_run(rows)
    return {
        node: {fate.value: n for fate, n in of_node.items()} for node, of_node in counted.items()
    }


def _in_order(counted: Mapping[str, Counter[Fate]], nodes: Sequence[str]) -> list[str]:
    return [*nodes, *sorted(counted.keys() - set(nodes))]


def _shares(of_node: Counter[Fate]) -> list[tuple[Fate, int, float]]:
    return [(fate, count, count / of_node.total()) for fate, count in of_node.most_common()]


def _learnt(of_node: Counter[Fate]) -> str:
    learnt = sum(count for fate, count in of_node.items() if fate.is_learnt)
    if not of_node:
        return "it was never called"
    return f"{learnt} of {of_node.total()} calls were learnt from"


def _remedy(of_node: Counter[Fate]) -> str:
    """What to do about the fate that most calls came to that were not learnt from."""
    for fate, _ in of_node.most_common():
        if not fate.is_learnt or (fate.remedy and of_node[fate] * 10 > of_node.total()):
            return fate.remedy
    return ""


def _ended(rows: Sequence[Row], nodes: Sequence[str]) -> list[str]:
    return [line.rstrip(".?") for line in idle_lines(rows, nodes)]
