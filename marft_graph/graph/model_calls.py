"""What a function's source says for certain of its calls of chat models: that it makes one.

Whatever is not plain in the source counts as not certain.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableBinding, RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase

from marft_graph.graph.roles import inspect_node
from marft_graph.graph.syntax import REPEATING, Function, own_nodes
from marft_graph.graph.targets import plain_locals

_CALLS = frozenset({"invoke", "ainvoke"})
MAKERS = frozenset(
    {"bind", "bind_tools", "pipe", "with_config", "with_fallbacks", "with_retry"}
    | {"with_structured_output"}
)
"""Methods that make a model of a model, and ask none."""


def always_calls(tree: Function, names: Callable[[str], Any]) -> bool:
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
        if is_call and is_model(value.func.value, names, assigned):
            return True
    return any(_has_call(part, names, assigned) for part in _expressions(value))


def _expressions(value: ast.expr) -> Iterator[ast.expr]:
    for child in ast.iter_child_nodes(value):
        if isinstance(child, ast.expr):
            yield child
        elif isinstance(child, ast.keyword):
            yield child.value


def is_model(
    value: ast.expr, names: Callable[[str], Any], assigned: Mapping[str, ast.expr]
) -> bool:
    """Whether an expression certainly is a chat model, or a chain with one in it."""
    if isinstance(value, ast.Name):
        if value.id in assigned:
            inner = {name: node for name, node in assigned.items() if name != value.id}
            return is_model(assigned[value.id], names, inner)
        return _holds_model(names(value.id))
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
        return is_model(value.left, names, assigned) or is_model(value.right, names, assigned)
    if isinstance(value, ast.Call):
        if isinstance(value.func, ast.Attribute):  # model.bind_tools(...)
            return value.func.attr in MAKERS and is_model(value.func.value, names, assigned)
        if isinstance(value.func, ast.Name):  # ChatOpenAI(...)
            made = names(value.func.id)
            return isinstance(made, type) and issubclass(made, BaseChatModel)
    return False


def calls_once(tree: Function, names: Callable[[str], Any]) -> bool:
    """Whether what can call a model is named once in a function, outside of loops."""
    body = [tree.body] if isinstance(tree, ast.Lambda) else tree.body
    places = [place for node in body for place in _names_in(node, is_repeated=False)]
    calling = [(name, is_repeated) for name, is_repeated in places if can_call(names(name))]
    assigned = assigned_once(tree)
    seen = [
        node
        for part in body
        for node in ast.walk(part)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _CALLS
        and is_model(node.func.value, names, assigned)
    ]
    if len(seen) != 1 or len(calling) != 1:
        return False  # often, or in a way that is not seen here
    name, is_repeated = calling[0]
    return not is_repeated and is_one_call(names(name))


def _names_in(node: ast.AST, *, is_repeated: bool) -> Iterator[tuple[str, bool]]:
    """Names that are read, and whether that may happen several times."""
    if isinstance(node, ast.Name):
        yield node.id, is_repeated
    if isinstance(node, ast.Attribute) and node.attr in ("batch", "abatch", "with_retry"):
        is_repeated = True
    inside = is_repeated or isinstance(node, REPEATING)
    for child in ast.iter_child_nodes(node):
        yield from _names_in(child, is_repeated=inside)


def assigned_once(tree: Function) -> dict[str, ast.expr]:
    """Local names that are assigned in one place, with what they are assigned."""
    assigned = plain_locals(tree, unchanged=False)
    return {name: values[0] for name, values in assigned.items() if len(values) == 1}


def can_call(value: Any) -> bool:
    """Whether running a value may call a chat model."""
    held = inspect_node(value)
    return any((held.calls_model, held.graphs, held.tasks, held.tools, held.unresolved))


def is_one_call(value: Any) -> bool:
    """Whether running a value calls a model once."""
    if isinstance(value, RunnableSequence):
        calling = [step for step in value.steps if can_call(step)]
        return len(calling) == 1 and is_one_call(calling[0])
    if type(value) is RunnableBinding:
        return is_one_call(value.bound)
    return isinstance(value, BaseChatModel)


def _holds_model(value: Any) -> bool:
    if isinstance(value, RunnableBindingBase):
        return _holds_model(value.bound)
    if isinstance(value, RunnableWithFallbacks):
        return _holds_model(value.runnable)
    if isinstance(value, RunnableSequence):
        return any(_holds_model(step) for step in value.steps)
    return isinstance(value, BaseChatModel)
