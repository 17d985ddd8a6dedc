"""A comparison of policies as HTML: a section of a run's report, or a page of its own.

Reads the JSON that a comparison is written as, and nothing else. All text that a model or a user
wrote is escaped.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marft_graph.errors import CheckpointError
from marft_graph.visible import visible

COMPARISON = "comparison.json"
STYLE = """
:root{color-scheme:light dark;--ink:#1f2937;--soft:#6b7280;--line:#e5e7eb;--card:#f9fafb;
--good:#15803d;--bad:#b91c1c}
@media (prefers-color-scheme:dark){:root{--ink:#f3f4f6;--soft:#9ca3af;--line:#374151;
--card:#1f2937;--good:#4ade80;--bad:#f87171}
body{background:#111827}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);max-width:68rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
.big{font-size:1.3rem}.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top;
overflow-wrap:anywhere}
.wide{overflow-x:auto}.wide svg{max-width:none}
.nodes{font-size:.9rem}.nodes th{overflow-wrap:normal;min-width:4.5rem}
.nodes th:first-child{min-width:6rem}.nodes th:last-child{min-width:11rem}
h4{margin:.4rem 0 0;font-size:.95rem}.card+.card{margin-top:1rem}
summary{cursor:pointer}li{margin:.4rem 0;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .9rem;
min-width:0;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0 .6rem;font-size:.85rem;
max-height:16rem;overflow-y:auto}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
figure{margin:0}svg{max-width:100%;height:auto}
body .view .canvas{height:26rem}
"""
_SHOWN_TEXT = 4000


def comparison_section(run_dir: Path) -> str:
    """The comparison that `marft-graph eval --into RUN` left in a run folder; empty without one.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = run_dir / COMPARISON
    if not path.is_file():
        return ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return "<h2>Policies side by side</h2>" + comparison_html(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no comparison: {error!r}") from error


def write_page(comparison: Mapping[str, Any], path: Path) -> Path:
    """Write a comparison as a page of its own, which works offline."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,"><title>marft-graph comparison</title>'
        f"<style>{STYLE}</style></head><body><h1>Policies side by side</h1>"
        f"{comparison_html(comparison)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def comparison_html(comparison: Mapping[str, Any]) -> str:
    """The tables and examples of a comparison, as `Comparison.to_dict` has them."""
    against = html.escape(str(comparison["against"]))
    how = "greedy" if comparison["greedy"] else "sampled"
    rows = [_policy(row, comparison["differences"]) for row in comparison["policies"]]
    return (
        f'<div class="wide"><table><tr><th>policy</th><th>return ({how})</th>'
        f"<th>difference to {against}</th><th>verdict</th><th>tokens</th><th>seconds</th>"
        f"<th>cost</th><th>failed</th></tr>{''.join(rows)}</table></div>"
        '<p class="soft">Tokens (read + written), seconds and cost are those of an episode. The '
        "difference is paired: the same examples and seeds, with a 95 % bootstrap interval.</p>"
        f'<h3>Node by node</h3><div class="wide"><table><tr><th>node</th><th>policy</th>'
        "<th>calls</th><th>tokens read</th><th>tokens written</th><th>truncated</th>"
        f"<th>seconds</th></tr>{_nodes(comparison['policies'])}</table></div>"
        f"{_failed(comparison['policies'])}"
        f"{_changed('Examples that got better', comparison['better'], against)}"
        f"{_changed('Examples that got worse', comparison['worse'], against)}"
    )


def _policy(row: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    own = row["evaluation"]
    found = differences.get(row["name"])
    gain, word = "", ""
    if found is not None:
        gain = f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
        word = f"<b>{found['verdict']}</b>, {found['pairs']} examples"
    read, written = row["tokens_per_episode"]
    cost = row["cost_per_episode"]
    return (
        f"<tr><td>{html.escape(row['name'])}</td>"
        f"<td>{own['return_mean']:.3f} ± {own['return_stderr']:.3f}</td><td>{gain}</td>"
        f"<td>{word}</td><td>{read:.0f} + {written:.0f}</td>"
        f"<td>{row['seconds_per_episode']:.2f}</td><td>{'' if cost is None else f'{cost:.6f}'}</td>"
        f"<td>{own['episodes_failed']} of {own['episodes']}</td></tr>"
    )


def _nodes(policies: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({node for row in policies for node in row["nodes"]})
    lines = []
    for node in names:
        for row in policies:
            own = row["nodes"].get(node)
            if own is not None:
                lines.append(
                    f"<tr><td>{html.escape(node)}</td><td>{html.escape(row['name'])}</td>"
                    f"<td>{own['calls_per_episode']:.2f}</td><td>{own['prompt_tokens']:.1f}</td>"
                    f"<td>{own['completion_tokens']:.1f}</td><td>{own['truncated_share']:.1%}</td>"
                    f"<td>{own['seconds']:.2f}</td></tr>"
                )
    return "".join(lines)


def _failed(policies: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"<tr><td>{html.escape(row['name'])}</td><td>{readable_text(reason)}</td><td>{count}</td></tr>"
        for row in policies
        for reason, count in row["evaluation"]["failed_by_reason"].items()
    ]
    if not lines:
        return ""
    return (
        "<h3>Failures</h3><p>A failed episode has no return; its pair is left out.</p><table>"
        f"<tr><th>policy</th><th>reason</th><th>episodes</th></tr>{''.join(lines)}</table>"
    )


def _changed(title: str, examples: Sequence[Mapping[str, Any]], against: str) -> str:
    if not examples:
        return ""
    shown = "".join(
        f"<pre>{readable_text(json.dumps(own['example'], ensure_ascii=False, default=repr))}</pre>"
        f'<div class="pair">{_episode(own["before"], against)}'
        f"{_episode(own['after'], html.escape(own['policy']))}</div><br>"
        for own in examples
    )
    return f"<h3>{title}</h3>{shown}"


def _episode(told: Mapping[str, Any], name: str) -> str:
    calls = "".join(
        f"<div><b>{readable_text(call['node'])}</b>"
        f"<pre>{readable_text(last_words([call['answer']]))}</pre></div>"
        for call in told["calls"]
    )
    return (
        f'<div class="card"><span class="soft">{name}, return {told["return"]:.2f}</span>'
        f"{calls}</div>"
    )


def last_words(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text and the tool calls of a conversation's last message."""
    if not messages:
        return ""
    answer = messages[-1]
    tools = "".join(f"\n{call}" for call in answer.get("tool_calls", ()))
    return f"{answer.get('content', '')}{tools}"


def readable_text(text: str) -> str:
    """Text as HTML: escaped, control characters made visible, very long text cut."""
    cut = text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]} … ({len(text)} characters)"
    return html.escape(visible(cut))
