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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import (
    Runnable,
    RunnableBinding,
    RunnableSequence,
    RunnableWithFallbacks,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import run_in_executor
from langgraph.pregel import Pregel

from marft_graph.graph.roles import inspect_node
from marft_graph.graph.syntax import REPEATING, Function, called, find, own_nodes
from marft_graph.graph.targets import Targets, plain_locals

_CALLS = frozenset({"invoke", "ainvoke"})
_MAKERS = frozenset(
    {"bind", "bind_tools", "pipe", "with_config", "with_fallbacks", "with_retry"}
    | {"with_structured_output"}
)


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
            read_source(bound.steps[-1]), always_calls=False, calls_once=_is_one_call(bound)
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
    found = [f for functions in held for f in functions if f is not run_in_executor]
    if found:
        return list(dict.fromkeys(found))
    call = inspect.getattr_static(type(bound), "__call__", None)
    return [call] if isinstance(call, types.FunctionType) else []


def _read_function(function: types.FunctionType) -> Reading:
    tree = find(function.__code__)
    yields = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    if tree is None or yields:
        return Reading()
    names = _names(function)
    returned = list(_returned(tree))
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
        always_calls=_always_calls(tree, names),
        calls_once=_calls_once(tree, names),
    )


def _names(function: types.FunctionType) -> Callable[[str], Any]:
    """What a name of the function stands for outside it; None where that is not known."""
    cells: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue

    def value(name: str) -> Any:
        if name in (*function.__code__.co_varnames, *function.__code__.co_cellvars):
            return None
        return cells.get(name, function.__globals__.get(name))

    return value


def _returned(tree: Function) -> Iterator[ast.expr | None]:
    """Every expression that the function can return; None for the end of its body."""
    if isinstance(tree, ast.Lambda):
        yield from _alternatives(tree.body)
        return
    for node in own_nodes(tree.body):
        if isinstance(node, ast.Return):
            yield from _alternatives(node.value)
    if not _always_leaves(tree.body):
        yield None


def _alternatives(value: ast.expr | None) -> Iterator[ast.expr | None]:
    if isinstance(value, ast.IfExp):
        yield from _alternatives(value.body)
        yield from _alternatives(value.orelse)
    else:
        yield value


def _always_leaves(body: Sequence[ast.stmt]) -> bool:
    """Whether a block never reaches its end."""
    last = body[-1]
    if isinstance(last, ast.Return | ast.Raise):
        return True
    if isinstance(last, ast.If):
        return bool(last.orelse) and _always_leaves(last.body) and _always_leaves(last.orelse)
    if isinstance(last, ast.With | ast.AsyncWith):
        return _always_leaves(last.body)
    return False


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


def _always_calls(tree: Function, names: Callable[[str], Any]) -> bool:
    """Whether a chat model is called before anything in the function can branch off."""
    assigned: dict[str, ast.expr] = {}
    if isinstance(tree, ast.Lambda):
        return _has_call(tree.body, names, assigned)
    return _block_calls(tree.body, names, assigned)


def _block_calls(
    body: Sequence[ast.stmt], names: Callable[[str], Any], assigned: dict[str, ast.expr]
) -> bool:
    for statement in body:
        value = getattr(statement, "value", None)  # of an assignment, a return, an expression
        if isinstance(value, ast.expr) and _has_call(value, names, assigned):
            return True
        block = statement.body if isinstance(statement, ast.With | ast.AsyncWith) else ()
        if _block_calls(block, names, assigned):
            return True
        inside = list(own_nodes([statement]))
        if any(isinstance(node, ast.Return) for node in inside):
            return False
        for node in inside:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assigned.pop(node.id, None)  # set here, perhaps in a branch: not known any more
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            assigned[statement.targets[0].id] = statement.value
    return False


def _has_call(
    value: ast.expr, names: Callable[[str], Any], assigned: Mapping[str, ast.expr]
) -> bool:
    """Whether evaluating an expression always calls a model."""
    if isinstance(value, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return False
    if isinstance(value, ast.IfExp):
        return _has_call(value.test, names, assigned) or (
            _has_call(value.body, names, assigned) and _has_call(value.orelse, names, assigned)
        )
    if isinstance(value, ast.BoolOp):
        return _has_call(value.values[0], names, assigned)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        is_call = value.func.attr in _CALLS
        if is_call and _is_model(value.func.value, names, assigned):
            return True
    return any(_has_call(part, names, assigned) for part in _expressions(value))


def _expressions(value: ast.expr) -> Iterator[ast.expr]:
    for child in ast.iter_child_nodes(value):
        if isinstance(child, ast.expr):
            yield child
        elif isinstance(child, ast.keyword):
            yield child.value


def _is_model(
    value: ast.expr, names: Callable[[str], Any], assigned: Mapping[str, ast.expr]
) -> bool:
    """Whether an expression certainly is a chat model, or a chain with one in it."""
    if isinstance(value, ast.Name):
        if value.id in assigned:
            inner = {name: node for name, node in assigned.items() if name != value.id}
            return _is_model(assigned[value.id], names, inner)
        return _holds_model(names(value.id))
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
        return _is_model(value.left, names, assigned) or _is_model(value.right, names, assigned)
    if isinstance(value, ast.Call):
        if isinstance(value.func, ast.Attribute):  # model.bind_tools(...)
            return value.func.attr in _MAKERS and _is_model(value.func.value, names, assigned)
        if isinstance(value.func, ast.Name):  # ChatOpenAI(...)
            made = names(value.func.id)
            return isinstance(made, type) and issubclass(made, BaseChatModel)
    return False


def _calls_once(tree: Function, names: Callable[[str], Any]) -> bool:
    """Whether what can call a model is named once in a function, outside of loops."""
    body = [tree.body] if isinstance(tree, ast.Lambda) else tree.body
    places = [place for node in body for place in _names_in(node, is_repeated=False)]
    calling = [(name, is_repeated) for name, is_repeated in places if _can_call(names(name))]
    assigned = {
        name: values[0]
        for name, values in plain_locals(tree, unchanged=False).items()
        if len(values) == 1
    }
    seen = [
        node
        for part in body
        for node in ast.walk(part)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _CALLS
        and _is_model(node.func.value, names, assigned)
    ]
    if len(seen) != 1 or len(calling) != 1:
        return False  # often, or in a way that is not seen here
    name, is_repeated = calling[0]
    return not is_repeated and _is_one_call(names(name))


def _names_in(node: ast.AST, *, is_repeated: bool) -> Iterator[tuple[str, bool]]:
    """Names that are read, and whether that may happen several times."""
    if isinstance(node, ast.Name):
        yield node.id, is_repeated
    if isinstance(node, ast.Attribute) and node.attr in ("batch", "abatch", "with_retry"):
        is_repeated = True
    inside = is_repeated or isinstance(node, REPEATING)
    for child in ast.iter_child_nodes(node):
        yield from _names_in(child, is_repeated=inside)


def _can_call(value: Any) -> bool:
    found = inspect_node(value)
    return any((found.calls_model, found.graphs, found.tasks, found.tools, found.unresolved))


def _is_one_call(value: Any) -> bool:
    """Whether running a value calls a model once."""
    if isinstance(value, RunnableSequence):
        calling = [step for step in value.steps if _can_call(step)]
        return len(calling) == 1 and _is_one_call(calling[0])
    if type(value) is RunnableBinding:
        return _is_one_call(value.bound)
    return isinstance(value, BaseChatModel)


def _holds_model(value: Any) -> bool:
    if isinstance(value, RunnableBindingBase):
        return _holds_model(value.bound)
    if isinstance(value, RunnableWithFallbacks):
        return _holds_model(value.runnable)
    if isinstance(value, RunnableSequence):
        return any(_holds_model(step) for step in value.steps)
    return isinstance(value, BaseChatModel)


def _both(left: frozenset[str] | None, right: frozenset[str] | None) -> frozenset[str] | None:
    return None if left is None or right is None else left | right


def _union(sets: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    nothing: frozenset[str] | None = frozenset()
    return functools.reduce(_both, sets, nothing)
