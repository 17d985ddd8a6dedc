"""Where the nodes of a Flex-MG stand in a picture: layers from top to bottom, few crossings.

Layered drawing after Sugiyama, Tagawa and Toda (1981): longest-path layers of the loops'
condensation, a bend for each layer that an edge crosses, barycentre ordering. Numbers are pixels.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from marft_graph.graph.flex_mg import END, START, FlexMG

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 132, 40, 36, 56, 28
_BEND_WIDTH = 12.0
_ROW = 8  # nodes side by side; a wider layer takes several rows
_SWEEPS = 8

Bend = tuple[str, str, int]
"""A place that an edge (from, to) passes in a layer."""
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Place:
    """A node's box: its centre and half its size."""

    x: float
    y: float
    half_width: float
    half_height: float


@dataclass(frozen=True, slots=True)
class Layout:
    """Boxes of the nodes, and the points between the two ends that a downward edge passes."""

    places: Mapping[str, Place]
    bends: Mapping[tuple[str, str], Sequence[Point]]
    width: float
    height: float


def layout(flex_mg: FlexMG) -> Layout:
    """Places of all nodes, START and END included; no two boxes overlap."""
    control = flex_mg.control
    forward = _without_back_edges(control)
    layer = dict.fromkeys(forward, 0)
    for node in nx.topological_sort(forward):
        for following in forward.successors(node):
            layer[following] = max(layer[following], layer[node] + 1)
    layer[END] = max(layer.values())
    rows = _ordered(forward, layer)
    widths: dict[str | Bend, float] = {node: _width(node) for node in forward}
    x = _columns(rows, widths)
    places: dict[str, Place] = {}
    passed: dict[tuple[str, str], list[Point]] = {}
    y = MARGIN + HEIGHT / 2
    for row in rows:
        lines = _lines(row)
        for item in row:
            line = next(i for i, members in enumerate(lines) if item in members)
            level = y + line * (HEIGHT + GAP_X)
            if isinstance(item, str):
                half = 7.0 if item in (START, END) else widths[item] / 2
                places[item] = Place(x[item], level, half, min(half, HEIGHT / 2))
            else:
                passed.setdefault(item[:2], []).append((x[item], y))
        y += len(lines) * (HEIGHT + GAP_X) - GAP_X + GAP_Y
    width = max(place.x + place.half_width for place in places.values()) + MARGIN
    return Layout(places, passed, width, y - GAP_Y - HEIGHT / 2 + MARGIN + HEIGHT / 2)


def _width(node: str) -> float:
    return 14.0 if node in (START, END) else max(float(WIDTH), 8.2 * len(node) + 24)


def _without_back_edges(control: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """The edges that lead on; inside a loop, those away from START."""
    distance = dict(nx.single_source_shortest_path_length(control, START))
    rank = {node: (distance.get(node, len(control)), node) for node in control}
    component = {
        node: number
        for number, members in enumerate(nx.strongly_connected_components(control))
        for node in members
    }
    forward: nx.DiGraph[str] = nx.DiGraph()
    forward.add_nodes_from(control)
    forward.add_edges_from(
        (a, b) for a, b in control.edges if component[a] != component[b] or rank[a] < rank[b]
    )
    return forward


def _ordered(forward: nx.DiGraph[str], layer: Mapping[str, int]) -> list[list[str | Bend]]:
    """Nodes and bends of each layer from left to right, sorted to cross little."""
    rows: list[list[str | Bend]] = [[] for _ in range(max(layer.values()) + 1)]
    for node in sorted(forward):
        rows[layer[node]].append(node)
    above: dict[str | Bend, list[str | Bend]] = {}
    below: dict[str | Bend, list[str | Bend]] = {}
    for a, b in sorted(forward.edges):
        bends: list[str | Bend] = [(a, b, level) for level in range(layer[a] + 1, layer[b])]
        for bend, level in zip(bends, range(layer[a] + 1, layer[b]), strict=True):
            rows[level].append(bend)
        for upper, lower in itertools.pairwise([a, *bends, b]):
            below.setdefault(upper, []).append(lower)
            above.setdefault(lower, []).append(upper)
    for sweep in range(_SWEEPS):
        downward = sweep % 2 == 0
        fixed = above if downward else below
        for row in rows if downward else reversed(rows):
            place = {item: i for other in rows for i, item in enumerate(other)}
            row.sort(
                key=lambda item: (
                    statistics.fmean([place[n] for n in fixed[item]])
                    if fixed.get(item)
                    else place[item]
                )
            )
    return rows


def _lines(row: Sequence[str | Bend]) -> list[list[str | Bend]]:
    """A layer's items in rows of at most `_ROW` nodes."""
    nodes = [item for item in row if isinstance(item, str)]
    if len(nodes) <= _ROW:
        return [list(row)]
    count = -(-len(nodes) // _ROW)
    lines: list[list[str | Bend]] = [list(nodes[i::count]) for i in range(count)]
    lines[0] += [item for item in row if not isinstance(item, str)]
    return lines


def _columns(
    rows: Sequence[Sequence[str | Bend]], widths: Mapping[str | Bend, float]
) -> dict[str | Bend, float]:
    """Centres from left to right; every line is centred, a second line stands in the gaps."""
    spans: list[tuple[list[str | Bend], float, float]] = []
    for row in rows:
        for number, line in enumerate(_lines(row)):
            ordered = sorted(line, key=list(row).index)
            size = sum(widths.get(i, _BEND_WIDTH) for i in ordered) + GAP_X * (len(ordered) - 1)
            spans.append((ordered, size, number % 2 * (WIDTH + GAP_X) / 2))
    total = max(size + shift for _, size, shift in spans)
    x: dict[str | Bend, float] = {}
    for line, size, shift in spans:
        left = MARGIN + (total - size) / 2 + (shift if shift + size <= total else 0)
        for item in line:
            half = widths.get(item, _BEND_WIDTH) / 2
            x[item] = left + half
            left += 2 * half + GAP_X
    return x
