"""Which nodes call a model: read from what a node's code holds, without running it.

A node's function, its closure, the globals it names, the object it is bound to and the
Runnables it is made of are searched for chat models and for other graphs.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable
from langgraph.func import _TaskFunction
from langgraph.pregel import Pregel

_DEPTH = 6
_LIBRARIES = ("langchain", "langchain_core", "langgraph")


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What a node's code holds."""

    calls_model: bool
    graphs: tuple[Pregel[Any, Any, Any, Any], ...]
    """Graphs that the node can run inside itself."""
    mentions: frozenset[str]
    """Names that the code uses, such as `Command` and `Send`."""
    users_mentions: frozenset[str] = frozenset()
    """The same without the code of LangChain and LangGraph."""
    tasks: Mapping[str, Findings] = dataclasses.field(default_factory=dict)
    """Tasks of the functional API that the code can call, by name."""
    is_opaque: bool = False
    """Whether there is no Python code to read."""


def inspect_node(bound: Any) -> Findings:
    """Search what a node runs.

    Args:
        bound: the node's Runnable (`app.nodes[name].bound`).
    """
    return _inspect(bound, set())


def _inspect(bound: Any, seen: set[int]) -> Findings:
    models, graphs, tasks = [], [], {}
    mentions: set[str] = set()
    users_mentions: set[str] = set()
    is_opaque = True
    for value in reachable(bound, seen):
        if isinstance(value, BaseChatModel) or _makes_model(value):
            models.append(value)
        elif isinstance(value, Pregel):
            graphs.append(value)
        elif isinstance(value, _TaskFunction):
            tasks[value.func.__name__] = _inspect(value.func, set(seen))
        elif isinstance(value, types.FunctionType):
            names = {name for code in codes(value.__code__) for name in code.co_names}
            mentions |= names
            is_opaque = False
            if _package(value.__module__) not in _LIBRARIES:
                users_mentions |= names
    return Findings(
        calls_model=bool(models),
        graphs=tuple(graphs),
        mentions=frozenset(mentions),
        users_mentions=frozenset(users_mentions),
        tasks=tasks,
        is_opaque=is_opaque and not models and not graphs,
    )


def _makes_model(value: Any) -> bool:
    """Whether calling it makes a chat model: a model's class, or LangChain's `init_chat_model`."""
    if isinstance(value, type):
        return issubclass(value, BaseChatModel) and not inspect.isabstract(value)
    return isinstance(value, types.FunctionType) and (
        value.__name__ == "init_chat_model" and value.__module__.startswith("langchain")
    )


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
    for wrapped in (getattr(function, "__wrapped__", None), *(function.__defaults__ or ())):
        if wrapped is not None:
            yield wrapped
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet: a name that is assigned later
            continue
    if _package(function.__module__) in _LIBRARIES:
        return  # its globals are the library's own business; what a user gave it is in its closure
    for code in codes(function.__code__):
        for instruction in dis.get_instructions(code):
            if instruction.opname == "LOAD_GLOBAL" and instruction.argval in function.__globals__:
                yield function.__globals__[instruction.argval]


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def _is_users_object(value: Any) -> bool:
    module = type(value).__module__
    return not (
        inspect.ismodule(value)
        or isinstance(value, type)
        or _package(module) in (*_LIBRARIES, "builtins", "pydantic", "re")
    )


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


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
