"""A LangGraph app compiled into a Flex-MG: nodes and roles, control edges, data dependencies.

Reads the compiled app and its source; runs nothing, unless examples are given for a dry run. What
it cannot be certain of it takes to be possible, so that `never` is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from marft_graph.errors import GraphError
from marft_graph.graph.channels import collects, input_channels, output_channels, state_channels
from marft_graph.graph.dataflow import flows
from marft_graph.graph.flex_mg import END, START, FlexMG
from marft_graph.graph.parts import App, holds_agent, node_of, parts_of, use_of
from marft_graph.graph.roles import Findings, graph_name, remembering
from marft_graph.graph.state_use import ALL, StateUse
from marft_graph.graph.supersteps import Node, Scope, Trigger
from marft_graph.graph.triggers import triggers_of
from marft_graph.names import agent_path, inner_path

if TYPE_CHECKING:
    from marft_graph.rollout.inputs import AppInputs


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
    inputs: Callable[[Mapping[str, Any]], Any] | Sequence[str] | None = None,
    *,
    context: Any = None,
    configurable: Any = None,
    store: Any = None,
    on_interrupt: Callable[..., Any] | None = None,
) -> FlexMG:
    """The Flex-MG of an app: who calls a model, what runs after what, who may observe whom.

    Args:
        graph: a compiled LangGraph app, or a StateGraph builder.
        examples: run the app on the first 8 of them with scripted answers; this finds the agents
            that the code does not show, and counts each agent's calls. No model is loaded, but the
            app's tools and other nodes do run.
        inputs: a list of the examples' keys that the graph is given, or a function that makes its
            input from an example.
        context: what nodes find as `runtime.context`: a value, or a function of the example.
        configurable: values of `config["configurable"]`, likewise.
        store: what an episode's store holds at its beginning, likewise; see `run_episodes`.
        on_interrupt: `reviewer(example, state, interrupt)` answers the app's interrupts.

    Raises:
        GraphError: the object is no LangGraph app, or its builder does not compile.
        DatasetError: no examples, or an example without the graph's input keys.
    """
    from marft_graph.rollout.inputs import AppInputs  # runs graphs, which needs this module

    if examples is None:
        return _compile(graph)
    given = AppInputs(
        inputs=inputs,
        context=context,
        configurable=configurable,
        store=store,
        on_interrupt=on_interrupt,
    )
    return compile_with(graph, examples, given)


def compile_with(graph: Any, examples: Iterable[Mapping[str, Any]], given: AppInputs) -> FlexMG:
    """`compile_graph` with examples, for an app that is called as `given` says."""
    from marft_graph.rollout.dry_run import add_dry_run  # as above

    return add_dry_run(_compile(graph), graph, examples, given)


def _compile(graph: Any) -> FlexMG:
    compiler = _Compiler()
    with remembering():
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
        parts = parts_of(app)
        channels = state_channels(app)
        nodes = {}
        for part in parts:
            use = use_of(app, part)
            node = nodes[part.key] = node_of(app, part, use, prefix)
            self._fill(node, part.task, above | {id(app)})
            self._carry(node, use)
        return Scope(
            nodes=nodes,
            triggers=triggers_of(app, parts, nodes),
            channels=channels,
            inputs=input_channels(app),
            outputs=output_channels(app),
            reducers=frozenset(name for name in channels if collects(app.channels[name])),
            deferred=frozenset(
                part.key
                for part in parts
                if isinstance(app, CompiledStateGraph) and part.spec is not None and part.spec.defer
            ),
            errors=[(guarded, part.key) for part in parts for guarded in part.guards],
            is_ordered=isinstance(app, CompiledStateGraph),
        )

    def _fill(self, node: Node, findings: Findings, above: frozenset[int]) -> None:
        """Add what runs inside a node, and the node itself where it is a vertex."""
        inside = [graph for graph in findings.graphs if id(graph) not in above]
        node.inner = [self.scope(g, f"{_inner(node, g)}/", above) for g in inside]
        for parts in (findings.tasks, findings.tools):
            if parts:
                node.inner.append(self._inside(parts, node.path, above))
        node.inner = [scope for scope in node.inner if scope.nodes]
        node.is_graph = node.is_graph and bool(node.inner)
        node.is_visible = findings.calls_model or not node.inner
        if not node.is_visible:
            return
        if findings.calls_model:
            node.path = agent_path(node.path)
        elif not findings.is_certain and not findings.clients:
            self.unread.add(node.path)
        self.graph.add_node(node.path, role="agent" if findings.calls_model else "environment")
        about = self.graph.nodes[node.path]
        if node.always_calls:
            about["always_calls"] = True
        if findings.clients:
            about["clients"] = list(findings.clients)
        if findings.unresolved and not findings.calls_model:
            about["unresolved"] = list(findings.unresolved[:3])

    def _carry(self, node: Node, use: StateUse) -> None:
        """Note on an agent what it passes on besides its model's answers."""
        if node.is_visible and node.always_calls:
            known = {ALL: frozenset({ALL})} if use.carries is None else use.carries
            carries = {name: sorted(made_of) for name, made_of in sorted(known.items()) if made_of}
            self.graph.nodes[node.path]["carries"] = carries

    def _inside(self, parts: Mapping[str, Findings], path: str, above: frozenset[int]) -> Scope:
        """Tasks of the functional API, or tools, that a node's code can call, in any order."""
        nodes = {}
        for name, inner in parts.items():
            if not holds_agent(inner):
                continue
            node = nodes[name] = Node(
                path=inner_path(path, tool=name),
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
            source, target = trigger.via or trigger.source, trigger.target
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


def _inner(node: Node, graph: App) -> str:
    """The path that the nodes of a graph inside a node follow."""
    return node.path if node.is_graph else inner_path(node.path, graph=graph_name(graph))
