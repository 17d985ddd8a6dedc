"""Pictures of a Flex-MG: terminal text, Mermaid, and SVG with a layered layout of our own."""

from __future__ import annotations

import html
from dataclasses import dataclass

import networkx as nx

from marft_graph.graph.flex_mg import END, START, FlexMG

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 132, 40, 36, 56, 28
_STYLE = """
.text{font:14px system-ui,sans-serif;text-anchor:middle;dominant-baseline:central;fill:#1f2937}
.agent{fill:#dbeafe;stroke:#2563eb;stroke-width:1.5}
.environment{fill:#f3f4f6;stroke:#6b7280;stroke-width:1.5}
.boundary{fill:#6b7280}
.control{stroke:#4b5563;fill:none;stroke-width:1.5}
.conditional{stroke:#4b5563;fill:none;stroke-width:1.5;stroke-dasharray:6 4}
.fan_out{stroke:#4b5563;fill:none;stroke-width:3}
.observes{stroke:#ea580c;fill:none;stroke-width:1.5;opacity:.75}
.tip{fill:#4b5563}.observes-tip{fill:#ea580c}
@media (prefers-color-scheme: dark){
.text{fill:#f3f4f6}.agent{fill:#1e3a8a;stroke:#93c5fd}.environment{fill:#374151;stroke:#9ca3af}
.boundary,.tip{fill:#9ca3af}.control,.conditional,.fan_out{stroke:#9ca3af}
.observes{stroke:#fb923c}.observes-tip{fill:#fb923c}}
"""


def summary(flex_mg: FlexMG) -> str:
    """A readable summary for the terminal: agents, what each observes, loops, warnings."""
    agents = flex_mg.agents
    width = max((len(agent) for agent in agents), default=0)
    lines = [f"{len(agents)} agents, {len(flex_mg.environment)} environment nodes"]
    for agent in agents:
        seen = [
            other if flex_mg.dependency(agent, other) == "always" else f"{other} (possibly)"
            for other in agents
            if flex_mg.dependency(agent, other) != "never"
        ]
        lines.append(f"  {agent:<{width}}  observes {', '.join(seen) or 'no other agent'}")
    if flex_mg.environment:
        lines.append(f"environment: {', '.join(flex_mg.environment)}")
    lines += [f"loop: {' -> '.join([*loop, loop[0]])}" for loop in flex_mg.loops]
    lines += [f"parallel: {', '.join(group)}" for group in flex_mg.parallel_groups]
    lines += [f"warning: {text}" for text in warnings(flex_mg)]
    return "\n".join(lines)


def warnings(flex_mg: FlexMG) -> list[str]:
    """What is odd about the graph, a sentence each."""
    control = flex_mg.control
    reachable = nx.descendants(control, START)
    finishing = nx.ancestors(control, END)
    found = [
        f"{node} can never run" for node in flex_mg.graph if node not in {START, END} | reachable
    ]
    found += [
        f"{agent} never influences the output"
        for agent in flex_mg.agents
        if agent in reachable and agent not in finishing
    ]
    found += [f"the code of {node} could not be read" for node in flex_mg.uncertain]
    if not flex_mg.agents:
        found.append("no node calls a chat model, so there is nothing to train")
    return sorted(found)


def to_mermaid(flex_mg: FlexMG) -> str:
    """The graph in Mermaid's flowchart language."""
    ids = {node: f"n{index}" for index, node in enumerate(sorted(flex_mg.graph))}
    lines = ["flowchart TD"]
    for node in sorted(flex_mg.graph):
        label = node.strip("_").replace('"', "#quot;")
        shape = {"agent": f'(["{label}"])', "boundary": f'(("{label}"))'}.get(
            flex_mg.graph.nodes[node]["role"], f'["{label}"]'
        )
        lines.append(f"    {ids[node]}{shape}")
    arrows = {"control": "-->", "conditional": "-.->", "fan_out": "==>"}
    lines += [f"    {ids[a]} {arrows[kind]} {ids[b]}" for a, b, kind in _drawn(flex_mg)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class _Place:
    x: float
    y: float
    half_width: float
    half_height: float


def to_svg(flex_mg: FlexMG) -> str:
    """A picture for light and dark pages: control flow downward, dependencies as orange arcs."""
    places = _layout(flex_mg)
    width = max(place.x + place.half_width for place in places.values()) + _MARGIN
    arc_room = 64 if len(flex_mg.agents) > 1 else 0
    height = max(place.y + place.half_height for place in places.values()) + _MARGIN
    shapes = [_edge(places[a], places[b], kind) for a, b, kind in _drawn(flex_mg)]
    shapes += [
        _arc(places[j], places[i])
        for i in flex_mg.agents
        for j in flex_mg.agents
        if i != j and flex_mg.dependency(i, j) != "never"
    ]
    for node, place in places.items():
        shapes.append(_box(node, str(flex_mg.graph.nodes[node]["role"]), place))
    label = html.escape(f"Dependency graph of {', '.join(flex_mg.agents)}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width + arc_room:.0f} {height:.0f}" width="{width + arc_room:.0f}" '
        f'height="{height:.0f}"><style>{_STYLE}</style><defs>{_tip("tip")}{_tip("observes-tip")}</defs>'
        f"{''.join(shapes)}</svg>\n"
    )


def _layout(flex_mg: FlexMG) -> dict[str, _Place]:
    """Longest-path layers of the loops' condensation; inside a loop, by distance from START."""
    control = flex_mg.control
    distance = dict(nx.single_source_shortest_path_length(control, START))
    forward: nx.DiGraph[str] = nx.DiGraph()
    forward.add_nodes_from(control)
    rank = {node: (distance.get(node, len(control)), node) for node in control}
    component = {
        node: number
        for number, members in enumerate(nx.strongly_connected_components(control))
        for node in members
    }
    forward.add_edges_from(
        (a, b) for a, b in control.edges if component[a] != component[b] or rank[a] < rank[b]
    )
    layer = dict.fromkeys(forward, 0)
    for node in nx.topological_sort(forward):
        for following in forward.successors(node):
            layer[following] = max(layer[following], layer[node] + 1)
    rows: dict[int, list[str]] = {}
    for node in sorted(layer, key=lambda n: (layer[n], rank[n])):
        rows.setdefault(layer[node], []).append(node)
    widths = {node: max(_WIDTH, 8.2 * len(node) + 24) for node in layer}
    total = max(sum(widths[n] for n in row) + _GAP_X * (len(row) - 1) for row in rows.values())
    places = {}
    for number, row in rows.items():
        x = _MARGIN + (total - sum(widths[n] for n in row) - _GAP_X * (len(row) - 1)) / 2
        for node in row:
            y = _MARGIN + _HEIGHT / 2 + number * (_HEIGHT + _GAP_Y)
            size = 7.0 if node in (START, END) else widths[node] / 2
            places[node] = _Place(x + widths[node] / 2, y, size, min(size, _HEIGHT / 2))
            x += widths[node] + _GAP_X
    return places


def _drawn(flex_mg: FlexMG) -> list[tuple[str, str, str]]:
    edges = flex_mg.graph.edges(data=True)
    return sorted((a, b, edge["kind"]) for a, b, edge in edges if edge["kind"] != "data")


def _box(node: str, role: str, place: _Place) -> str:
    if role == "boundary":
        return f'<circle class="boundary" cx="{place.x:.1f}" cy="{place.y:.1f}" r="7"/>'
    radius = 18 if role == "agent" else 4
    return (
        f'<rect class="{role}" x="{place.x - place.half_width:.1f}" '
        f'y="{place.y - place.half_height:.1f}" width="{2 * place.half_width:.1f}" '
        f'height="{2 * place.half_height:.1f}" rx="{radius}"/>'
        f'<text class="text" x="{place.x:.1f}" y="{place.y:.1f}">{html.escape(node)}</text>'
    )


def _edge(a: _Place, b: _Place, kind: str) -> str:
    if b.y > a.y:
        path = f"M{a.x:.1f},{a.y + a.half_height:.1f} L{b.x:.1f},{b.y - b.half_height - 7:.1f}"
    else:  # back or self: round the left side
        side = min(a.x - a.half_width, b.x - b.half_width)
        bend = side - 22
        path = (
            f"M{a.x - a.half_width:.1f},{a.y + 6:.1f} C{bend:.1f},{a.y + 6:.1f} "
            f"{bend:.1f},{b.y - 6:.1f} {b.x - b.half_width - 7:.1f},{b.y - 6:.1f}"
        )
    return f'<path class="{kind}" d="{path}" marker-end="url(#tip)"/>'


def _arc(source: _Place, target: _Place) -> str:
    start, end = source.x + source.half_width, target.x + target.half_width
    bend = max(start, end) + 46
    return (
        f'<path class="observes" d="M{start:.1f},{source.y:.1f} C{bend:.1f},{source.y:.1f} '
        f'{bend:.1f},{target.y:.1f} {end + 8:.1f},{target.y:.1f}" marker-end="url(#observes-tip)"/>'
    )


def _tip(name: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="{name}" d="M0,0 L8,4 L0,8 z"/>'
        "</marker>"
    )
