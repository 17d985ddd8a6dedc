"""What Python objects hold: attributes, defaults, closures, the functions that others wrap."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.func import _TaskFunction


def codes(code: types.CodeType) -> Iterable[types.CodeType]:
    """A function's code and that of the functions defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def module_of(function: types.FunctionType) -> str:
    """The module of a function's code; what wraps a function claims to be in that one's."""
    return str(function.__globals__.get("__name__", ""))


def cell_values(function: types.FunctionType) -> dict[str, Any]:
    """What a function's closure holds, by name; not what is assigned to a name only later."""
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            values[name] = cell.cell_contents
    return values


def defaults(function: types.FunctionType) -> dict[str, Any]:
    """The defaults of a function's parameters, by name."""
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    last = function.__defaults__ or ()
    by_name = dict(zip(names[len(names) - len(last) :], last, strict=True))
    return by_name | (function.__kwdefaults__ or {})


def wrapped_function(held: Any) -> Any:
    """The function in what `functools.cache` and its like made."""
    if isinstance(held, types.FunctionType | type) or not callable(held):
        return None
    if isinstance(held, Runnable | _TaskFunction):
        return None
    inner = inspect.getattr_static(held, "__wrapped__", None)
    if inner is None:
        inner = getattr(held, "__dict__", {}).get("__wrapped__")
    return inner if isinstance(inner, types.FunctionType) else None


def is_code(held: Any) -> bool:
    """Whether a member of a class is a method or a property."""
    kinds = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)
    return isinstance(held, kinds) or wrapped_function(held) is not None


def held_by(function: types.FunctionType) -> list[Any]:
    """What a function of LangChain was given when it was made; tools it only offers a model."""
    wrapped = getattr(function, "__wrapped__", None)
    held = [wrapped, *(function.__defaults__ or ()), *cell_values(function).values()]
    return [part for part in held if part is not None and not _offers_tools(part)]


def _offers_tools(part: Any) -> bool:
    """Whether a value is tools, which a model node offers its model and does not run."""
    if isinstance(part, dict):
        part = list(part.values())
    parts = part if isinstance(part, list | tuple) else [part]
    is_node = type(part).__name__ == "ToolNode"
    return is_node or any(isinstance(inner, BaseTool) for inner in parts)


def attributes(value: Any) -> Iterable[Any]:
    """What an object's attributes hold, sorted by name."""
    held = getattr(value, "__dict__", {})
    names: set[str] = set(held)
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names.update([slots] if isinstance(slots, str) else slots)
    for name in sorted(names):
        with contextlib.suppress(AttributeError):  # a slot that was never filled
            yield held[name] if name in held else getattr(value, name)


def outer_names(function: types.FunctionType) -> Callable[[str], Any]:
    """What a name of the function stands for outside it; None where that is not known."""
    cells = cell_values(function)

    def value(name: str) -> Any:
        if name in (*function.__code__.co_varnames, *function.__code__.co_cellvars):
            return None
        return cells.get(name, function.__globals__.get(name))

    return value
