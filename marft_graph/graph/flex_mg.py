"""The Flex-MG: a Markov game of agents with a dependency function, on networkx.

Holds what `compile` found out about an app and answers questions about it; it knows no LangGraph.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import networkx as nx

from marft_graph.errors import GraphError, UnknownNodeError
from marft_graph.graph import control
from marft_graph.graph.ways import ways_from
from marft_graph.names import adapter_name

START, END = "__start__", "__end__"
EVIDENCE = {"code": "by its code", "run": "seen in a run", "schema": "by its state schema alone"}
"""What an observation is known from, in words."""
Dependency = Literal["never", "possible", "always"]
Evidence = Literal["code", "run", "schema"]
Role = Literal["agent", "frozen", "environment", "boundary"]


@dataclass(frozen=True)
class FlexMG:
    """Agents, environment and who may observe whom.

    `graph` has a vertex for every node path and for START and END. Its attribute `role` is `agent`,
    `frozen` (calls a model that is not trained), `environment` or `boundary`; `always_calls` is set
    where every run of the node is certain to call its model, and `adapter` where the adapter that
    answers has another name than the node. Edges have the attribute `kind`:
    `control` (an edge), `conditional` (a branch or `Command`), `fan_out` (`Send`) or `data` (what
    one node may write another may read; `channel` names it, `evidence` says whether the second's
    code or its state schema has it that it is read, and `certain` is set where every run of the
    second reads what a run of the first wrote). `observed` on a node lists agents whose output it
    was seen to read in a run; `carries` on one that always calls its model names for each channel
    that it writes those whose content it passes on.
    """

    graph: nx.MultiDiGraph[str]
    uncertain: tuple[str, ...] = ()
    """Nodes in whose code no model was found, but which call what their code does not show."""
    notes: tuple[str, ...] = ()
    """What a dry run found worth saying."""

    @functools.cached_property
    def agents(self) -> tuple[str, ...]:
        """Nodes that call a model that is trained, in an order in which they can first run."""
        return self._with_role("agent")

    @functools.cached_property
    def frozen(self) -> tuple[str, ...]:
        """Nodes that call a model that is not trained."""
        return self._with_role("frozen")

    @functools.cached_property
    def environment(self) -> tuple[str, ...]:
        """Nodes that call no model, as far as their code says for certain."""
        doubtful = {*self.uncertain, *self.unseen}
        return tuple(node for node in self._with_role("environment") if node not in doubtful)

    @functools.cached_property
    def unseen(self) -> tuple[str, ...]:
        """Nodes that can ask a provider past LangChain: such calls are neither seen nor trained."""
        return tuple(node for node in self.order if self.graph.nodes[node].get("clients"))

    @functools.cached_property
    def loops(self) -> tuple[tuple[str, ...], ...]:
        """Sets of nodes that can run again after each other, in order of first run."""
        return control.loops(self.control, self.order)

    @functools.cached_property
    def cycles(self) -> tuple[tuple[str, ...], ...]:
        """Ways along edges from a node back to itself, the shortest first.

        For every edge that is part of a loop there is one; a graph may have many more.
        """
        return control.cycles(self.control, self.order)

    @functools.cached_property
    def parallel_groups(self) -> tuple[tuple[str, ...], ...]:
        """Agents that can run side by side: started together, and none leads to another."""
        return control.parallel_groups(self.control, self.control_edges, self.agents)

    @functools.cached_property
    def fan_outs(self) -> tuple[str, ...]:
        """Nodes that can run several times side by side, once for each `Send`."""
        sent = {b for _, b, edge in self.graph.edges(data=True) if edge["kind"] == "fan_out"}
        return tuple(node for node in self.order if node in sent)

    @functools.cached_property
    def control(self) -> nx.DiGraph[str]:
        """Which node can run directly after which, START and END included."""
        followed: nx.DiGraph[str] = nx.DiGraph()
        followed.add_nodes_from(self.graph)
        followed.add_edges_from(
            (a, b) for a, b, edge in self.graph.edges(data=True) if edge["kind"] != "data"
        )
        return followed

    @functools.cached_property
    def control_edges(self) -> tuple[tuple[str, str, str], ...]:
        """(from, to, kind) of every edge that says what can run next."""
        edges = self.graph.edges(data=True)
        return tuple(sorted((a, b, e["kind"]) for a, b, e in edges if e["kind"] != "data"))

    @functools.cached_property
    def observations(self) -> tuple[tuple[str, str], ...]:
        """Pairs (i, j) of agents of which i may observe j."""
        agents = self.agents
        return tuple((i, j) for i in agents for j in agents if i in self._ways[j])

    @functools.cached_property
    def distant_observations(self) -> tuple[tuple[str, str], ...]:
        """Pairs (i, j) of agents of which i may observe j, where neither an edge nor a third agent
        that i observes and that observes j shows it: what a picture has to draw extra.
        """
        pairs = set(self.observations)
        carrying = nx.DiGraph((a, b) for a, b in self.control.edges if self.carries(a, b))
        agents = set(self.agents)
        neighbours = {
            (i, j)
            for i, j in pairs
            if j in carrying and i in control.reached(carrying, j, stop=agents)
        }
        return tuple(
            (i, j)
            for i, j in self.observations
            if i != j
            and (i, j) not in neighbours
            and not any((i, k) in pairs and (k, j) in pairs for k in self.agents if k not in (i, j))
        )

    def carries(self, source: str, target: str) -> bool:
        """Whether a node may read what another one may write."""
        return self.data.has_edge(source, target)

    def read_by(self, source: str, target: str) -> Evidence | None:
        """What it is known from that a node may read what another one may write; None: it may not.

        The code of `target`, a run that has shown it, or its state schema alone.
        """
        if not self.carries(source, target):
            return None
        if self._is_read_by_code(source, target):
            return "code"
        return "run" if source in self.graph.nodes[target].get("observed", ()) else "schema"

    @functools.cached_property
    def order(self) -> tuple[str, ...]:
        """Nodes in topological order of the loops' condensation; START and END left out."""
        nodes = control.in_order(self.control, START)
        return tuple(node for node in nodes if node not in (START, END))

    def dependency(self, i: str, j: str) -> Dependency:
        """Whether agent i observes the action of agent j.

        `never` is certain: in no run is an answer of j what a prompt of i was made from. What
        another agent made of it does not count: that agent always answers in between. `always`:
        every run of i comes after one of j and reads what j wrote. `possible`: some runs, as far as
        the graph tells; an agent in a loop may observe itself.

        Raises:
            UnknownNodeError: i or j is no node of the graph.
        """
        self._check(i, j)
        if i not in self._ways[j]:
            return "never"
        return "always" if i != j and self._is_certain(j, i) else "possible"

    def evidence(self, i: str, j: str) -> Evidence:
        """Where it is known from that agent i may observe agent j.

        `code`: the code of each node on the way says that it reads what the one before wrote.
        `run`: some run has shown it. `schema`: the state schema of a node admits it, whose code
        does not say what it reads; a dry run or the run itself may tell.

        Raises:
            UnknownNodeError: i or j is no node of the graph.
        """
        self._check(i, j)
        if j in self.graph.nodes[i].get("observed", ()):
            is_known = all(self._is_read_by_code(a, b) for a, b in self._hops(i, j))
            return "code" if is_known and self.dependency(i, j) == "always" else "run"
        hops = self._hops(i, j)
        return "code" if all(self._is_read_by_code(a, b) for a, b in hops) else "schema"

    def _hops(self, i: str, j: str) -> list[tuple[str, str]]:
        return list(itertools.pairwise(self._ways[j].get(i, ())))

    def explain(self, i: str, j: str) -> str:
        """Through which channels agent i can observe agent j, or why it never does.

        Raises:
            UnknownNodeError: i or j is no node of the graph.
        """
        self._check(i, j)
        path = self._ways[j].get(i)
        if path is not None:
            hops = "; ".join(
                f"{a} -> {b} through {', '.join(self._channels(a, b))}"
                for a, b in itertools.pairwise(path)
            )
            known = EVIDENCE[self.evidence(i, j)]
            return f"{i} observes {j} ({self.dependency(i, j)}, {known}): {hops}"
        data = self.data
        if i in nx.descendants(data, j):
            between = nx.shortest_path(data, j, i)[1:-1]
            return (
                f"{i} never observes {j} itself, only what {' and '.join(between)} made of it: "
                f"{' -> '.join([j, *between, i])}"
            )
        if i != j and i not in nx.descendants(self.control, j):
            return f"{i} never observes {j}: no run of {i} comes after one of {j}"
        return f"{i} never observes {j}: nothing that {j} may write is read by a later {i}"

    def training(self, nodes: Sequence[str], adapters: Mapping[str, str] | None = None) -> FlexMG:
        """The same game where only some agents are trained; the others are frozen.

        Args:
            nodes: agents to train; none: all.
            adapters: adapter name of a node, where it is not the node's own; nodes with one name
                share the adapter.

        Raises:
            UnknownNodeError: a name is no agent of the graph; the message lists those there are.
            GraphError: the graph has no agent.
        """
        trained = resolve_nodes(self, nodes)
        graph = self.graph.copy()
        for node in {*self.agents, *self.frozen} - {*trained}:
            graph.nodes[node]["role"] = "frozen"
        for node in trained:
            name = (adapters or {}).get(node, adapter_name(node))
            graph.nodes[node].pop("adapter", None)
            if name != adapter_name(node):
                graph.nodes[node]["adapter"] = name
        return replace(self, graph=graph)

    def observed(self, pairs: Iterable[tuple[str, str]]) -> FlexMG:
        """The same game with what runs have shown: pairs (i, j) of which i read what j wrote."""
        graph = self.graph.copy()
        for i, j in pairs:
            if i in graph and j in graph:
                graph.nodes[i]["observed"] = sorted({*graph.nodes[i].get("observed", ()), j})
        return replace(self, graph=graph)

    def adapter(self, agent: str) -> str:
        """Name of the adapter that answers an agent; several agents may share one."""
        self._check(agent)
        return str(self.graph.nodes[agent].get("adapter", adapter_name(agent)))

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
            "notes": list(self.notes),
            "agents": list(agents),
            "frozen": list(self.frozen),
            "environment": list(self.environment),
            "unseen": list(self.unseen),
            "loops": [list(loop) for loop in self.loops],
            "cycles": [list(cycle) for cycle in self.cycles],
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
            flex_mg = cls(graph, tuple(values["uncertain"]), tuple(values["notes"]))
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
        nodes = []
        for name, data in self.graph.nodes(data=True):
            adapter = f", adapter {data['adapter']}" if "adapter" in data else ""
            nodes.append(f"node {name} ({data['role']}{adapter})")
        edges = [
            f"edge {a} -> {b} ({data['kind']}{' ' + data['channel'] if 'channel' in data else ''}"
            f"{', always' if data.get('certain') else ''})"
            for a, b, data in self.graph.edges(data=True)
        ]
        return sorted(nodes + edges)

    def _with_role(self, role: Role) -> tuple[str, ...]:
        return tuple(node for node in self.order if self.graph.nodes[node]["role"] == role)

    @functools.cached_property
    def data(self) -> nx.DiGraph[str]:
        """Which node may read what which other node may write; END reads the output."""
        data: nx.DiGraph[str] = nx.DiGraph()
        data.add_nodes_from(self.graph)
        data.add_edges_from(
            (a, b) for a, b, edge in self.graph.edges(data=True) if edge["kind"] == "data"
        )
        return data

    @functools.cached_property
    def _ways(self) -> dict[str, dict[str, list[str]]]:
        """For every node who can observe it, with a shortest way of its data there.

        Data passes through nodes that make no call of their own, or may make none, and through
        others where these pass it on beside their model's answer.
        """
        return {source: ways_from(self.graph, source) for source in self.graph}

    def _is_read_by_code(self, source: str, target: str) -> bool:
        edges = (self.graph.get_edge_data(source, target) or {}).values()
        return any(e["kind"] == "data" and e.get("evidence") == "code" for e in edges)

    def _is_certain(self, source: str, target: str) -> bool:
        edges = self.graph.get_edge_data(source, target) or {}
        return any(edge.get("certain", False) for edge in edges.values())

    def _channels(self, source: str, target: str) -> list[str]:
        edges = self.graph.get_edge_data(source, target).values()
        return sorted(edge["channel"] for edge in edges if edge["kind"] == "data")

    def _check(self, *names: str) -> None:
        for name in names:
            if name not in self.graph:
                raise UnknownNodeError(_unknown(name, self))


def resolve_nodes(
    flex_mg: FlexMG, names: Sequence[str], *, found_before: bool = False
) -> tuple[str, ...]:
    """Names of agents as users give them, checked; all agents where none is given.

    With `found_before`, a dry run may have found the names: then nodes that are not known to call a
    model, and what is inside them, pass as well.

    Raises:
        UnknownNodeError: a name is no agent of the graph; the message lists those there are.
        GraphError: the graph has no agent.
    """
    if not flex_mg.agents and not (found_before and names):
        raise GraphError(
            "no node of the graph calls a chat model, so there is nothing to train; nodes are "
            f"{', '.join(flex_mg.order) or 'none'}"
        )
    for name in names:
        around = [name[:end] for end, char in enumerate(name) if char == "/"]
        passes = found_before and any(path in flex_mg.graph for path in (name, *around))
        if name not in flex_mg.agents and not passes:
            raise UnknownNodeError(_unknown(name, flex_mg))
    return tuple(dict.fromkeys(names)) or flex_mg.agents


def _unknown(name: str, flex_mg: FlexMG) -> str:
    agents = flex_mg.agents
    close = difflib.get_close_matches(name, agents, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if name in flex_mg.environment:
        hint = "; that node calls no model"
    return f"no agent {name!r} in the graph{hint}; its agents are {', '.join(agents)}"
