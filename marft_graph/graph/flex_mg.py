"""The Flex-MG: a Markov game of agents with a dependency function, on networkx.

Holds what `compile` found out about an app and answers questions about it; it knows no LangGraph.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx

from marft_graph.errors import GraphError, UnknownNodeError

START, END = "__start__", "__end__"
Dependency = Literal["never", "possible", "always"]
Role = Literal["agent", "environment"]


@dataclass(frozen=True)
class FlexMG:
    """Agents, environment and who may observe whom.

    `graph` has a vertex for every node path and for START and END, with the attribute `role`, and
    edges whose attribute `kind` is `control` (an edge), `conditional` (a branch or `Command`),
    `fan_out` (`Send`) or `data` (from a node that may write a channel to one that reads it; the
    attribute `channel` names it).
    """

    graph: nx.MultiDiGraph[str]
    uncertain: tuple[str, ...] = ()
    """Nodes whose code could not be read, so that a call of a model may have been missed."""

    @property
    def agents(self) -> tuple[str, ...]:
        """Nodes that call a model, in an order in which they can first run."""
        return tuple(n for n in self._order() if self.graph.nodes[n]["role"] == "agent")

    @property
    def environment(self) -> tuple[str, ...]:
        """Nodes that call no model."""
        return tuple(n for n in self._order() if self.graph.nodes[n]["role"] == "environment")

    @property
    def loops(self) -> tuple[tuple[str, ...], ...]:
        """Sets of nodes that can run again after each other, in order of first run."""
        control = self.control
        order = {node: place for place, node in enumerate(self._order())}
        found = [
            tuple(sorted(component, key=lambda node: order[node]))
            for component in nx.strongly_connected_components(control)
            if len(component) > 1 or any(control.has_edge(n, n) for n in component)
        ]
        return tuple(sorted(found, key=lambda loop: order[loop[0]]))

    @property
    def parallel_groups(self) -> tuple[tuple[str, ...], ...]:
        """Agents of which none can run after another: they may run side by side."""
        agents = self.agents
        free: nx.Graph[str] = nx.Graph()
        free.add_nodes_from(agents)
        for index, left in enumerate(agents):
            for right in agents[index + 1 :]:
                if self.dependency(left, right) == self.dependency(right, left) == "never":
                    free.add_edge(left, right)
        groups = [
            tuple(sorted(clique, key=agents.index))
            for clique in nx.find_cliques(free)
            if len(clique) > 1
        ]
        return tuple(sorted(groups))

    @property
    def control(self) -> nx.DiGraph[str]:
        """Which node can run directly after which, START and END included."""
        control: nx.DiGraph[str] = nx.DiGraph()
        control.add_nodes_from(self.graph)
        control.add_edges_from(
            (a, b) for a, b, edge in self.graph.edges(data=True) if edge["kind"] != "data"
        )
        return control

    @property
    def control_edges(self) -> tuple[tuple[str, str, str], ...]:
        """(from, to, kind) of every edge that says what can run next."""
        edges = self.graph.edges(data=True)
        return tuple(sorted((a, b, e["kind"]) for a, b, e in edges if e["kind"] != "data"))

    @property
    def observations(self) -> tuple[tuple[str, str], ...]:
        """Pairs (i, j) of agents of which i may observe j."""
        agents = self.agents
        return tuple((i, j) for i in agents for j in agents if self.dependency(i, j) != "never")

    def dependency(self, i: str, j: str) -> Dependency:
        """Whether agent i observes the action of agent j.

        `never` is certain: in no run does j's output reach i's prompt. `always`: every run of i
        comes after one of j and reads what j writes. `possible`: some runs, as far as the graph
        tells; an agent in a loop may observe itself.

        Raises:
            UnknownNodeError: i or j is no node of the graph.
        """
        self._check(i, j)
        path = self._data_path(j, i)
        if path is None:
            return "never"
        if i != j and self._certain(i, j, path):
            return "always"
        return "possible"

    def explain(self, i: str, j: str) -> str:
        """Through which channels agent i can observe agent j, or why it never does."""
        self._check(i, j)
        path = self._data_path(j, i)
        if path is None:
            return f"{i} never observes {j}: nothing that {j} may write is read by a later {i}"
        hops = []
        for source, target in itertools.pairwise(path):
            channels = sorted(
                data["channel"]
                for data in self.graph.get_edge_data(source, target).values()
                if data["kind"] == "data"
            )
            hops.append(f"{source} -> {target} through {', '.join(channels)}")
        return f"{i} observes {j} ({self.dependency(i, j)}): " + "; ".join(hops)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `graph.json`, with the dependency matrix for people."""
        agents = self.agents
        return {
            "nodes": {name: dict(self.graph.nodes[name]) for name in sorted(self.graph)},
            "edges": sorted(
                ({"from": a, "to": b, **data} for a, b, data in self.graph.edges(data=True)),
                key=lambda edge: json.dumps(edge, sort_keys=True),
            ),
            "uncertain": list(self.uncertain),
            "agents": list(agents),
            "environment": list(self.environment),
            "loops": [list(loop) for loop in self.loops],
            "parallel_groups": [list(group) for group in self.parallel_groups],
            "dependency": {i: {j: self.dependency(i, j) for j in agents} for i in agents},
            "hash": self.hash,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlexMG:
        """The FlexMG that `to_dict` described.

        Raises:
            GraphError: the values are not those of a Flex-MG, or were changed by hand.
        """
        graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        try:
            for name, data in values["nodes"].items():
                graph.add_node(name, **data)
            for edge in values["edges"]:
                data = {key: value for key, value in edge.items() if key not in ("from", "to")}
                graph.add_edge(edge["from"], edge["to"], **data)
            flex_mg = cls(graph, tuple(values["uncertain"]))
            expected = values["hash"]
        except (KeyError, TypeError, AttributeError) as error:
            raise GraphError(f"these values are no Flex-MG: {error!r}") from error
        if flex_mg.hash != expected:
            raise GraphError("the Flex-MG differs from its own hash; graph.json was changed")
        return flex_mg

    @property
    def hash(self) -> str:
        """SHA-256 of the graph's nodes, roles and edges: equal for equal graphs."""
        return hashlib.sha256("\n".join(self._lines()).encode()).hexdigest()

    def difference(self, other: FlexMG) -> list[str]:
        """What `other` has and this has not, and the reverse, a line each; empty if equal."""
        mine, theirs = set(self._lines()), set(other._lines())
        gone = [f"gone: {line}" for line in sorted(mine - theirs)]
        return gone + [f"new: {line}" for line in sorted(theirs - mine)]

    def _lines(self) -> list[str]:
        nodes = [f"node {n} ({data['role']})" for n, data in self.graph.nodes(data=True)]
        edges = [
            f"edge {a} -> {b} ({data['kind']}{' ' + data['channel'] if 'channel' in data else ''})"
            for a, b, data in self.graph.edges(data=True)
        ]
        return sorted(nodes + edges)

    def _order(self) -> list[str]:
        """Nodes in topological order of the loops' condensation; START and END left out."""
        control = self.control
        distance = dict(nx.single_source_shortest_path_length(control, START))
        far = len(control)
        condensed = nx.condensation(control)

        def first(component: int) -> tuple[int, str]:
            members = condensed.nodes[component]["members"]
            return min((distance.get(m, far), m) for m in members)

        nodes: list[str] = []
        for component in nx.lexicographical_topological_sort(condensed, key=first):
            members = condensed.nodes[component]["members"]
            nodes += sorted(members, key=lambda node: (distance.get(node, far), node))
        return [node for node in nodes if node not in (START, END)]

    def _data_path(self, source: str, target: str) -> list[str] | None:
        """A shortest way of data from one node to another, of at least one edge."""
        data: nx.DiGraph[str] = nx.DiGraph()
        data.add_nodes_from(self.graph)
        data.add_edges_from(
            (a, b) for a, b, edge in self.graph.edges(data=True) if edge["kind"] == "data"
        )
        paths = [
            [source, *nx.shortest_path(data, following, target)]
            for following in data.successors(source)
            if nx.has_path(data, following, target)
        ]
        return min(paths, key=lambda path: (len(path), path)) if paths else None

    def _certain(self, i: str, j: str, path: Sequence[str]) -> bool:
        """Whether every run of i comes after one of j whose write it reads directly."""
        if len(path) != 2:
            return False
        writes = any(
            data.get("certain", False)
            for data in self.graph.get_edge_data(j, i).values()
            if data["kind"] == "data"
        )
        if not writes:
            return False
        control = self.control
        if i not in nx.descendants(control, START):
            return False
        dominators = nx.immediate_dominators(control, START)
        above = i
        while above != START:
            above = dominators[above]
            if above == j:
                return True
        return False

    def _check(self, *names: str) -> None:
        for name in names:
            if name not in self.graph:
                raise UnknownNodeError(_unknown(name, self))


def resolve_nodes(flex_mg: FlexMG, names: Sequence[str]) -> tuple[str, ...]:
    """Names of agents as users give them, checked; all agents where none is given.

    Raises:
        UnknownNodeError: a name is no agent of the graph; the message lists those there are.
        GraphError: the graph has no agent.
    """
    if not flex_mg.agents:
        raise GraphError(
            "no node of the graph calls a chat model, so there is nothing to train; nodes are "
            f"{', '.join(flex_mg.environment) or 'none'}"
        )
    for name in names:
        if name not in flex_mg.agents:
            raise UnknownNodeError(_unknown(name, flex_mg))
    return tuple(dict.fromkeys(names)) or flex_mg.agents


def _unknown(name: str, flex_mg: FlexMG) -> str:
    agents = flex_mg.agents
    close = difflib.get_close_matches(name, agents, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if name in flex_mg.environment:
        hint = "; that node calls no model"
    return f"no agent {name!r} in the graph{hint}; its agents are {', '.join(agents)}"
