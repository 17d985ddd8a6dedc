"""Which run, and which place in its graph, the calling code belongs to.

The rule: code belongs to the graph that is running it, whatever it did to the configuration. So the
place is kept in a context variable that is set while a graph or a tool runs, and goes along into
threads and pools. LangGraph's metadata alone do not tell: an inner graph with a `thread_id` of its
own starts a namespace of its own, two agents behind two tools of one node have the same namespace,
and a bound app inside another graph has the outer graph's namespace in front of its own.

Knows LangGraph's and LangChain's ways to run graphs and tools, and nothing of models.
"""

from __future__ import annotations

import contextvars
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tools import BaseTool
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from marft_graph.names import has_own_name, inner_path, node_path
from marft_graph.rollout.callsite import frames

if TYPE_CHECKING:
    from marft_graph.rollout.responder import Responder

RUN_KEY = "marft_run"
"""Key of the run's id in a config's metadata; calls that lost their context are found by it."""
_NAMESPACE = "langgraph_checkpoint_ns"
_ENTRY = "__start__"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Run:
    """One run of an app whose model calls somebody answers."""

    responder: Responder
    is_active: bool = True
    process: int = field(default_factory=os.getpid)
    entered: _Scope | None = None
    """Where its outermost graph began."""


@dataclass(frozen=True, slots=True)
class Place:
    """A task, as one run sees it."""

    run: Run
    namespace: str
    """Node names and task ids from the run's outermost graph down, whatever LangGraph calls it."""
    node: str
    """Node path, without task ids; empty outside a task."""
    graph: Pregel[Any, Any, Any, Any] | None = None
    """The innermost graph, where it is known."""
    task: str = ""
    """Its node, under the graph's own name for it."""


@dataclass(frozen=True, slots=True)
class _View:
    """Where a scope stands in one run."""

    run: Run
    namespace: str
    path: str
    """What the paths of nodes in the scope begin with."""
    around: str
    """Path of the node around it."""


@dataclass(frozen=True, slots=True)
class _Scope:
    """A graph that runs, or a tool."""

    raw: str
    """LangGraph's namespace of the task around it."""
    views: tuple[_View, ...]
    """Of the innermost run first: a bound app may run inside another, or in an episode."""
    graph: Pregel[Any, Any, Any, Any] | None
    tool: str = ""
    outer: _Scope | None = None

    def place(self, view: _View, raw: str) -> Place:
        """The task with LangGraph's namespace `raw`, which lies in the scope."""
        rest = raw
        if self.raw and (raw == self.raw or raw.startswith(f"{self.raw}|")):
            rest = raw[len(self.raw) :].lstrip("|")
        task = rest.rpartition("|")[2].partition(":")[0]
        name = node_path(rest)
        if task == _ENTRY:
            name = name.removesuffix(_ENTRY) + _entry_router(self.graph)
        return Place(
            view.run,
            "|".join(part for part in (view.namespace, rest) if part),
            "/".join(part for part in (view.path, name) if part),
            self.graph,
            task,
        )


_current: contextvars.ContextVar[Run | None] = contextvars.ContextVar("marft_run", default=None)
_scope: contextvars.ContextVar[_Scope | None] = contextvars.ContextVar("marft_scope", default=None)
_runs: dict[str, Run] = {}
_ended: weakref.WeakSet[Run] = weakref.WeakSet()
"""Episodes that are over, while a thread or a task that they have left running keeps them."""


@contextmanager
def in_run(run_id: str, run: Run, *, context: bool) -> Iterator[None]:
    """Make the run known by its id and, with `context`, the one that the calling code is in."""
    _runs[run_id] = run
    token = _current.set(run) if context else None
    try:
        yield
    finally:
        if token is not None:
            _current.reset(token)
        run.is_active = False
        run.entered = None
        del _runs[run_id]
        if run.responder.is_strict:
            _ended.add(run)


def active_runs() -> list[Run]:
    """The runs that have not ended."""
    return list(_runs.values())


def leftovers() -> int:
    """Runs that have ended, and of which something that they started may still ask a model."""
    return len(_ended)


def current_run() -> Run | None:
    """The run that the calling code is in, inside a task or not."""
    return _current.get()


def places(metadata: Mapping[str, Any] | None) -> list[Place]:
    """Where a call is made, as each run around it sees it, the innermost first; empty outside."""
    known = known_metadata(metadata)
    raw = known.get(_NAMESPACE, "")
    scope, run = _scope_and_run(known)
    if run is None or not raw:
        return []
    if scope is None:
        return [Place(run, raw, node_path(raw))]
    return [scope.place(view, raw) for view in scope.views]


def whole_namespace(metadata: Mapping[str, Any] | None) -> str:
    """A task's namespace from the outermost run's graph down; empty outside a task."""
    found = places(metadata)
    return found[-1].namespace if found else known_metadata(metadata).get(_NAMESPACE, "")


def known_metadata(metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A call's metadata, those that it inherits included."""
    inherited = (var_child_runnable_config.get() or {}).get("metadata") or {}
    return {**inherited, **(metadata or {})}


def _scope_and_run(known: Mapping[str, Any]) -> tuple[_Scope | None, Run | None]:
    """An explicit config tells more than a context, which a long-lived thread may have kept."""
    scope, named = _scope.get(), _runs.get(known.get(RUN_KEY, ""))
    if named is not None and (scope is None or all(v.run is not named for v in scope.views)):
        return named.entered, named
    return scope, named or (scope.views[0].run if scope is not None else _current.get())


def _entry_router(graph: Pregel[Any, Any, Any, Any] | None) -> str:
    """The branch at a graph's entry that is running: its tasks have no other name."""
    if not isinstance(graph, CompiledStateGraph):
        return _ENTRY
    branches = graph.builder.branches.get(_ENTRY, {})
    running = {frame.f_code for frame in frames()}
    for name, branch in branches.items():
        functions = (getattr(branch.path, kind, None) for kind in ("func", "afunc"))
        if any(getattr(function, "__code__", None) in running for function in functions):
            return name
    return next(iter(branches), _ENTRY)


# Entering graphs and tools


def _graph_scope(graph: Pregel[Any, Any, Any, Any], config: Any) -> _Scope | None:
    """The scope of a graph that is about to run; None outside every run."""
    known = known_metadata((config or {}).get("metadata"))
    raw = known.get(_NAMESPACE, "")
    scope, run = _scope_and_run(known)
    if run is None:
        return None
    views: tuple[_View, ...] = ()
    if scope is not None:
        views = tuple(_inner_view(scope, view, raw, graph) for view in scope.views)
    if all(view.run is not run for view in views):
        views = (_View(run, "", "", ""), *views)
    found = _Scope(raw, views, graph, outer=scope)
    run.entered = run.entered or found
    return found


def _inner_view(scope: _Scope, view: _View, raw: str, graph: Pregel[Any, Any, Any, Any]) -> _View:
    place = scope.place(view, raw)
    again = _path_of_same(scope, view.run, graph)
    if again is not None:
        path = again
    elif scope.tool and raw == scope.raw:
        path = inner_path(view.around, graph=graph.name or "", tool=scope.tool)
    elif _is_node_itself(place, graph):
        path = place.node
    else:
        path = inner_path(place.node, graph=graph.name or "")
    return _View(view.run, place.namespace, path, place.node)


def _path_of_same(scope: _Scope, run: Run, graph: Pregel[Any, Any, Any, Any]) -> str | None:
    """Where a graph stands that is running already: its nodes are the same ones at every depth."""
    around: _Scope | None = scope
    while around is not None:
        if not around.tool and around.graph is not None and _are_same(around.graph, graph):
            return next((view.path for view in around.views if view.run is run), None)
        around = around.outer
    return None


def _are_same(one: Pregel[Any, Any, Any, Any], other: Pregel[Any, Any, Any, Any]) -> bool:
    """Whether two graphs are one, or copies of one, or made anew under one name."""
    if isinstance(one, CompiledStateGraph) and isinstance(other, CompiledStateGraph):
        if one.builder is other.builder:
            return True
    elif one.nodes.keys() == other.nodes.keys():
        return all(one.nodes[name] is other.nodes[name] for name in one.nodes)
    return (
        one.name == other.name and has_own_name(one.name) and one.nodes.keys() == other.nodes.keys()
    )


def _is_node_itself(place: Place, graph: Pregel[Any, Any, Any, Any]) -> bool:
    node = place.graph.nodes.get(place.task) if place.graph is not None else None
    return node is not None and node.bound is graph


@contextmanager
def _in_tool(tool: BaseTool, config: Any) -> Iterator[None]:
    known = known_metadata((config or {}).get("metadata"))
    raw = known.get(_NAMESPACE, "")
    scope, _ = _scope_and_run(known)
    if scope is None or not raw:
        yield
        return
    views = []
    for view in scope.views:
        place = scope.place(view, raw)
        path = inner_path(place.node, tool=tool.name)
        views.append(_View(view.run, place.namespace, path, place.node))
    token = _scope.set(_Scope(raw, tuple(views), scope.graph, tool.name, scope))
    try:
        yield
    finally:
        _scope.reset(token)


@contextmanager
def _inside(scope: _Scope) -> Iterator[None]:
    """Between two items of a stream the consumer has the context, so it is set for each item."""
    tokens = _scope.set(scope), _current.set(scope.views[0].run)
    try:
        yield
    finally:
        _scope.reset(tokens[0])
        _current.reset(tokens[1])


def _stream(self: Any, input: Any, config: Any = None, **kwargs: Any) -> Iterator[Any]:
    scope = _graph_scope(self, config)
    stream = _originals[Pregel, "stream"](self, input, config, **kwargs)
    if scope is None:
        yield from stream
        return
    try:
        while True:
            with _inside(scope):
                try:
                    item = next(stream)
                except StopIteration:
                    return
            yield item
    finally:
        stream.close()


async def _astream(self: Any, input: Any, config: Any = None, **kwargs: Any) -> AsyncIterator[Any]:
    scope = _graph_scope(self, config)
    stream = _originals[Pregel, "astream"](self, input, config, **kwargs)
    try:
        while True:
            try:
                if scope is None:
                    item = await anext(stream)
                else:
                    with _inside(scope):
                        item = await anext(stream)
            except StopAsyncIteration:
                return
            yield item
    finally:
        await stream.aclose()


def _tool_run(self: BaseTool, *args: Any, **kwargs: Any) -> Any:
    with _in_tool(self, kwargs.get("config")):
        return _originals[BaseTool, "run"](self, *args, **kwargs)


async def _tool_arun(self: BaseTool, *args: Any, **kwargs: Any) -> Any:
    with _in_tool(self, kwargs.get("config")):
        return await _originals[BaseTool, "arun"](self, *args, **kwargs)


# Threads: plain ones begin with an empty context


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, to be run elsewhere in the calling code's context; as it is outside runs."""
    if _current.get() is None and not _is_outside.get():
        return function
    context = contextvars.copy_context()
    return lambda *args, **kwargs: context.run(function, *args, **kwargs)


def _submit(self: ThreadPoolExecutor, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    return _originals[ThreadPoolExecutor, "submit"](self, carried(function), *args, **kwargs)


def _start(self: threading.Thread) -> None:
    # A pool's workers outlive what they were started for: what is submitted brings its context.
    module = str(getattr(getattr(self, "_target", None), "__module__", ""))
    is_worker = module == "concurrent.futures.thread" or module.startswith("marft_graph.")
    if not is_worker and (_current.get() is not None or _is_outside.get()):
        self.run = carried(self.run)  # type: ignore[method-assign]
    _originals[threading.Thread, "start"](self)


_is_outside: contextvars.ContextVar[bool] = contextvars.ContextVar("marft_outside", default=False)


@contextmanager
def outside_runs() -> Iterator[None]:
    """What rewards, judges and callbacks ask models is no call of an app, whoever is running."""
    tokens = _is_outside.set(True), _scope.set(None), _current.set(None)
    config = var_child_runnable_config.set(None)
    try:
        yield
    finally:
        var_child_runnable_config.reset(config)
        _current.reset(tokens[2])
        _scope.reset(tokens[1])
        _is_outside.reset(tokens[0])


def is_outside() -> bool:
    """Whether the calling code asks models on purpose, beside the app."""
    return _is_outside.get()


_REPLACEMENTS: dict[tuple[type, str], Callable[..., Any]] = {
    (Pregel, "stream"): _stream,
    (Pregel, "astream"): _astream,
    (BaseTool, "run"): _tool_run,
    (BaseTool, "arun"): _tool_arun,
    (ThreadPoolExecutor, "submit"): _submit,
    (threading.Thread, "start"): _start,
}
_originals: dict[tuple[type, str], Any] = {}


def follow() -> None:
    """Begin to follow graphs, tools and threads; `leave` puts all back."""
    for (owner, name), replacement in _REPLACEMENTS.items():
        _originals[owner, name] = owner.__dict__[name]
        setattr(owner, name, replacement)


def leave() -> None:
    """Graphs, tools and threads are as they were; what is inside a replacement still ends."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
