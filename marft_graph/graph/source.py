"""What a node's source says for certain: which channels it writes, where it goes, that it calls.

Reads syntax trees and runs nothing. Whatever is not plain in the source is left open (None, or
not certain), so that what is built on it errs on the side of `possible`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterable
from typing import Any

from langchain_core.runnables import Runnable, RunnableSequence
from langchain_core.runnables.config import run_in_executor
from langgraph.pregel import Pregel

from marft_graph.graph.model_calls import always_calls, calls_once, is_one_call
from marft_graph.graph.objects import outer_names
from marft_graph.graph.syntax import Function, called, find, returned_values
from marft_graph.graph.targets import Targets


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What the source of a node, or of a branch, says."""

    may_write: frozenset[str] | None = None
    """Channels that it can write at most; None: any."""
    must_write: frozenset[str] = frozenset()
    """Channels that every run writes."""
    targets: frozenset[str] | None = None
    """Nodes that it can go to at most, by `Command` or as a branch; None: any."""
    named: frozenset[str] = frozenset()
    """Nodes that it names as targets, also where `targets` is None."""
    sent: frozenset[str] = frozenset()
    """Those of them that it names in a `Send`."""
    goes_one_way: bool = False
    """Whether it goes to one node at a time, and not to several at once."""
    may_stay: bool = False
    """Whether it may return without naming a node to go to, as far as that can be read."""
    may_send_nothing: bool = False
    """Whether the targets it returns may be an empty list."""
    always_calls: bool = False
    """Whether every run that ends well has called a chat model."""
    calls_once: bool = False
    """Whether no run calls a chat model more than once."""

    def __or__(self, other: Reading) -> Reading:
        """What holds for either of two functions."""
        return Reading(
            _both(self.may_write, other.may_write),
            self.must_write & other.must_write,
            _both(self.targets, other.targets),
            self.named | other.named,
            self.sent | other.sent,
            self.goes_one_way and other.goes_one_way,
            self.may_stay or other.may_stay,
            self.may_send_nothing or other.may_send_nothing,
            self.always_calls and other.always_calls,
            self.calls_once and other.calls_once,
        )


def read_source(bound: Any) -> Reading:
    """Read the function behind a node or a branch; everything open where it has no source.

    Args:
        bound: a function, a partial, a method, an object with `__call__`, or a Runnable made of
            one, such as `app.nodes[name].bound`.
    """
    if isinstance(bound, RunnableSequence):
        return dataclasses.replace(
            read_source(bound.steps[-1]), always_calls=False, calls_once=is_one_call(bound)
        )
    readings = [_read_function(function) for function in _functions(bound)]
    return functools.reduce(Reading.__or__, readings) if readings else Reading()


def _functions(bound: Any) -> list[types.FunctionType]:
    """The Python functions that a node may run: its sync and its async one."""
    if bound is None or isinstance(bound, Pregel):
        return []
    if isinstance(bound, RunnableSequence):
        return _functions(bound.steps[-1])
    if isinstance(bound, functools.partial):
        return _functions(bound.func)
    if isinstance(bound, types.MethodType):
        return _functions(bound.__func__)
    if isinstance(bound, types.FunctionType):
        return [bound]
    names = ("func", "afunc") if isinstance(bound, Runnable) else ()
    held = [_functions(getattr(bound, name)) for name in names if hasattr(bound, name)]
    functions = [f for parts in held for f in parts if f is not run_in_executor]
    if functions:
        return list(dict.fromkeys(functions))
    call = inspect.getattr_static(type(bound), "__call__", None)
    return [call] if isinstance(call, types.FunctionType) else []


def _read_function(function: types.FunctionType) -> Reading:
    tree = find(function.__code__)
    yields = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    if tree is None or yields:
        return Reading()
    names = outer_names(function)
    returned = list(returned_values(tree))
    updates = [_update(value) for value in returned]
    targets = Targets(tree, names)
    return Reading(
        may_write=_union(may for may, _ in updates),
        must_write=functools.reduce(frozenset.intersection, (must for _, must in updates))
        if updates
        else frozenset(),  # it only raises
        targets=_union(targets.of(value) for value in returned),
        named=targets.named(returned),
        sent=targets.sent(),
        goes_one_way=all(map(targets.is_one, returned))
        or (_is_text(tree) and not any(map(targets.is_list, returned))),
        may_stay=any(map(targets.may_stay, returned)),
        may_send_nothing=any(map(targets.may_be_empty, returned)),
        always_calls=always_calls(tree, names),
        calls_once=calls_once(tree, names),
    )


def _update(value: ast.expr | None) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Channels that a returned value may write at most, and those that it does write."""
    nothing: frozenset[str] = frozenset()
    if value is None or (isinstance(value, ast.Constant) and value.value is None):
        return nothing, nothing
    if isinstance(value, ast.Dict):
        keys = [
            key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None
            for key in value.keys
        ]
        named = frozenset(key for key in keys if key is not None)
        return (named if None not in keys else None), named
    if isinstance(value, ast.Call) and not value.args:
        words = {word.arg: word.value for word in value.keywords}
        if called(value) == "Command" and None not in words:
            return _update(words.get("update"))
        if called(value) == "dict" and None not in words:
            named = frozenset(word for word in words if word is not None)
            return named, named
    return None, nothing


def _is_text(tree: Function) -> bool:
    """Whether a function is declared to return one text."""
    declared = None if isinstance(tree, ast.Lambda) else tree.returns
    if isinstance(declared, ast.Subscript):
        declared = declared.value
        return isinstance(declared, ast.Name) and declared.id == "Literal"
    return isinstance(declared, ast.Name) and declared.id == "str"


def _both(left: frozenset[str] | None, right: frozenset[str] | None) -> frozenset[str] | None:
    return None if left is None or right is None else left | right


def _union(sets: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    nothing: frozenset[str] | None = frozenset()
    return functools.reduce(_both, sets, nothing)
