"""The learning curves of a run's report: returns, rewards, tokens, and what moved in each agent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from marft_graph.names import agent_of_adapter
from marft_graph.run.curves import Curve, line_chart
from marft_graph.run.node_table import tokens_by_iteration

Row = Mapping[str, Any]

_BY_AGENT = (
    ("tokens_mean", "Tokens of a call"),
    ("kl", "KL to the base (nats per token)"),
    ("entropy", "Entropy (nats per token)"),
    ("clip_fraction", "Clipped ratios"),
    ("loss_policy", "Policy loss"),
    ("return_mean", "Return of the agent's calls"),
    ("explained_variance", "Variance of returns that the critic explains"),
    ("distinct_share", "Distinct completions"),
    ("truncated_share", "Truncated completions"),
    ("grad_norm", "Norm of the gradient before clipping"),
)


def curves_section(rows: Sequence[Row], evaluations: Sequence[Row]) -> str:
    """All charts that have a point, as HTML.

    Args:
        rows: of `metrics.jsonl`.
        evaluations: rows of `evaluations.jsonl`.
    """
    agents = sorted({agent for row in rows for agent in row["agents"]})
    rewards = dict.fromkeys(name for row in rows for name in row.get("rewards") or {})
    charts = [
        line_chart(
            "Return",
            [
                Curve("training", _points(rows, "return_mean")),
                Curve("held-out", _points(evaluations, "eval_return")),
            ],
        ),
        line_chart("Rewards", [_inner("rewards", name, rows) for name in rewards]),
        line_chart(
            "Tokens sampled in an iteration",
            [
                Curve(agent_of_adapter(agent), list(tokens_by_iteration(agent, rows).items()))
                for agent in agents
            ],
        ),
    ]
    for figure, title in _BY_AGENT:
        curves = [
            Curve(
                agent_of_adapter(agent),
                _numbers((row, row["agents"].get(agent, {}).get(figure)) for row in rows),
            )
            for agent in agents
        ]
        charts.append(line_chart(title, curves))
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f'<h2>Learning curves</h2><div class="charts">{figures}</div>' if figures else ""


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    return _numbers((row, row[name]) for row in rows)


def _inner(group: str, name: str, rows: Sequence[Row]) -> Curve:
    return Curve(name, _numbers((row, (row.get(group) or {}).get(name)) for row in rows))


def _numbers(values: Iterable[tuple[Row, Any]]) -> list[tuple[float, float]]:
    return [(row["iteration"], value) for row, value in values if isinstance(value, int | float)]
