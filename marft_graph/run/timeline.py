"""One episode as a picture: who called when, side by side or not, and who fed whom."""

from __future__ import annotations

import html

from marft_graph.episode import Call, Episode

_LABEL, _WIDTH, _ROW, _BAR, _TOP = 190.0, 760.0, 34.0, 18.0, 26.0
_LEAST = 5.0  # pixels of the shortest bar
_STYLE = (
    ".row{stroke:currentColor;opacity:.15}.bar{fill:#2563eb}.feeds{stroke:#ea580c;fill:none;"
    "stroke-width:1.5}.feeds-tip{fill:#ea580c}"
)


def to_timeline(episode: Episode) -> str:
    """An SVG with a row for each node, a bar for each call, and arrows to the calls that it fed.

    Empty for an episode without calls. Time runs from left to right, in seconds.
    """
    if not episode.calls:
        return ""
    nodes = list(dict.fromkeys(call.node for call in episode.calls))
    end = max(call.started + call.seconds for call in episode.calls) or 1.0
    height = _TOP + _ROW * len(nodes) + 24

    def x(seconds: float) -> float:
        return _LABEL + seconds / end * _WIDTH

    def y(call: Call) -> float:
        return _TOP + _ROW * (nodes.index(call.node) + 0.5)

    parts = []
    for row, node in enumerate(nodes):
        middle = _TOP + _ROW * (row + 0.5)
        parts.append(
            f'<line class="row" x1="{_LABEL}" x2="{_LABEL + _WIDTH}" y1="{middle}" y2="{middle}"/>'
            f'<text x="{_LABEL - 10}" y="{middle + 4}" text-anchor="end">{_short(node)}</text>'
        )
    for call in episode.calls:
        left, width = x(call.started), max(call.seconds / end * _WIDTH, _LEAST)
        fed_by = ", ".join(f"{p} ({episode.calls[p].node})" for p in call.parents) or "no call"
        said = (
            f"call {call.index} of {call.node}: {len(call.completion_ids)} tokens, "
            f"{call.seconds:.2f} s from {call.started:.2f} s; depends on {fed_by}"
        )
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y(call) - _BAR / 2:.1f}" width="{width:.1f}" '
            f'height="{_BAR}" rx="3"><title>{html.escape(said)}</title></rect>'
        )
    for call in episode.calls:
        for parent in call.parents:
            before = episode.calls[parent]
            start, stop = x(before.started + before.seconds), x(call.started)
            a, b = y(before), y(call)
            bend = max((stop - start) / 2, 14)
            parts.append(
                f'<path class="feeds" d="M{start:.1f},{a:.1f} C{start + bend:.1f},{a:.1f} '
                f'{stop - bend:.1f},{b:.1f} {stop:.1f},{b:.1f}" marker-end="url(#feeds-tip)"/>'
            )
    for share in (0.0, 0.5, 1.0):
        at = _LABEL + share * _WIDTH
        parts.append(
            f'<text x="{at}" y="{height - 6}" text-anchor="middle" opacity=".7">'
            f"{share * end:.2f} s</text>"
        )
    width = _LABEL + _WIDTH + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="system-ui,sans-serif" '
        'font-size="12" fill="currentColor" role="img" aria-label="Calls of one episode over time">'
        f'<style>{_STYLE}</style><defs><marker id="feeds-tip" viewBox="0 0 8 8" refX="7" '
        'refY="4" markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse" orient="auto">'
        '<path class="feeds-tip" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
        f"{''.join(parts)}</svg>"
    )


def _short(node: str) -> str:
    return html.escape(node if len(node) <= 26 else f"…{node[-25:]}")
