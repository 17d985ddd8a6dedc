"""A LangGraph app compiled into a Flex-MG: nodes and roles, control edges, data dependencies.

Reads the compiled app and its source; runs nothing, unless examples are given for a dry run. What
it cannot be certain of it takes to be possible, so that `never` is never wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from marft_graph.graph.roles import Findings, graph_name, inspect_node, remembering
from marft_graph.graph.source import Reading, read_source
from marft_graph.graph.state_use import ALL, StateUse, state_use
from marft_graph.names import agent_path, inner_path, vertex_name

if TYPE_CHECKING:
    from marft_graph.rollout.inputs import AppInputs

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
        parts = _parts_of(app)
        channels = state_channels(app)
        nodes = {}
        for part in parts:
            use = _use(app, part)
            node = nodes[part.key] = _node(app, part, use, prefix)
            self._fill(node, part.found, above | {id(app)})
            self._carry(node, use)
        return Scope(
            nodes=nodes,
            triggers=_triggers(app, parts, nodes),
            channels=channels,
            inputs=input_channels(app),
            outputs=output_channels(app),
            reducers=frozenset(name for name in channels if collects(app.channels[name])),
            deferred=frozenset(
                part.key
                for part in parts
                if isinstance(app, CompiledStateGraph) and part.spec is not None and part.spec.defer
            ),
            is_ordered=isinstance(app, CompiledStateGraph),
        )

    def _fill(self, node: Node, found: Findings, above: frozenset[int]) -> None:
        """Add what runs inside a node, and the node itself where it is a vertex."""
        inside = [graph for graph in found.graphs if id(graph) not in above]
        node.inner = [self.scope(g, f"{_inner(node, g)}/", above) for g in inside]
        for parts in (found.tasks, found.tools):
            if parts:
                node.inner.append(self._inside(parts, node.path, above))
        node.inner = [scope for scope in node.inner if scope.nodes]
        node.is_graph = node.is_graph and bool(node.inner)
        node.is_visible = found.calls_model or not node.inner
        if not node.is_visible:
            return
        if found.calls_model:
            node.path = agent_path(node.path)
        elif not found.is_certain and not found.clients:
            self.unread.add(node.path)
        self.graph.add_node(node.path, role="agent" if found.calls_model else "environment")
        about = self.graph.nodes[node.path]
        if node.always_calls:
            about["always_calls"] = True
        if found.clients:
            about["clients"] = list(found.clients)
        if found.unresolved and not found.calls_model:
            about["unresolved"] = list(found.unresolved[:3])

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
            if not _holds_agent(inner):
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


def _holds_agent(found: Findings) -> bool:
    inner = [*found.tasks.values(), *found.tools.values()]
    return found.calls_model or bool(found.graphs) or any(map(_holds_agent, inner))


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A node of an app, an error handler for one of its nodes, or a routing function of START."""

    key: str
    """Its name among the app's parts."""
    name: str
    """The node of the app; START for a routing function."""
    path: str
    """Its name in runs."""
    own: Findings
    """What its own code holds."""
    found: Findings
    """The same with its conditional edges, which run in its task."""
    reading: Reading
    branches: tuple[Any, ...] = ()
    """Conditional edges that ask a model."""
    spec: Any = None
    """What the builder knows of the node."""
    guards: tuple[str, ...] = ()
    """Nodes whose errors it handles."""


def _parts_of(app: App) -> list[_Part]:
    builder = app.builder if isinstance(app, CompiledStateGraph) else None
    found = []
    for name in app.nodes:
        if name in (START, END):
            continue
        bound = app.nodes[name].bound
        spec = builder.nodes[name] if builder is not None else None
        branches = tuple(builder.branches.get(name, {}).values()) if builder is not None else ()
        own, reading = inspect_node(bound), read_source(bound)
        asking = {id(b): inspect_node(b.path) for b in branches}
        whole = _together(own, asking.values())
        asked = tuple(b for b in branches if _holds_agent(asking[id(b)]))
        part = _Part(name, name, name, own, whole, reading, asked, spec)
        if builder is None or not getattr(spec, "is_error_handler", False):
            found.append(part)
            continue
        guarded = tuple(n for n, other in builder.nodes.items() if _handler(other) == name)
        found.append(dataclasses.replace(part, path=vertex_name(name), guards=guarded))
    for label, branch in (builder.branches.get(START, {}) if builder is not None else {}).items():
        asks = inspect_node(branch.path)
        if _holds_agent(asks) and label not in app.nodes:
            nothing = Reading(may_write=frozenset(), targets=frozenset())
            found.append(_Part(label, START, label, asks, asks, nothing, (branch,)))
    return found


def _handler(spec: Any) -> str | None:
    handler: str | None = getattr(spec, "error_handler_node", None)
    return handler


def _together(own: Findings, branches: Iterable[Findings]) -> Findings:
    """What a node holds, with the conditional edges behind it."""
    for branch in branches:
        own = dataclasses.replace(
            own,
            calls_model=own.calls_model or branch.calls_model,
            graphs=tuple({id(g): g for g in (*own.graphs, *branch.graphs)}.values()),
            tasks={**own.tasks, **branch.tasks},
            tools={**own.tools, **branch.tools},
            unresolved=(*own.unresolved, *branch.unresolved),
            clients=tuple(sorted({*own.clients, *branch.clients})),
            calls=min(2, own.calls + branch.calls),
        )
    return own


def _use(app: App, part: _Part) -> StateUse:
    """What a part reads of the state; a routing function reads what its branch is given."""
    if part.name == START:
        (branch,) = part.branches
        return state_use(branch.path, branch_channels(app, START, branch))
    return state_use(app.nodes[part.name].bound, read_channels(app, part.name))


def _node(app: App, part: _Part, use: StateUse, prefix: str) -> Node:
    own, reading = part.own, part.reading
    channels = state_channels(app)
    is_cached = part.spec is not None and part.spec.cache_policy
    given = read_channels(app, part.name) if part.name != START else frozenset[str]()
    reads = given if use.may_read is None else use.may_read & given
    for branch in part.branches:  # they ask a model in its name
        reads |= branch_channels(app, part.name, branch)
    # Where an error is handled, the run may go on without what the node writes.
    must_write = frozenset[str]() if _handler(part.spec) else reading.must_write & channels
    return Node(
        path=prefix + part.path,
        reads=reads,
        may_write=channels if reading.may_write is None else reading.may_write & channels,
        must_write=use.made & must_write,
        must_read=_certain(use, app, part.name, given),
        is_read_by_code=use.may_read is not None,
        always_calls=own.calls_model and reading.always_calls and not is_cached,
        calls_again=part.found.calls_model and not _calls_once(part),
        is_graph=part.name != START and isinstance(app.nodes[part.name].bound, Pregel),
        hands_over=bool(own.graphs) and "PARENT" in _mentions_inside(own),
    )


def _calls_once(part: _Part) -> bool:
    if part.name == START:
        return part.own.calls < 2
    return not part.branches and part.reading.calls_once and part.own.calls < 2


def _certain(use: StateUse, app: App, name: str, given: frozenset[str]) -> frozenset[str]:
    """Channels that every run of a node reads before it calls a model."""
    is_dict = name != START and app.nodes[name].mapper is None
    if ALL in use.must_read and is_dict:  # the text of a dict shows it all
        return given
    return use.must_read & given


def _triggers(app: App, parts: list[_Part], nodes: dict[str, Node]) -> list[Trigger]:
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
    ordinary = [part for part in parts if part.name != START]
    everywhere = frozenset({*(part.name for part in ordinary if not part.guards), END})
    routers = {part.key for part in parts if part.name == START}
    found += [Trigger(START, router, "control") for router in sorted(routers)]
    for source, branches in builder.branches.items():
        for label, branch in branches.items():
            reading = read_source(branch.path)
            mentions = inspect_node(branch.path).mentions
            kind = "fan_out" if "Send" in mentions else "conditional"
            declared = frozenset((branch.ends or {}).values())
            if declared:  # LangGraph holds names to that, and lets `Send` go where it likes
                declared |= reading.sent
            targets = declared or _targets(frozenset(), reading, everywhere)
            if reading.may_send_nothing:
                targets |= {END}
            choice = f"branch {label}" if reading.goes_one_way else ""
            read = branch_channels(app, source, branch)
            via = label if source == START and label in routers else ""
            found += [Trigger(source, target, kind, (), choice, read, via) for target in targets]
    leaving = {trigger.source for trigger in found}
    staying = set()
    for part in ordinary:
        name, node = part.key, nodes[part.key]
        mentions = _mentions_inside(part.own) if node.hands_over else part.own.users_mentions
        kind = "fan_out" if "Send" in mentions else "conditional"
        may_go = "Command" in mentions or node.hands_over
        if part.reading.targets is None and part.own.unresolved and name not in leaving:
            may_go = True  # what it returns may be a Command
        declared = frozenset(part.spec.ends or ())
        targets = _targets(declared, part.reading, everywhere if may_go else None)
        choice = "command" if part.reading.goes_one_way else ""
        found += [Trigger(name, target, kind, choice=choice) for target in targets]
        if targets and name not in leaving and part.reading.may_stay:
            staying.add(name)
        found += [Trigger(guarded, name, "conditional") for guarded in part.guards]
    known = {START, END, *nodes}
    found = [t for t in found if t.source in known and t.target in known]
    found = [  # whatever else a node sends, to END it sends nothing
        dataclasses.replace(t, kind="conditional") if (t.target, t.kind) == (END, "fan_out") else t
        for t in found
    ]
    handlers = {part.key for part in parts if part.guards}
    going = {trigger.source for trigger in found if trigger.target not in handlers}
    found += [Trigger(p.key, END, "control") for p in ordinary if p.key not in going]
    found += [Trigger(name, END, "conditional", (), "command") for name in sorted(staying)]
    return sorted(set(found), key=lambda t: (t.source, t.target, t.kind, t.join, t.choice))


def _targets(
    declared: frozenset[str], reading: Reading, everywhere: frozenset[str] | None
) -> frozenset[str]:
    """Nodes that a branch or a `Command` may lead to.

    Args:
        declared: what the user declares; it only says what is drawn, so that what the code names
            counts as well.
        reading: what the code says.
        everywhere: where it may go if neither tells; None: nowhere.
    """
    if declared:
        return declared | reading.named
    if reading.targets is not None:
        return reading.targets
    return frozenset() if everywhere is None else everywhere


def _mentions_inside(found: Findings, seen: frozenset[int] = frozenset()) -> frozenset[str]:
    """Names that users' code in a node uses, and that in the graphs inside it."""
    inner = (
        _mentions_inside(inspect_node(node.bound), seen | {id(graph)})
        for graph in found.graphs
        if id(graph) not in seen
        for node in graph.nodes.values()
    )
    return found.users_mentions.union(*inner)
