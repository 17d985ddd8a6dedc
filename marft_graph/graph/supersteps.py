"""In which supersteps the nodes of one graph can run: which come before which, and which must.

A graph runs in supersteps, and what a node writes is there for every node of a later superstep,
whether or not an edge leads from one to the other. So the order of two nodes is read from the
supersteps in which they can run. Nothing here knows LangGraph: `compile` fills in the `Scope`s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx as nx

START, END = "__start__", "__end__"
Names = frozenset[str]
NOTHING: Names = frozenset()


@dataclass(frozen=True, slots=True)
class Trigger:
    """An edge of one graph between its own nodes, START and END."""

    source: str
    target: str
    kind: str
    """`control`, `conditional` or `fan_out`."""
    join: tuple[str, ...] = ()
    """All sources that `target` waits for, where it is a join."""
    choice: str = ""
    """Triggers of one source with the same choice are alternatives: at most one of them goes."""
    reads: Names = frozenset()
    """Channels that the branch reads, which may send what they hold."""
    via: str = ""
    """The agent that decides, where that is the routing function behind START."""

    def excludes(self, other: Trigger) -> bool:
        """Whether one run of their source never starts both."""
        if self == other:
            return self.kind != "fan_out"
        return bool(self.choice) and self.choice == other.choice


@dataclass(slots=True)
class Node:
    """A node of one graph, with the graphs that run inside it."""

    path: str
    reads: Names
    """Channels that it can read."""
    may_write: Names
    must_write: Names
    must_read: Names = frozenset()
    """Channels that every run has read before it first calls a model."""
    is_read_by_code: bool = False
    """Whether its code says what it reads; else its state schema does."""
    always_calls: bool = False
    """Whether it calls a model itself in every run."""
    calls_again: bool = False
    """Whether one run of it may call a model several times."""
    is_graph: bool = False
    """Whether it is a subgraph, which shares channels by name; else it may hand over anything."""
    is_visible: bool = True
    """Whether it is a vertex of the Flex-MG; a node that only runs other graphs is not."""
    hands_over: bool = False
    """Whether a graph inside it can go to another node of this graph, and write its channels."""
    inner: list[Scope] = field(default_factory=list)


@dataclass
class Scope:
    """One graph of the app: its nodes by name, its edges and channels."""

    nodes: dict[str, Node]
    triggers: Sequence[Trigger]
    channels: Names
    inputs: Names
    outputs: Names
    reducers: Names
    deferred: Names = NOTHING
    """Nodes that run when nothing else can any more."""
    errors: Sequence[tuple[str, str]] = ()
    """Nodes and who handles their errors, which may tell what a model had answered."""
    is_ordered: bool = True
    """False where code decides what runs when, as in the functional API."""

    @functools.cached_property
    def order(self) -> Order:
        """Which of its nodes run before which."""
        return Order(self)

    @functools.cached_property
    def sent_to(self) -> Names:
        """Nodes that a `Send` can start, which then read what was sent, not the channels."""
        return frozenset(t.target for t in self.triggers if t.kind == "fan_out")


class Order:
    """Which nodes of a graph run before which."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._control: nx.DiGraph[str] = nx.DiGraph()
        self._control.add_nodes_from([START, END, *scope.nodes])
        self._control.add_edges_from((t.source, t.target) for t in scope.triggers)
        self._distance = dict(nx.all_pairs_shortest_path_length(self._control))
        self._reach = {node: nx.descendants(self._control, node) for node in self._control}
        for node in self._control:
            if any(node == n or node in self._reach[n] for n in self._control.successors(node)):
                self._reach[node].add(node)
        self._first = self._distance[START]
        # What was sent runs at once, and nothing that is deferred waits for it.
        self._waiting = scope.deferred if not scope.sent_to else NOTHING
        self._beside = self._side_by_side() if scope.is_ordered else {}
        self._must = self._preceding()

    def before(self, a: str, b: str) -> bool:
        """Whether some run of `a` can be over when some run of `b` begins."""
        if not self._scope.is_ordered:
            return True
        if a not in self._first or b not in self._first:
            return False
        return b in self._reach[a] or any(
            b == other or b in self._reach[other] for other in self._beside.get(a, ())
        )

    def must_precede(self, a: str, b: str) -> bool:
        """Whether every run of `b` comes after one of `a`."""
        return self._scope.is_ordered and a in self._must.get(b, ())

    def _side_by_side(self) -> dict[str, set[str]]:
        """For every node those of parallel branches that can run in a later superstep."""
        beside: dict[str, set[str]] = {}
        last_of_all = self._waiting if len(self._scope.deferred) == 1 else NOTHING
        for region in self._regions():
            for a, b in region.parallel:
                if a not in last_of_all and region.first[a] < region.last[b]:
                    beside.setdefault(a, set()).add(b)
        return beside

    def _regions(self) -> list[_Region]:
        """Stretches of a run between nodes that run alone.

        Where a node runs alone, all that follows follows from it. Taken to be alone are as many
        nodes as can be without contradiction: if all were alone so far, is the next one?
        """
        alone = set(self._first) - {END}
        while True:
            regions = [_Region(self._scope, start, alone) for start in sorted(alone)]
            accompanied = {node for region in regions for node in region.accompanied()}
            if not accompanied & alone - {START}:
                return regions
            alone -= accompanied - {START}

    def _preceding(self) -> dict[str, set[str]]:
        """For every node those that every run of it comes after, START included.

        A join comes after all it waits for, another node after what all its triggers have in
        common. And what an earlier node always starts by plain edges, k supersteps after itself,
        is over for whoever cannot come before k + 1 supersteps after that node.
        """
        must = self._triggered_after()
        started = self._always_started()
        also: dict[str, set[str]] = {node: set() for node in must}
        for node, earlier in must.items():
            for first in earlier:
                distance = self._distance[first].get(node, math.inf)
                also[node] |= {n for n, steps in started[first].items() if steps < distance}
            if node in self._waiting:  # runs when all else that was started is over
                also[node].update(*(started[first] for first in earlier))
                also[node] -= self._reach[node]
        return {
            node: set().union(earlier, also[node], *(also[e] for e in earlier)) - {node}
            for node, earlier in must.items()
        }

    def _triggered_after(self) -> dict[str, set[str]]:
        """For every node those that are on all ways to it, or on a way that a join waits for."""
        reached = set(self._first)
        must = {node: set(reached) for node in reached}
        must[START] = set()
        groups: dict[str, set[tuple[str, ...]]] = {node: set() for node in reached}
        for trigger in self._scope.triggers:
            sources = trigger.join or (trigger.source,)
            if reached.issuperset(sources):
                groups[trigger.target].add(sources)
        changed = True
        while changed:
            changed = False
            for node in reached - {START}:
                after = [set(group).union(*(must[s] for s in group)) for group in groups[node]]
                found = set.intersection(must[node], *after)
                changed |= found != must[node]
                must[node] = found
        return must

    def _always_started(self) -> dict[str, dict[str, int]]:
        """For every node what each of its runs starts by plain edges, and supersteps until then."""
        plain: nx.DiGraph[str] = nx.DiGraph()
        plain.add_nodes_from(self._control)
        plain.add_edges_from(
            (t.source, t.target)
            for t in self._scope.triggers
            if t.kind == "control" and not t.join and t.target not in self._scope.deferred
        )
        plain.remove_node(END)
        return {
            node: dict(nx.single_source_shortest_path_length(plain, node)) if node in plain else {}
            for node in self._control
        }


class _Region:
    """What one run of a node can start until the next node that runs alone.

    Supersteps count from the start's run.
    """

    def __init__(self, scope: Scope, start: str, alone: set[str]) -> None:
        self._scope = scope
        self._alone = alone
        leaving: dict[str, list[Trigger]] = {}
        for trigger in scope.triggers:
            leaving.setdefault(trigger.source, []).append(trigger)
        # The start's copy as a place to end differs from the place where it begins: "".
        edges: list[tuple[str, Trigger]] = []
        waiting, seen = [("", start)], {""}
        while waiting:
            place, node = waiting.pop()
            for trigger in leaving.get(node, ()):
                edges.append((place, trigger))
                if trigger.target not in seen:
                    seen.add(trigger.target)
                    if trigger.target not in alone:
                        waiting.append((trigger.target, trigger.target))
        self._graph: nx.DiGraph[str] = nx.DiGraph()
        self._graph.add_node("")
        self._graph.add_edges_from((place, trigger.target) for place, trigger in edges)
        self._sent = {trigger.target for _, trigger in edges if trigger.kind == "fan_out"}
        self.first = self._earliest(edges)
        self.last = self._latest()
        self.parallel = self._pairs(edges)
        """Pairs of nodes that can run on two ways at a time; both orders of each."""

    def accompanied(self) -> set[str]:
        """Nodes that do not run alone."""
        return {node for node in self._sent if node in self._alone} | {
            a
            for a, b in self.parallel
            if a != b and self.first[a] <= self.last[b] and self.first[b] <= self.last[a]
        }

    def _earliest(self, edges: Sequence[tuple[str, Trigger]]) -> dict[str, float]:
        """The first superstep in which a node can run: a join waits for the last of its sources."""
        first: dict[str, float] = dict.fromkeys(self._graph, math.inf) | {"": 0.0}
        changed = True
        while changed:
            changed = False
            for place, trigger in edges:
                sources = [s for s in trigger.join if s in self._graph and place != ""] or [place]
                step = max(first[source] for source in sources) + 1
                if step < first[trigger.target]:
                    first[trigger.target] = step
                    changed = True
        return first

    def _latest(self) -> dict[str, float]:
        """The last superstep in which a node can run; infinite where it can be put off."""
        late = {n for n in self._graph if n in self._scope.deferred}
        for component in nx.strongly_connected_components(self._graph):
            if len(component) > 1 or any(self._graph.has_edge(n, n) for n in component):
                late |= component
        late = late.union(*(nx.descendants(self._graph, node) for node in late))
        last: dict[str, float] = dict.fromkeys(late, math.inf)
        rest = self._graph.subgraph([n for n in self._graph if n not in late])
        for node in nx.topological_sort(rest):
            last[node] = max((last[p] + 1 for p in rest.predecessors(node)), default=0.0)
        return last

    def _pairs(self, edges: Sequence[tuple[str, Trigger]]) -> set[tuple[str, str]]:
        reach = {node: nx.descendants(self._graph, node) | {node} for node in self._graph}
        leaving: dict[str, list[Trigger]] = {}
        for place, trigger in edges:
            leaving.setdefault(place, []).append(trigger)
        pairs: set[tuple[str, str]] = set()
        for triggers in leaving.values():
            for left in triggers:
                for right in triggers:
                    if not left.excludes(right):
                        pairs.update(
                            (a, b) for a in reach[left.target] for b in reach[right.target]
                        )
        return {(a, b) for a, b in pairs if END not in (a, b)}
