"""Which nodes call a model: read from what a node's code holds, without running it.

A node's function, its closure, the globals it names, the object it is bound to and the
Runnables it is made of are searched for chat models and for other graphs (`search`).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import dis
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.func import _TaskFunction
from langgraph.pregel import Pregel

from marft_graph.graph import libraries
from marft_graph.graph.libraries import LANGCHAIN, package
from marft_graph.graph.objects import codes
from marft_graph.graph.search import Search
from marft_graph.graph.values import Bound, Known
from marft_graph.names import inner_path

__all__ = ["Findings", "codes", "graph_name", "inspect_node", "reachable"]

_DEPTH = 6
_Known = dict[int, tuple[Any, "Findings"]]
_remembered: contextvars.ContextVar[_Known | None] = contextvars.ContextVar("found", default=None)


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What a node's code holds."""

    calls_model: bool
    graphs: tuple[Pregel[Any, Any, Any, Any], ...]
    """Graphs that the node can run inside itself."""
    mentions: frozenset[str] = frozenset()
    """Names that the code uses, such as `Command` and `Send`."""
    users_mentions: frozenset[str] = frozenset()
    """The same without the code of LangChain and LangGraph."""
    tasks: Mapping[str, Findings] = dataclasses.field(default_factory=dict)
    """Tasks of the functional API that the code can call, by name."""
    tools: Mapping[str, Findings] = dataclasses.field(default_factory=dict)
    """What tools that the code can run hold, by the name that a run gives it."""
    is_opaque: bool = False
    """Whether there is no Python code to read."""
    unresolved: tuple[str, ...] = ()
    """Calls in the code of which it does not show what they call."""
    clients: tuple[str, ...] = ()
    """Clients of providers that the code can ask past LangChain, such as `openai.OpenAI`."""
    calls: int = 0
    """How often one run may ask a model: 0, 1, or 2 for more."""

    @property
    def is_certain(self) -> bool:
        """Whether no call of a model can have been missed."""
        return not self.is_opaque and not self.unresolved


def inspect_node(bound: Any) -> Findings:
    """Search what a node runs.

    Args:
        bound: the node's Runnable (`app.nodes[name].bound`).
    """
    known = _remembered.get()
    if known is not None and id(bound) in known:
        return known[id(bound)][1]
    search = Search()
    try:
        calls = search.touch(bound)
    except RecursionError:  # objects in objects without end
        calls = 2
        search.unresolved.append("deeper than is looked at")
    found = _findings(search, calls, frozenset())
    if known is not None:
        known[id(bound)] = bound, found
    return found


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Inside, what was searched once is not searched again: nothing of it may change meanwhile."""
    if _remembered.get() is not None:
        yield
        return
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def graph_name(graph: Pregel[Any, Any, Any, Any]) -> str:
    """The name that a graph was given; empty where it has none of its own."""
    return inner_path("", graph=str(graph.name or "")).removeprefix("/")


def _findings(search: Search, calls: int, above: frozenset[int]) -> Findings:
    tasks = {}
    for name, task in search.tasks.items():
        if id(task) not in above:
            inner = Search()
            often = inner.touch(task.func)
            tasks[name] = _findings(inner, often, above | {id(task)})
    tools: dict[str, Findings] = {}
    for tool in search.tools.values():
        if id(tool) not in above:
            tools |= _tool(tool, above | {id(tool)})
    names: dict[bool, set[str]] = {True: set(search.classes), False: set(search.classes)}
    for function in search.functions:
        used = {name for code in codes(function.__code__) for name in code.co_names}
        if any("__parent__" in code.co_consts for code in codes(function.__code__)):
            used.add("PARENT")
        names[libraries.is_langchain(function.__module__)] |= used
    for inside in tools.values():  # what a tool returns, the node that runs it returns
        names[False] |= inside.users_mentions
    for name in search.new_graphs:
        if name:
            tools[name] = Findings(calls_model=True, graphs=(), calls=2)
    holds = bool(search.models or search.graphs or search.new_graphs or tasks or tools)
    return Findings(
        calls_model=bool(search.models) or "" in search.new_graphs,
        graphs=tuple(search.graphs),
        mentions=frozenset(names[True] | names[False]),
        users_mentions=frozenset(names[False]),
        tasks=tasks,
        tools=tools,
        is_opaque=not search.functions and not holds,
        unresolved=tuple(search.unresolved),
        clients=tuple(sorted(search.clients)),
        calls=calls,
    )


def _tool(tool: BaseTool, above: frozenset[int]) -> dict[str, Findings]:
    """What a tool runs: what it asks itself by the tool's name, a named graph by its own."""
    search = Search()
    calls = 0
    for name in ("func", "coroutine"):
        if getattr(tool, name, None) is not None:
            calls += search.touch(getattr(tool, name))
    for name in ("_run", "_arun"):
        method = inspect.getattr_static(type(tool), name)
        if libraries.is_followed(getattr(method, "__module__", None)):
            calls += search.use(Bound(method, Known(tool)))
    found = _findings(search, min(2, calls), above)
    unnamed = tuple(graph for graph in found.graphs if not graph_name(graph))
    parts = {tool.name: dataclasses.replace(found, graphs=unnamed, tools={})}
    for graph in found.graphs:
        if graph_name(graph):
            parts[graph_name(graph)] = Findings(calls_model=False, graphs=(graph,), calls=2)
    return parts | dict(found.tools)


def reachable(value: Any, seen: set[int], depth: int = _DEPTH) -> Iterator[Any]:
    """What code can call or hold, itself first: functions, their closures and globals, objects.

    Args:
        value: where to begin.
        seen: ids of what is known already; what is found is added.
        depth: steps that are taken at most.
    """
    if depth < 0 or id(value) in seen:
        return
    seen.add(id(value))
    yield value
    if isinstance(value, BaseChatModel | Pregel | _TaskFunction):
        return
    for inner in _parts(value):
        yield from reachable(inner, seen, depth - 1)


def _parts(value: Any) -> Iterator[Any]:
    """What a value may call or hold."""
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value)
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, Runnable) or _is_users_object(value):
        yield from _attributes(value)
        call = inspect.getattr_static(type(value), "__call__", None)
        if isinstance(call, types.FunctionType) and not isinstance(value, Runnable):
            yield call


def _function_parts(function: types.FunctionType) -> Iterator[Any]:
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    for wrapped in (getattr(function, "__wrapped__", None), *defaults):
        if wrapped is not None:
            yield wrapped
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet: a name that is assigned later
            continue
    if package(function.__module__) in LANGCHAIN:
        return  # its globals are the library's own business; what a user gave it is in its closure
    for code in codes(function.__code__):
        for instruction in dis.get_instructions(code):
            if instruction.opname == "LOAD_GLOBAL" and instruction.argval in function.__globals__:
                yield function.__globals__[instruction.argval]


def _is_users_object(value: Any) -> bool:
    module = type(value).__module__
    return not (
        inspect.ismodule(value)
        or isinstance(value, type)
        or package(module) in (*LANGCHAIN, "builtins", "pydantic", "re")
    )


def _attributes(value: Any) -> Iterator[Any]:
    names: set[str] = set(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        names.update(getattr(kind, "__slots__", ()))
    for name in sorted(names):
        try:
            yield (
                inspect.getattr_static(value, name)
                if name not in getattr(value, "__dict__", {})
                else value.__dict__[name]
            )
        except AttributeError:  # a slot that was never filled
            continue
