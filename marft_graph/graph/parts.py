"""What runs as tasks of one graph: nodes, error handlers, routing functions that ask a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from marft_graph.graph.channels import branch_channels, read_channels, state_channels
from marft_graph.graph.flex_mg import END, START
from marft_graph.graph.roles import Findings, inspect_node
from marft_graph.graph.source import Reading, read_source
from marft_graph.graph.state_use import ALL, StateUse, state_use
from marft_graph.graph.supersteps import Node
from marft_graph.names import vertex_name

App = Pregel[Any, Any, Any, Any]


def holds_agent(findings: Findings) -> bool:
    """Whether code asks a model, itself or in a graph, a task or a tool that it runs."""
    inner = [*findings.tasks.values(), *findings.tools.values()]
    return findings.calls_model or bool(findings.graphs) or any(map(holds_agent, inner))


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A node of an app, an error handler for one of its nodes, or a routing function of START."""

    key: str
    """Its name among the app's parts."""
    name: str
    """The node of the app; START for a routing function."""
    path: str
    """Its name in runs."""
    code: Findings
    """What its code holds."""
    task: Findings
    """What its task holds: its code, and the conditional edges behind it, which run there."""
    reading: Reading
    branches: tuple[Any, ...] = ()
    """Conditional edges that ask a model."""
    spec: Any = None
    """What the builder knows of the node."""
    guards: tuple[str, ...] = ()
    """Nodes whose errors it handles."""


def parts_of(app: App) -> list[Part]:
    """The parts of an app; a routing function of START is one where it asks a model."""
    if not isinstance(app, CompiledStateGraph):
        return [_part(app, name, None, ()) for name in app.nodes if name not in (START, END)]
    builder = app.builder
    parts = []
    for name in app.nodes:
        if name in (START, END):
            continue
        spec = builder.nodes[name]
        part = _part(app, name, spec, tuple(builder.branches.get(name, {}).values()))
        if getattr(spec, "is_error_handler", False):
            guarded = tuple(n for n, other in builder.nodes.items() if error_handler(other) == name)
            part = dataclasses.replace(part, path=vertex_name(name), guards=guarded)
        parts.append(part)
    for label, branch in builder.branches.get(START, {}).items():
        asks = inspect_node(branch.path)
        if holds_agent(asks) and label not in app.nodes:
            nothing = Reading(may_write=frozenset(), targets=frozenset())
            parts.append(Part(label, START, label, asks, asks, nothing, (branch,)))
    return parts


def _part(app: App, name: str, spec: Any, branches: tuple[Any, ...]) -> Part:
    bound = app.nodes[name].bound
    code, reading = inspect_node(bound), read_source(bound)
    asking = {id(b): inspect_node(b.path) for b in branches}
    task = _together(code, asking.values())
    asked = tuple(b for b in branches if holds_agent(asking[id(b)]))
    return Part(name, name, name, code, task, reading, asked, spec)


def error_handler(spec: Any) -> str | None:
    """The node that handles the errors of a node, by what the builder knows of it."""
    handler: str | None = getattr(spec, "error_handler_node", None)
    return handler


def _together(code: Findings, branches: Iterable[Findings]) -> Findings:
    """What a node holds, with the conditional edges behind it."""
    for branch in branches:
        code = dataclasses.replace(
            code,
            calls_model=code.calls_model or branch.calls_model,
            graphs=tuple({id(g): g for g in (*code.graphs, *branch.graphs)}.values()),
            tasks={**code.tasks, **branch.tasks},
            tools={**code.tools, **branch.tools},
            unresolved=(*code.unresolved, *branch.unresolved),
            clients=tuple(sorted({*code.clients, *branch.clients})),
            calls=min(2, code.calls + branch.calls),
        )
    return code


def use_of(app: App, part: Part) -> StateUse:
    """What a part reads of the state; a routing function reads what its branch is given."""
    if part.name == START:
        (branch,) = part.branches
        return state_use(branch.path, branch_channels(app, START, branch))
    return state_use(app.nodes[part.name].bound, read_channels(app, part.name))


def node_of(app: App, part: Part, use: StateUse, prefix: str) -> Node:
    """The node of the data flow that a part is, with its path behind that of the graph around."""
    code, reading = part.code, part.reading
    channels = state_channels(app)
    is_cached = part.spec is not None and part.spec.cache_policy
    readable = read_channels(app, part.name) if part.name != START else frozenset[str]()
    reads = readable if use.may_read is None else use.may_read & readable
    for branch in part.branches:  # they ask a model in its name
        reads |= branch_channels(app, part.name, branch)
    # Where an error is handled, the run may go on without what the node writes.
    must_write = frozenset[str]() if error_handler(part.spec) else reading.must_write & channels
    return Node(
        path=prefix + part.path,
        reads=reads,
        may_write=channels if reading.may_write is None else reading.may_write & channels,
        must_write=use.made & must_write,
        must_read=_certainly_read(use, app, part.name, readable),
        is_read_by_code=use.may_read is not None,
        always_calls=code.calls_model and reading.always_calls and not is_cached,
        calls_again=part.task.calls_model and not _calls_once(part),
        is_graph=part.name != START and isinstance(app.nodes[part.name].bound, Pregel),
        hands_over=bool(code.graphs) and "PARENT" in mentions_inside(code),
    )


def _calls_once(part: Part) -> bool:
    if part.name == START:
        return part.code.calls < 2
    return not part.branches and part.reading.calls_once and part.code.calls < 2


def _certainly_read(use: StateUse, app: App, name: str, readable: frozenset[str]) -> frozenset[str]:
    """Channels that every run of a node reads before it calls a model."""
    is_dict = name != START and app.nodes[name].mapper is None
    if ALL in use.must_read and is_dict:  # the text of a dict shows it all
        return readable
    return use.must_read & readable


def mentions_inside(findings: Findings, seen: frozenset[int] = frozenset()) -> frozenset[str]:
    """Names that users' code in a node uses, and that in the graphs inside it."""
    inner = (
        mentions_inside(inspect_node(node.bound), seen | {id(graph)})
        for graph in findings.graphs
        if id(graph) not in seen
        for node in graph.nodes.values()
    )
    return findings.users_mentions.union(*inner)
