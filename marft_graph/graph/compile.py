"""A LangGraph app compiled into a Flex-MG: nodes and roles, control edges, data dependencies.

Reads the compiled app; runs nothing. What it cannot be certain of it takes to be possible, so that
`never` is never wrong.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from marft_graph.errors import GraphError
from marft_graph.graph.flex_mg import END, START, FlexMG
from marft_graph.graph.roles import Findings, inspect_node
from marft_graph.names import agent_path


def as_compiled(app: Any) -> Pregel[Any, Any, Any, Any]:
    """The compiled app; a builder is compiled for the user.

    Raises:
        GraphError: the object is no LangGraph app, or its builder does not compile.
    """
    if isinstance(app, Pregel):
        return app
    if isinstance(app, StateGraph):
        try:
            return app.compile()
        except ValueError as error:
            raise GraphError(f"the graph does not compile: {error}") from error
    raise GraphError(
        f"{app!r:.80} is a {type(app).__name__}; give a LangGraph app: a compiled graph, or a "
        "StateGraph builder"
    )


def compile_graph(graph: Any) -> FlexMG:
    """The Flex-MG of an app: who calls a model, what runs after what, who may observe whom.

    Args:
        graph: a compiled LangGraph app, or a StateGraph builder.

    Raises:
        GraphError: the object is no LangGraph app, or its builder does not compile.
    """
    compiler = _Compiler()
    entries, exits = compiler.add(as_compiled(graph), "", set())
    compiler.graph.add_node(START, role="boundary")
    compiler.graph.add_node(END, role="boundary")
    for node in entries:
        compiler.edge(START, node, "control")
    for node in exits:
        compiler.edge(node, END, "control")
    compiler.add_data()
    return FlexMG(compiler.graph)


class _Compiler:
    """Adds an app and the graphs inside it to one flat graph of node paths."""

    def __init__(self) -> None:
        self.graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        self._reads: dict[str, frozenset[str]] = {}
        self._scope: dict[str, str] = {}

    def edge(self, source: str, target: str, kind: str) -> None:
        """Add an edge once."""
        if not self.graph.has_edge(source, target, key=kind):
            self.graph.add_edge(source, target, key=kind, kind=kind)

    def add(
        self, app: Pregel[Any, Any, Any, Any], prefix: str, above: set[int]
    ) -> tuple[set[str], set[str]]:
        """Add an app's nodes; the nodes that can run first, and those that can run last."""
        first: dict[str, set[str]] = {}
        last: dict[str, set[str]] = {}
        findings: dict[str, Findings] = {}
        for name in _node_names(app):
            bound = app.nodes[name].bound
            found = findings[name] = inspect_node(bound)
            inner = [g for g in found.graphs if id(g) not in above]
            if isinstance(bound, Pregel):
                inner, found = [bound], Findings(False, (), frozenset())
            path = prefix + name
            if inner and not found.calls_model:
                parts = [self.add(g, f"{path}/", above | {id(g)}) for g in inner]
                first[name] = set().union(*(entries for entries, _ in parts))
                last[name] = set().union(*(exits for _, exits in parts))
                for _, exits in parts:  # a node may run its graphs in any order, and again
                    for entries, _ in parts if len(parts) > 1 else []:
                        for a in exits:
                            for b in entries:
                                self.edge(a, b, "conditional")
                if not first[name]:
                    first[name] = last[name] = {self._add_node(app, name, path, prefix, found)}
                continue
            node = self._add_node(app, name, path, prefix, found)
            first[name] = last[name] = {node}
            for g in inner:  # calls a model itself and runs a graph: both inside one node
                entries, exits = self.add(g, f"{path}/", above | {id(g)})
                for entry in entries:
                    self.edge(node, entry, "conditional")
                for exit_ in exits:
                    self.edge(exit_, node, "conditional")
        return self._connect(app, first, last, findings)

    def _add_node(
        self,
        app: Pregel[Any, Any, Any, Any],
        name: str,
        path: str,
        prefix: str,
        found: Findings,
    ) -> str:
        node = agent_path(path) if found.calls_model else path
        self.graph.add_node(node, role="agent" if found.calls_model else "environment")
        self._reads[node] = _channels(app, name)
        self._scope[node] = prefix
        return node

    def _connect(
        self,
        app: Pregel[Any, Any, Any, Any],
        first: dict[str, set[str]],
        last: dict[str, set[str]],
        findings: dict[str, Findings],
    ) -> tuple[set[str], set[str]]:
        entries: set[str] = set()
        exits: set[str] = set()
        for source, target, kind in _control_edges(app, findings):
            if source == START and target in first:
                entries |= first[target]
            elif target == END and source in last:
                exits |= last[source]
            elif source in last and target in first:
                for a in last[source]:
                    for b in first[target]:
                        self.edge(a, b, kind)
        return entries, exits

    def add_data(self) -> None:
        """Data edges: from every node to every node that can run later and reads state.

        A node may write any channel of its graph, and a subgraph's input and output carry its
        parent's; so what tells is which node can run after which, and what the later one reads.
        """
        control = nx.DiGraph((a, b) for a, b, _ in self.graph.edges(keys=True))
        nodes = [n for n, data in self.graph.nodes(data=True) if data["role"] != "boundary"]
        for source in nodes:
            if source not in control:
                continue
            later = set().union(
                *({n} | nx.descendants(control, n) for n in control.successors(source))
            )
            for target in sorted(later & set(nodes)):
                shared = self._reads[target]
                if self._scope[source] != self._scope[target]:
                    shared = frozenset({"(subgraph input or output)"}) if shared else shared
                for channel in sorted(shared):
                    self.graph.add_edge(
                        source, target, key=f"data:{channel}", kind="data", channel=channel
                    )


def _node_names(app: Pregel[Any, Any, Any, Any]) -> list[str]:
    return [name for name in app.nodes if name not in (START, END)]


def _channels(app: Pregel[Any, Any, Any, Any], name: str) -> frozenset[str]:
    """State channels that a node reads."""
    channels = app.nodes[name].channels
    names = [channels] if isinstance(channels, str) else list(channels)
    return frozenset(
        channel for channel in names if not channel.startswith(("branch:", "join:", "__pregel"))
    ) or frozenset({"__root__"})


def _control_edges(
    app: Pregel[Any, Any, Any, Any], findings: dict[str, Findings]
) -> list[tuple[str, str, str]]:
    """(from, to, kind) between an app's own nodes, START and END."""
    names = _node_names(app)
    everywhere = [*names, END]
    if not isinstance(app, CompiledStateGraph):  # the functional API: an entrypoint and its tasks
        return [(START, names[0], "control"), (names[0], END, "control")] if names else []
    builder = app.builder
    edges = [(a, b, "control") for a, b in builder.edges]
    edges += [(a, b, "control") for sources, b in builder.waiting_edges for a in sources]
    for source, branches in builder.branches.items():
        for branch in branches.values():
            mentions = inspect_node(branch.path).mentions
            kind = "fan_out" if "Send" in mentions else "conditional"
            for target in dict.fromkeys((branch.ends or {}).values()) or everywhere:
                edges.append((source, target, kind))
    for name in names:
        declared = tuple(getattr(builder.nodes[name], "ends", None) or ())
        mentions = findings[name].mentions
        kind = "fan_out" if "Send" in mentions else "conditional"
        if declared:
            edges += [(name, target, kind) for target in declared]
        elif "Command" in mentions:  # goes where its code says, and its code is not read
            edges += [(name, target, kind) for target in everywhere]
    leaving = {a for a, _, _ in edges}
    edges += [(name, END, "control") for name in names if name not in leaving]
    return sorted(set(edges))
