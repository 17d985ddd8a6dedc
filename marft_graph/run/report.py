"""report.html: one offline file that says whether a run made the app better, and shows how.

Reads a run folder and nothing else. All text that a model or a user wrote is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marft_graph.episode import Episode
from marft_graph.errors import CheckpointError
from marft_graph.graph.page import graph_view
from marft_graph.run.advice import advice
from marft_graph.run.changed import changed_section
from marft_graph.run.comparison_page import STYLE, comparison_section, readable_text
from marft_graph.run.fates import fates_section
from marft_graph.run.folder import read_graph, write_text_atomically
from marft_graph.run.headline import headline_section
from marft_graph.run.learning_charts import curves_section
from marft_graph.run.node_table import nodes_section
from marft_graph.run.overlay import last_episode, overlays
from marft_graph.run.timeline import to_timeline
from marft_graph.run.tracking import read_evaluations, read_metrics
from marft_graph.run.trajectories import read_traces
from marft_graph.run.troubles import first_errors, troubles_section
from marft_graph.secret import without_secrets


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
    flex_mg = read_graph(run_dir)
    before, after = (
        _traces(run_dir / "traces" / f"eval_{when}.parquet") for when in ("before", "after")
    )
    parts = [
        f"<h1>{html.escape(run_dir.resolve().name)}</h1>",
        _stop(stopped_by),
        headline_section(rows, evaluations, before, after),
        _warnings(rows, evaluations),
        "<h2>Dependency graph</h2>",
        graph_view(flex_mg, overlays(flex_mg, run_dir)),
        *(f"<p>{readable_text(note)}</p>" for note in flex_mg.notes),
        nodes_section(flex_mg, rows),
        fates_section(rows, flex_mg.agents),
        changed_section(before, after),
        curves_section(rows, evaluations),
        _spending(rows),
        comparison_section(run_dir),
        troubles_section(rows, evaluations, first_errors(rows, run_dir)),
        timeline_section(run_dir),
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


def _warnings(rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    found = advice(rows, evaluations)
    if not found:
        return "<h2>Health</h2><p>Nothing in the metrics calls for a look.</p>"
    by_remedy: dict[str, list[str]] = {}
    for one in found:
        by_remedy.setdefault(one.remedy, []).append(f"{one.sign[:1].upper()}{one.sign[1:]}.")
    lines = "".join(
        f"<li><b>{readable_text(' '.join(signs))}</b> {readable_text(remedy)}</li>"
        for remedy, signs in by_remedy.items()
    )
    return f"<h2>Health: worth a look</h2><ul>{lines}</ul>"


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


def _traces(path: Path) -> list[Episode]:
    return read_traces(path) if path.exists() else []
