"""The shape of what can run after what: order, loops, cycles, and what runs side by side.

Functions of a directed graph of nodes; none of them knows agents or data.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import networkx as nx

_MOST_GROUPS = 50
Edge = tuple[str, str, str]  # from, to, kind


def in_order(control: nx.DiGraph[str], start: str) -> list[str]:
    """Nodes in topological order of the loops' condensation, the nearest to `start` first."""
    distance = dict(nx.single_source_shortest_path_length(control, start))
    far = len(control)
    condensed = nx.condensation(control)

    def first(component: int) -> tuple[int, str]:
        members = condensed.nodes[component]["members"]
        return min((distance.get(m, far), m) for m in members)

    nodes: list[str] = []
    for component in nx.lexicographical_topological_sort(condensed, key=first):
        members = condensed.nodes[component]["members"]
        nodes += sorted(members, key=lambda node: (distance.get(node, far), node))
    return nodes


def loops(control: nx.DiGraph[str], order: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Sets of nodes that can run again after each other, in `order`."""
    place = {node: number for number, node in enumerate(order)}
    sets = [
        tuple(sorted(component, key=lambda node: place[node]))
        for component in nx.strongly_connected_components(control)
        if len(component) > 1 or any(control.has_edge(n, n) for n in component)
    ]
    return tuple(sorted(sets, key=lambda loop: place[loop[0]]))


def cycles(control: nx.DiGraph[str], order: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """A shortest way from a node back to itself for every edge of a loop, the shortest first."""
    place = {node: number for number, node in enumerate(order)}
    ways: dict[frozenset[tuple[str, str]], tuple[str, ...]] = {}
    for loop in loops(control, order):
        inside = control.subgraph(loop)
        edges = sorted(inside.edges, key=lambda edge: (place[edge[0]], place[edge[1]]))
        left = dict.fromkeys(edges)
        while left:
            a, b = next(iter(left))
            way = nx.shortest_path(inside, b, a)
            first = way.index(min(way, key=lambda node: place[node]))
            cycle = (*way[first:], *way[:first])
            steps = list(zip(cycle, (*cycle[1:], cycle[0]), strict=True))
            ways.setdefault(frozenset(steps), cycle)
            for step in steps:
                left.pop(step, None)
    return tuple(sorted(ways.values(), key=lambda c: (len(c), [place[node] for node in c])))


def parallel_groups(
    control: nx.DiGraph[str], edges: Sequence[Edge], nodes: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Which of some nodes can run side by side: started together, and none leads to another."""
    free: nx.Graph[str] = nx.Graph()
    reach = {node: nx.descendants(control, node) | {node} for node in control}
    for left, right in itertools.combinations(nodes, 2):
        apart = right not in reach[left] and left not in reach[right]
        if apart and _start_together(left, right, edges, reach):
            free.add_edge(left, right)
    cliques = itertools.islice(nx.find_cliques(free), _MOST_GROUPS)
    return tuple(sorted(tuple(sorted(clique, key=nodes.index)) for clique in cliques))


def _start_together(
    left: str, right: str, edges: Sequence[Edge], reach: Mapping[str, set[str]]
) -> bool:
    """Whether one node starts the ways to both, and not as alternatives."""
    for _, leaving in itertools.groupby(edges, key=lambda edge: edge[0]):
        ways = [(b, kind) for _, b, kind in leaving]
        for (a, kind), (b, other) in itertools.permutations(ways, 2):
            leads = a != b and left in reach[a] and right in reach[b]
            if leads and not kind == other == "conditional":
                return True
    return False


def reached(graph: nx.DiGraph[str], start: str, stop: set[str]) -> set[str]:
    """Nodes on ways from a node that end at the first of `stop`."""
    nodes: set[str] = set()
    waiting = [start]
    while waiting:
        for following in graph.successors(waiting.pop()):
            if following not in nodes:
                nodes.add(following)
                if following not in stop:
                    waiting.append(following)
    return nodes
