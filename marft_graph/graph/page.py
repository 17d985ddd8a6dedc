"""A Flex-MG as a page: one offline HTML file with a graph that can be moved, zoomed and clicked."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from marft_graph.graph.draw import role_of, summary
from marft_graph.graph.flex_mg import EVIDENCE, FlexMG
from marft_graph.graph.picture import to_svg

_MOST_EXPLAINED = 25  # agents; with more, only what is observed is explained
_LEGEND = (
    "Blue boxes are agents (dashed: not trained), grey ones call no model. An arrow says what runs "
    "next (dashed: on a condition, thick: once for each Send); where it has a colour, what one "
    "node writes the next may read: orange by its code, purple seen in a run, pale by its state "
    "schema alone."
)
_NOTES = (
    "Under an agent's name: tokens that it writes in an episode, and its KL to the base in nats "
    "per token."
)
_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:90rem;padding:0 1rem;
color:#1f2937}
h1{font-size:1.4rem}h2{font-size:1.15rem}pre{white-space:pre-wrap;overflow-wrap:anywhere}
.soft{color:#6b7280}.wide{overflow-x:auto}
@media (prefers-color-scheme:dark){body{background:#111827;color:#f3f4f6}.soft{color:#9ca3af}}
"""


@dataclass(frozen=True, slots=True)
class Overlay:
    """What happened to an agent in training."""

    facts: Sequence[tuple[str, str]]
    """(name, value) pairs, as they are shown."""
    curve: str = ""
    """An SVG of its learning curve."""
    note: str = ""
    """A few figures to stand in its box, at most twenty-two characters or so."""


def to_html(
    flex_mg: FlexMG,
    *,
    title: str = "Dependency graph",
    overlays: Mapping[str, Overlay] | None = None,
    below: str = "",
) -> str:
    """The whole page.

    Args:
        flex_mg: what to show.
        title: of the page, as text.
        overlays: what to say of an agent besides, by its name.
        below: more HTML under the graph.
    """
    text = html.escape(summary(flex_mg))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{graph_view(flex_mg, overlays)}{below}"
        f"<h2>In words</h2><pre>{text}</pre></body></html>\n"
    )


def graph_view(flex_mg: FlexMG, overlays: Mapping[str, Overlay] | None = None) -> str:
    """The graph with its panel, as a piece of HTML with its own style and script."""
    here = resources.files("marft_graph.graph")
    style = (here / "page.css").read_text(encoding="utf-8")
    script = (here / "page.js").read_text(encoding="utf-8")
    nodes = {node: _about(flex_mg, node, (overlays or {}).get(node)) for node in flex_mg.order}
    data = json.dumps({"nodes": nodes}, ensure_ascii=False).replace("<", "\\u003c")
    notes = {node: overlay.note for node, overlay in (overlays or {}).items() if overlay.note}
    legend = f"{_LEGEND} {_NOTES}" if notes else _LEGEND
    return (
        f'<style>{style}</style><div class="view"><div class="canvas">{to_svg(flex_mg, notes)}'
        '<div class="tools"><button data-do="in" aria-label="zoom in">+</button>'
        '<button data-do="out" aria-label="zoom out">&minus;</button>'
        '<button data-do="all" aria-label="show all">all</button></div></div>'
        '<aside class="panel" aria-live="polite"></aside>'
        f'<script type="application/json">{data}</script><script>{script}</script></div>'
        f'<p class="soft">{legend}</p>'
    )


def _about(flex_mg: FlexMG, node: str, overlay: Overlay | None) -> dict[str, Any]:
    observes, never = [], []
    explain_never = len(flex_mg.agents) <= _MOST_EXPLAINED
    for agent in flex_mg.agents:
        dependency = flex_mg.dependency(node, agent)
        if dependency != "never":
            why = flex_mg.explain(node, agent).partition("): ")[2]
            known = f"{dependency}, {EVIDENCE[flex_mg.evidence(node, agent)]}"
            observes.append({"agent": agent, "dependency": known, "why": why})
        elif agent != node and explain_never:
            never.append({"agent": agent, "why": flex_mg.explain(node, agent)})

    calls = flex_mg.graph.nodes[node].get("calls")
    facts = list(overlay.facts) if overlay else []
    if calls is not None:
        facts.append(("calls in a dry run", f"{calls:g}"))
    return {
        "role": role_of(flex_mg, node),
        "observes": observes,
        "observed_by": [a for a in flex_mg.agents if flex_mg.dependency(a, node) != "never"],
        "never": never,
        "run": facts,
        "curve": overlay.curve if overlay else "",
    }
