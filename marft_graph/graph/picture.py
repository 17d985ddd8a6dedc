"""A Flex-MG as a picture: SVG for pages, and PNG of the same layout for what shows no SVG."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from marft_graph.graph.flex_mg import EVIDENCE, Evidence, FlexMG
from marft_graph.graph.layout import Layout, Place, Point, layout

_STYLE = """
.text{font:14px system-ui,sans-serif;text-anchor:middle;dominant-baseline:central;fill:#1f2937}
.stat{font:10.5px system-ui,sans-serif;text-anchor:middle;dominant-baseline:central;fill:#4b5563}
.agent{fill:#dbeafe;stroke:#2563eb;stroke-width:1.5}
.environment{fill:#f3f4f6;stroke:#6b7280;stroke-width:1.5}
.boundary{fill:#6b7280}
.control{stroke:#4b5563;fill:none;stroke-width:1.5}
.conditional{stroke:#4b5563;fill:none;stroke-width:1.5;stroke-dasharray:6 4}
.fan_out{stroke:#4b5563;fill:none;stroke-width:3}
.observes{stroke:#ea580c;fill:none;stroke-width:1.5}
.carries{stroke:#ea580c}.run{stroke:#9333ea}.schema{stroke-opacity:.45}
.frozen{fill:#f3f4f6;stroke:#2563eb;stroke-width:1.5;stroke-dasharray:3 3}
.tip{fill:#4b5563}.observes-tip{fill:#ea580c}.run-tip{fill:#9333ea}
@media (prefers-color-scheme: dark){
.text{fill:#f3f4f6}.stat{fill:#d1d5db}.agent{fill:#1e3a8a;stroke:#93c5fd}.environment{fill:#374151;stroke:#9ca3af}
.boundary,.tip{fill:#9ca3af}.control,.conditional,.fan_out{stroke:#9ca3af}
.observes,.carries{stroke:#fb923c}.observes-tip{fill:#fb923c}
.run{stroke:#c084fc}.run-tip{fill:#c084fc}
.frozen{fill:#374151;stroke:#93c5fd}}
"""
_ARC_ROOM = 64.0
_TIP = 7.0
# Light-page colours of the style above, for PNG: fill and stroke.
_BOXES = {
    "agent": ("#dbeafe", "#2563eb"),
    "frozen": ("#f3f4f6", "#2563eb"),
    "environment": ("#f3f4f6", "#6b7280"),
    "boundary": ("#6b7280", "#6b7280"),
}
_GREY = "#4b5563"
_COLOURS = {"code": "#ea580c", "run": "#9333ea", "schema": "#f6b08a"}

Cubic = tuple[Point, Point, Point, Point]
"""A Bezier curve: start, two handles, end."""


@dataclass(frozen=True, slots=True)
class Way:
    """A line of the picture, from box to box."""

    source: str
    target: str
    kind: str
    """Of the edge; `observes` where no edge shows what is observed."""
    evidence: Evidence | None
    """What it is known from that the target may read what the source may write; None: it may not.
    Orange where the code says so, purple where a run has shown it, pale where only the schema
    admits it."""
    curves: Sequence[Cubic]


def to_svg(flex_mg: FlexMG, notes: Mapping[str, str] | None = None) -> str:
    """A picture for light and dark pages: control flow downward, in orange where data goes too.

    Args:
        flex_mg: what to draw.
        notes: a short text under the name of a node, in its box.
    """
    plan = layout(flex_mg)
    width = _full_width(flex_mg, plan)
    shapes = [_svg_way(way) for way in ways(flex_mg, plan)]
    for node, place in plan.places.items():
        role = str(flex_mg.graph.nodes[node]["role"])
        shapes.append(_svg_box(node, role, place, (notes or {}).get(node, "")))
    label = html.escape(f"Dependency graph of {', '.join(flex_mg.agents)}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width:.0f} {plan.height:.0f}" width="{width:.0f}" '
        f'height="{plan.height:.0f}"><style>{_STYLE}</style>'
        f"<defs>{_svg_tip('tip')}{_svg_tip('observes-tip')}{_svg_tip('run-tip')}</defs>{''.join(shapes)}</svg>\n"
    )


def write_png(flex_mg: FlexMG, path: Path) -> None:
    """The same picture as a PNG in the colours for light pages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Outline

    plan = layout(flex_mg)
    width = _full_width(flex_mg, plan)
    figure = plt.figure(figsize=(width / 72, plan.height / 72), dpi=144)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(plan.height, 0))
    axes.set_axis_off()
    for way in ways(flex_mg, plan):
        line = "--" if way.kind == "conditional" else "-"
        colour = _GREY if way.evidence is None else _COLOURS[way.evidence]
        vertices = [way.curves[0][0], *(point for cubic in way.curves for point in cubic[1:])]
        codes = [Outline.MOVETO, *[Outline.CURVE4] * (len(vertices) - 1)]
        arrow = FancyArrowPatch(
            path=Outline(vertices, codes), arrowstyle="-|>", mutation_scale=10, lw=1.2
        )
        arrow.set(linestyle=line, color=colour)
        axes.add_patch(arrow)
    for node, place in plan.places.items():
        role = str(flex_mg.graph.nodes[node]["role"])
        fill, stroke = _BOXES.get(role, _BOXES["environment"])
        rounding = min(place.half_height, 18 if role == "agent" else 5)
        box = FancyBboxPatch(
            (place.x - place.half_width, place.y - place.half_height),
            2 * place.half_width,
            2 * place.half_height,
            boxstyle=f"round,pad=0,rounding_size={7 if role == 'boundary' else rounding}",
        )
        box.set(facecolor=fill, edgecolor=stroke, zorder=3)
        axes.add_patch(box)
        if role != "boundary":
            text = node.replace("$", r"\$")  # else matplotlib reads mathematics
            axes.text(place.x, place.y, text, ha="center", va="center", fontsize=10, zorder=4)
    figure.savefig(path, format="png")
    plt.close(figure)


def _full_width(flex_mg: FlexMG, plan: Layout) -> float:
    return plan.width + (_ARC_ROOM if flex_mg.distant_observations else 0.0)


def ways(flex_mg: FlexMG, plan: Layout) -> Iterator[Way]:
    """Every line of the picture."""
    for a, b, kind in flex_mg.control_edges:
        start, end = plan.places[a], plan.places[b]
        if end.y > start.y:
            curves = _downward(start, plan.bends.get((a, b), ()), end)
        else:
            curves = [_back(start, end)]
        yield Way(a, b, kind, flex_mg.read_by(a, b), curves)
    for i, j in flex_mg.distant_observations:
        evidence = flex_mg.evidence(i, j)
        yield Way(j, i, "observes", evidence, [_arc(plan.places[j], plan.places[i])])


def _downward(start: Place, bends: Sequence[Point], end: Place) -> list[Cubic]:
    points = [
        (start.x, start.y + start.half_height),
        *bends,
        (end.x, end.y - end.half_height - _TIP),
    ]
    return [
        ((x0, y0), (x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), (x1, y1))
        for (x0, y0), (x1, y1) in itertools.pairwise(points)
    ]


def _back(start: Place, end: Place) -> Cubic:
    """Round the left side: an edge of a loop, or to the node itself."""
    left, right = start.x - start.half_width, end.x - end.half_width
    bend = min(left, right) - 22
    return (left, start.y + 6), (bend, start.y + 6), (bend, end.y - 6), (right - _TIP, end.y - 6)


def _arc(source: Place, target: Place) -> Cubic:
    """Round the right side: from who is observed to who observes."""
    start, end = source.x + source.half_width, target.x + target.half_width
    bend = max(start, end) + 46
    return (start, source.y), (bend, source.y), (bend, target.y), (end + _TIP + 1, target.y)


def _svg_way(way: Way) -> str:
    def text(point: Point) -> str:
        return f"{point[0]:.1f},{point[1]:.1f}"

    curves = " ".join(f"C{text(c[1])} {text(c[2])} {text(c[3])}" for c in way.curves)
    kind, tip, known = way.kind, "tip", ""
    if way.evidence is not None:
        kind = f"{way.kind} carries {way.evidence}"
        tip = "run-tip" if way.evidence == "run" else "observes-tip"
        known = f"<title>read: {EVIDENCE[way.evidence]}</title>"
    start = text(way.curves[0][0])
    ends = f'data-source="{html.escape(way.source)}" data-target="{html.escape(way.target)}"'
    path = f'<path class="{kind}" {ends} d="M{start} {curves}" marker-end="url(#{tip})"'
    return f"{path}>{known}</path>" if known else f"{path}/>"


def _svg_box(node: str, role: str, place: Place, note: str) -> str:
    if role == "boundary":
        return f'<circle class="boundary" cx="{place.x:.1f}" cy="{place.y:.1f}" r="7"/>'
    name = html.escape(node)
    y, below = place.y, ""
    if note:
        y -= 7
        at = f'x="{place.x:.1f}" y="{place.y + 10:.1f}"'
        below = f'<text class="stat" {at}>{html.escape(note)}</text>'
    return (
        f'<g class="node" data-node="{name}">'
        f'<rect class="{role}" x="{place.x - place.half_width:.1f}" '
        f'y="{place.y - place.half_height:.1f}" width="{2 * place.half_width:.1f}" '
        f'height="{2 * place.half_height:.1f}" rx="{18 if role == "agent" else 4}"/>'
        f'<text class="text" x="{place.x:.1f}" y="{y:.1f}">{name}</text>{below}</g>'
    )


def _svg_tip(name: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="{name}" d="M0,0 L8,4 L0,8 z"/>'
        "</marker>"
    )
