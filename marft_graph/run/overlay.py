"""What a run folder says of each agent, for the graph's page: calls, failures, learning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marft_graph.episode import Episode
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.graph.page import Overlay
from marft_graph.run.advice import last_tenth, recent_figure
from marft_graph.run.curves import Curve, line_chart
from marft_graph.run.node_table import calls_per_episode
from marft_graph.run.tracking import read_metrics
from marft_graph.run.trajectories import read_traces


def overlays(flex_mg: FlexMG, run_dir: Path) -> dict[str, Overlay]:
    """For every agent that was trained, the figures of the run's last tenth and its curves.

    Raises:
        CheckpointError: the metrics are damaged.
    """
    rows = read_metrics(run_dir)
    found = {}
    for agent in flex_mg.agents:
        name = flex_mg.adapter(agent)
        trained = [row for row in rows if name in row["agents"]]
        if trained:
            found[agent] = Overlay(
                _facts(agent, name, rows, trained), _chart(name, trained), _note(name, trained)
            )
    return found


def last_episode(run_dir: Path) -> Episode | None:
    """An episode to look at: of the newest traces the first whole one with the most calls."""
    return max(newest_episodes(run_dir), key=lambda episode: len(episode.calls), default=None)


def newest_episodes(run_dir: Path) -> list[Episode]:
    """The whole episodes of the newest traces."""
    traces = run_dir / "traces"
    files = sorted(traces.glob("iter_*.parquet")) or sorted(traces.glob("*.parquet"))
    return [episode for episode in read_traces(files[-1]) if episode.ok] if files else []


def _facts(
    agent: str, name: str, rows: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    recent = last_tenth(trained)
    figures = [row["agents"][name] for row in recent]
    calls = sum(agent.get("calls", 0) for agent in figures)
    tokens = sum(agent.get("calls", 0) * agent.get("tokens_mean", 0) for agent in figures)
    per_episode = calls_per_episode(name, recent)
    failed = sum((row.get("failed_by_node") or {}).get(agent, 0) for row in rows)
    everything = sum(row["episodes"] for row in rows)
    facts = [
        ("calls per episode", "-" if per_episode is None else f"{per_episode:.2f}"),
        ("tokens per call", f"{tokens / max(calls, 1):.1f}"),
        ("episodes that failed here, of the whole run", f"{failed / max(everything, 1):.1%}"),
    ]
    for key, label in (
        ("advantage_abs_mean", "advantage, mean size"),
        ("return_mean", "return of its calls"),
        ("kl", "KL to the base, nats per token"),
    ):
        values = [agent[key] for agent in figures if isinstance(agent.get(key), int | float)]
        if values:
            facts.append((label, f"{statistics.fmean(values):.3f}"))
    return facts


def _note(name: str, trained: Sequence[Mapping[str, Any]]) -> str:
    """Tokens in an episode and KL, where they are known."""
    calls, tokens = calls_per_episode(name, trained), recent_figure(name, "tokens_mean", trained)
    kl = recent_figure(name, "kl", trained)
    parts = [] if calls is None or tokens is None else [f"{calls * tokens:.0f} tokens"]
    return " · ".join(parts if kl is None else [*parts, f"KL {kl:.2f}"])


def _chart(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    points = [
        (row["iteration"], row["agents"][name]["return_mean"])
        for row in rows
        if isinstance(row["agents"][name].get("return_mean"), int | float)
    ]
    return line_chart("Return of its calls", [Curve("training", points)])
