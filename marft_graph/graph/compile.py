"""A LangGraph app compiled into a Flex-MG: nodes and roles, control edges, data dependencies.

Reads the compiled app and its source; runs nothing, unless examples are given for a dry run. What
it cannot be certain of it takes to be possible, so that `never` is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import networkx as nx
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from marft_graph.errors import GraphError
from marft_graph.graph.channels import (
    branch_channels,
    collects,
    input_channels,
    output_channels,
    read_channels,
    state_channels,
)
from marft_graph.graph.dataflow import Node, Scope, Trigger, flows
from marft_graph.graph.flex_mg import END, START, FlexMG
from marft_graph.graph.roles import Findings, inspect_node
from marft_graph.graph.source import Reading, read_source
from marft_graph.graph.state_use import ALL, StateUse, state_use
from marft_graph.names import agent_path

App = Pregel[Any, Any, Any, Any]


def as_compiled(app: Any) -> App:
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


def compile_graph(
    graph: Any,
    examples: Iterable[Mapping[str, Any]] | None = None,
    inputs: Callable[[Mapping[str, Any]], Any] | None = None,
) -> FlexMG:
    """The Flex-MG of an app: who calls a model, what runs after what, who may observe whom.

    Args:
        graph: a compiled LangGraph app, or a StateGraph builder.
        examples: run the app on the first 8 of them with scripted answers; this finds the agents
            that the code does not show, and counts each agent's calls. No model is loaded, but the
            app's tools and other nodes do run.
        inputs: makes the graph's input from an example, where its keys do not fit.

    Raises:
        GraphError: the object is no LangGraph app, or its builder does not compile.
        DatasetError: no examples, or an example without the graph's input keys.
    """
    flex_mg = _compile(graph)
    if examples is None:
        return flex_mg
    from marft_graph.rollout.dry_run import add_dry_run  # runs graphs, which needs this module

    return add_dry_run(flex_mg, graph, examples, inputs)


def _compile(graph: Any) -> FlexMG:
    compiler = _Compiler()
    top = compiler.scope(as_compiled(graph), "", frozenset())
    compiler.graph.add_node(START, role="boundary")
    compiler.graph.add_node(END, role="boundary")
    entries, exits = compiler.connect(top)
    for node, kind in entries:
        compiler.edge(START, node, kind)
    for node, kind in exits:
        compiler.edge(node, END, kind)
    for flow in flows(top):
        data = {"kind": "data", "channel": flow.channel, "certain": flow.is_certain}
        data["evidence"] = "code" if flow.is_read_by_code else "schema"
        compiler.graph.add_edge(flow.source, flow.target, key=f"data:{flow.channel}", **data)
    return FlexMG(compiler.graph, tuple(sorted(compiler.unread)))


class _Compiler:
    """Reads an app and the graphs inside it, and adds them to one flat graph of node paths."""

    def __init__(self) -> None:
        self.graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        self.unread: set[str] = set()

    def edge(self, source: str, target: str, kind: str) -> None:
        """Add an edge once."""
        if not self.graph.has_edge(source, target, key=kind):
            self.graph.add_edge(source, target, key=kind, kind=kind)

    def scope(self, app: App, prefix: str, above: frozenset[int]) -> Scope:
        """One graph of the app, with those inside it; vertices are added on the way."""
        names = [name for name in app.nodes if name not in (START, END)]
        findings = {name: inspect_node(app.nodes[name].bound) for name in names}
        readings = {name: read_source(app.nodes[name].bound) for name in names}
        channels = state_channels(app)
        nodes = {}
        for name in names:
            bound, found, reading = app.nodes[name].bound, findings[name], readings[name]
            use = state_use(bound, read_channels(app, name))
            node = nodes[name] = Node(
                path=prefix + name,
                reads=_reads(app, name, use),
                may_write=channels if reading.may_write is None else reading.may_write & channels,
                must_write=_made(use) & reading.must_write & channels,
                must_read=_certain(use, app, name),
                is_read_by_code=use.may_read is not None,
                always_calls=found.calls_model and reading.always_calls,
                calls_again=found.calls_model and not reading.calls_once,
                is_graph=isinstance(bound, Pregel),
                hands_over=bool(found.graphs) and "PARENT" in _mentions_inside(found),
            )
            if isinstance(app, CompiledStateGraph) and app.builder.nodes[name].cache_policy:
                node.always_calls = False
            self._fill(node, found, above | {id(app)})
            self._carry(node, use)
        return Scope(
            nodes=nodes,
            triggers=_triggers(app, findings, readings, nodes),
            channels=channels,
            inputs=input_channels(app),
            outputs=output_channels(app),
            reducers=frozenset(name for name in channels if collects(app.channels[name])),
            deferred=frozenset(
                name
                for name in names
                if isinstance(app, CompiledStateGraph) and app.builder.nodes[name].defer
            ),
            is_ordered=isinstance(app, CompiledStateGraph),
        )

    def _fill(self, node: Node, found: Findings, above: frozenset[int]) -> None:
        """Add what runs inside a node, and the node itself where it is a vertex."""
        prefix = f"{node.path}/"
        inside = [graph for graph in found.graphs if id(graph) not in above]
        node.inner = [self.scope(graph, prefix, above) for graph in inside]
        if found.tasks:
            node.inner.append(self._tasks(found, prefix, above))
        node.inner = [scope for scope in node.inner if scope.nodes]
        node.is_graph = node.is_graph and bool(node.inner)
        node.is_visible = found.calls_model or not node.inner
        if not node.is_visible:
            return
        if found.calls_model:
            node.path = agent_path(node.path)
        elif found.is_opaque:
            self.unread.add(node.path)
        self.graph.add_node(node.path, role="agent" if found.calls_model else "environment")
        if node.always_calls:
            self.graph.nodes[node.path]["always_calls"] = True

    def _carry(self, node: Node, use: StateUse) -> None:
        """Note on an agent what it passes on besides its model's answers."""
        if node.is_visible and node.always_calls:
            known = {ALL: frozenset({ALL})} if use.carries is None else use.carries
            carries = {name: sorted(made_of) for name, made_of in sorted(known.items()) if made_of}
            self.graph.nodes[node.path]["carries"] = carries

    def _tasks(self, found: Findings, prefix: str, above: frozenset[int]) -> Scope:
        """Tasks of the functional API that a node's code can call, in any order."""
        nodes = {}
        for name, inner in found.tasks.items():
            node = nodes[name] = Node(
                path=prefix + name,
                reads=frozenset({"input"}),
                may_write=frozenset({"result"}),
                must_write=frozenset(),
                calls_again=True,  # code decides how often a task is run
            )
            self._fill(node, inner, above)
        names = frozenset({"input", "result"})
        triggers = [Trigger(START, name, "control") for name in nodes]
        triggers += [Trigger(name, END, "control") for name in nodes]
        return Scope(nodes, triggers, names, names, names, frozenset(), is_ordered=False)

    def connect(self, scope: Scope) -> tuple[_Ends, _Ends]:
        """Add a graph's control edges; the vertices that can run first, and those that can last."""
        first: dict[str, _Ends] = {}
        last: dict[str, _Ends] = {}
        for name, node in scope.nodes.items():
            parts = [self.connect(inner) for inner in node.inner]
            first[name] = set().union(*(entries for entries, _ in parts))
            last[name] = set().union(*(exits for _, exits in parts))
            if node.is_visible:  # calls a model itself, before or after the graphs inside it
                for entry, kind in first[name]:
                    self.edge(node.path, entry, _stronger("conditional", kind))
                for exit_, _ in last[name]:
                    self.edge(exit_, node.path, "conditional")
                first[name] = last[name] = {(node.path, "control")}
        entries: _Ends = set()
        exits: _Ends = set()
        for trigger in scope.triggers:
            source, target = trigger.source, trigger.target
            if source == START and target in first:
                entries |= {(b, _stronger(trigger.kind, kind)) for b, kind in first[target]}
            elif target == END and source in last:
                exits |= {(a, _stronger(trigger.kind, kind)) for a, kind in last[source]}
            elif source in last and target in first:
                for a, leaving in last[source]:
                    for b, entering in first[target]:
                        self.edge(a, b, _stronger(leaving, trigger.kind, entering))
        return entries, exits


_Ends = set[tuple[str, str]]  # (node path, kind of the edge from START or to END)


def _stronger(*kinds: str) -> str:
    """The kind of an edge that passes the boundary of a graph inside a node."""
    return max(kinds, key=("control", "conditional", "fan_out").index)


def _reads(app: App, name: str, use: StateUse) -> frozenset[str]:
    """Channels that a node can read: by its code, or by its schema; its branches' too, if they ask
    a model in its name.
    """
    given = read_channels(app, name)
    reads = given if use.may_read is None else use.may_read & given
    branches = app.builder.branches.get(name, {}) if isinstance(app, CompiledStateGraph) else {}
    for branch in branches.values():
        found = inspect_node(branch.path)
        if found.calls_model or found.graphs:
            reads |= branch_channels(app, name, branch)
    return reads


def _certain(use: StateUse, app: App, name: str) -> frozenset[str]:
    """Channels that every run of a node reads before it calls a model."""
    given = read_channels(app, name)
    return given if ALL in use.must_read else use.must_read & given


def _made(use: StateUse) -> frozenset[str]:
    """Channels whose written value is the node's own making, and nothing that it was given."""
    return frozenset(k for k, v in use.carries.items() if not v) if use.carries else frozenset()


def _triggers(
    app: App,
    findings: dict[str, Findings],
    readings: dict[str, Reading],
    nodes: dict[str, Node],
) -> list[Trigger]:
    """Edges between an app's own nodes, START and END."""
    if not isinstance(app, CompiledStateGraph):  # the functional API, or a Pregel made by hand
        return [
            trigger
            for name in nodes
            for trigger in (Trigger(START, name, "control"), Trigger(name, END, "control"))
        ]
    builder = app.builder
    found = [
        Trigger(a, b, "conditional" if a in nodes and nodes[a].hands_over else "control")
        for a, b in builder.edges
    ]
    for sources, target in builder.waiting_edges:
        join = tuple(sorted(sources))
        found += [Trigger(source, target, "control", join) for source in join]
    everywhere = [*nodes, END]
    for source, branches in builder.branches.items():
        for label, branch in branches.items():
            reading = read_source(branch.path)
            mentions = inspect_node(branch.path).mentions
            kind = "fan_out" if "Send" in mentions else "conditional"
            ends = set((branch.ends or {}).values()) or reading.targets or everywhere
            choice = f"branch {label}" if reading.goes_one_way else ""
            read = branch_channels(app, source, branch)
            found += [Trigger(source, target, kind, (), choice, read) for target in ends]
    for name in nodes:
        spec, reading = builder.nodes[name], readings[name]
        mentions = findings[name].users_mentions
        if nodes[name].hands_over:
            mentions = _mentions_inside(findings[name])
        kind = "fan_out" if "Send" in mentions else "conditional"
        targets = set(spec.ends or ())
        if not targets and reading.targets is not None:
            targets = set(reading.targets)
        elif not targets and ("Command" in mentions or nodes[name].hands_over):
            targets = set(everywhere)  # goes where its code says, and that is not plain
        choice = "command" if reading.goes_one_way else ""
        found += [Trigger(name, target, kind, choice=choice) for target in targets]
        handler = getattr(spec, "error_handler_node", None)
        if handler:
            found.append(Trigger(name, handler, "conditional"))
    known = {START, END, *nodes}
    found = [t for t in found if t.source in known and t.target in known]
    leaving = {trigger.source for trigger in found}
    found += [Trigger(name, END, "control") for name in nodes if name not in leaving]
    return sorted(set(found), key=lambda t: (t.source, t.target, t.kind, t.join, t.choice))


def _mentions_inside(found: Findings, seen: frozenset[int] = frozenset()) -> frozenset[str]:
    """Names that users' code in a node uses, and that in the graphs inside it."""
    inner = (
        _mentions_inside(inspect_node(node.bound), seen | {id(graph)})
        for graph in found.graphs
        if id(graph) not in seen
        for node in graph.nodes.values()
    )
    return found.users_mentions.union(*inner)
