"""report.html: one offline file that says whether a run made the app better, and shows how.

Reads a run folder and nothing else. All text that a model or a user wrote is escaped.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marft_graph.episode import Episode
from marft_graph.errors import CheckpointError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.graph.page import graph_view
from marft_graph.run.comparison_page import STYLE, comparison_section, last_words, readable_text
from marft_graph.run.curves import Curve, line_chart
from marft_graph.run.folder import write_text_atomically
from marft_graph.run.overlay import last_episode, overlays
from marft_graph.run.paired import paired_difference
from marft_graph.run.timeline import to_timeline
from marft_graph.run.tracking import read_evaluations, read_metrics
from marft_graph.run.trajectories import read_traces
from marft_graph.run.troubles import troubles_section
from marft_graph.secret import without_secrets

_SAMPLES = 4


def write_report(run_dir: Path, stopped_by: str = "") -> Path:
    """Write `report.html` into a run folder; its path.

    Args:
        run_dir: the run folder.
        stopped_by: the error that ended the run, to be shown at the top.

    Raises:
        CheckpointError: the folder has no graph.json, its metrics or traces are damaged, or the
            report cannot be written.
    """
    rows, evaluations = read_metrics(run_dir), read_evaluations(run_dir)
    try:
        graph = json.loads((run_dir / "graph.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run_dir} is no run folder: cannot read graph.json: {error}"
        ) from error
    flex_mg = FlexMG.from_dict(graph)
    before, after = (
        _traces(run_dir / "traces" / f"eval_{when}.parquet") for when in ("before", "after")
    )
    parts = [
        f"<h1>{html.escape(run_dir.resolve().name)}</h1>",
        _stop(stopped_by),
        _headline(rows, evaluations, before, after),
        "<h2>Dependency graph</h2>",
        graph_view(flex_mg, overlays(flex_mg, run_dir)),
        timeline_section(run_dir),
        _curves(rows, evaluations),
        _spending(rows),
        comparison_section(run_dir),
        troubles_section(rows, evaluations),
        _samples(before, after),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(run_dir.resolve().name)}: marft-graph report</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = run_dir / "report.html"
    try:
        write_text_atomically(path, page)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return path


def _stop(stopped_by: str) -> str:
    if not stopped_by:
        return ""
    return f"<p><b>The run was stopped:</b> {readable_text(without_secrets(stopped_by))}</p>"


def timeline_section(run_dir: Path) -> str:
    """One episode of the newest traces, as HTML; empty where there is none."""
    episode = last_episode(run_dir)
    drawing = "" if episode is None else to_timeline(episode)
    if not drawing:
        return ""
    return (
        f'<h2>One episode over time</h2><div class="wide">{drawing}</div><p class="soft">A bar is '
        "a call, from its submission to its answer; an arrow leads from a call to one whose prompt "
        "depended on it. Point at a bar for its figures.</p>"
    )


def _headline(
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    before: Sequence[Episode],
    after: Sequence[Episode],
) -> str:
    """Held-out return before and after, and whether the difference is more than noise."""
    if len(evaluations) < 2:
        done = rows[-1]["iteration"] if rows else 0
        return f"<p>{done} iterations; no two evaluations to compare yet.</p>"
    first, last = evaluations[0], evaluations[-1]
    lines = [
        f'<p class="big">Held-out return {first["eval_return"]:.3f} → '
        f"<b>{last['eval_return']:.3f}</b> sampled"
    ]
    if "eval_return_greedy" in first and "eval_return_greedy" in last:
        lines.append(
            f", {first['eval_return_greedy']:.3f} → <b>{last['eval_return_greedy']:.3f}</b> greedy"
        )
    lines.append(f'</p><p class="soft">{last["iteration"]} iterations')
    differences = _paired(before, after)
    if differences:
        found = paired_difference(differences)
        lines.append(
            f", {found.pairs} held-out examples; difference {found.mean:+.3f}, "
            f"95 % interval {found.low:+.3f} to {found.high:+.3f}: <b>{found.verdict}</b>"
        )
    return "".join(lines) + ".</p>"


def _paired(before: Sequence[Episode], after: Sequence[Episode]) -> list[float]:
    old = {e.example_index: e.total_reward for e in before if e.ok}
    return [e.total_reward - old[e.example_index] for e in after if e.ok and e.example_index in old]


def _curves(trained: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    charts = [
        line_chart(
            "Return",
            [
                Curve("training", _points(trained, "return_mean")),
                Curve("held-out", _points(evaluations, "eval_return")),
            ],
        )
    ]
    parts = list(dict.fromkeys(name for row in trained for name in row.get("rewards") or {}))
    rewards = [
        Curve(
            name,
            [
                (row["iteration"], row["rewards"][name])
                for row in trained
                if name in (row.get("rewards") or {})
            ],
        )
        for name in parts
    ]
    if rewards:
        charts.append(line_chart("Rewards", rewards))
    agents = sorted({agent for row in trained for agent in row["agents"]})
    for name, title in (
        ("kl", "KL to the base (nats per token)"),
        ("entropy", "Entropy (nats per token)"),
        ("clip_fraction", "Clipped ratios"),
        ("loss_policy", "Policy loss"),
        ("return_mean", "Return of the agent's calls"),
        ("explained_variance", "Variance of returns that the critic explains"),
        ("distinct_share", "Distinct completions"),
        ("truncated_share", "Truncated completions"),
        ("grad_norm", "Norm of the gradient before clipping"),
    ):
        curves = [
            Curve(
                agent,
                [
                    (row["iteration"], row["agents"][agent][name])
                    for row in trained
                    if isinstance(row["agents"].get(agent, {}).get(name), int | float)
                ],
            )
            for agent in agents
        ]
        charts.append(line_chart(title, curves))
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f'<h2>Learning curves</h2><div class="charts">{figures}</div>' if figures else ""


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["iteration"], row[name]) for row in rows if isinstance(row[name], int | float)]


def _spending(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    rollout = sum(row["seconds_rollout"] for row in rows)
    waited = sum(row.get("seconds_waited", row["seconds_rollout"]) for row in rows)
    update = sum(row["seconds_update"] for row in rows)
    tokens = sum(row["tokens_sampled"] for row in rows)
    episodes = sum(row["episodes"] for row in rows)
    beside = f"; {rollout - waited:.1f} s of it beside updates" if waited < rollout else ""
    return (
        "<h2>Time and tokens</h2><table>"
        f"<tr><th>episodes</th><td>{episodes}</td></tr>"
        f"<tr><th>tokens sampled</th><td>{tokens}</td></tr>"
        f"<tr><th>rollout</th><td>{rollout:.1f} s, "
        f"{tokens / max(rollout, 1e-9):.0f} tokens/s{beside}</td></tr>"
        f"<tr><th>update</th><td>{update:.1f} s</td></tr></table>"
    )


def _samples(before: Sequence[Episode], after: Sequence[Episode]) -> str:
    """The same examples before and after, those that changed most first."""
    old = {episode.example_index: episode for episode in before}
    pairs = [(old[e.example_index], e) for e in after if e.example_index in old]
    pairs.sort(key=lambda pair: pair[0].total_reward - pair[1].total_reward)
    chosen = pairs[: _SAMPLES - 1] + pairs[-1:] if len(pairs) >= _SAMPLES else pairs
    if not chosen:
        return ""
    shown = "".join(
        f'<div class="pair">{_episode(a, "before")}{_episode(b, "after")}</div><br>'
        for a, b in chosen
    )
    return f"<h2>Sample episodes, before and after</h2>{shown}"


def _episode(episode: Episode, when: str) -> str:
    calls = "".join(
        f"<div><b>{readable_text(call.node)}</b>"
        f"<pre>{readable_text(last_words(call.messages))}</pre></div>"
        for call in episode.calls
    )
    outcome = f"return {episode.total_reward:.2f}" if episode.ok else readable_text(episode.status)
    example = readable_text(json.dumps(dict(episode.example), ensure_ascii=False))
    return (
        f'<div class="card"><span class="soft">{when}, {outcome}</span>'
        f"<pre>{example}</pre>{calls}</div>"
    )


def _traces(path: Path) -> list[Episode]:
    return read_traces(path) if path.exists() else []
