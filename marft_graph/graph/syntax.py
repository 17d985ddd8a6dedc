"""The syntax tree of a function that exists: found by its code, or not at all."""

from __future__ import annotations

import ast
import functools
import linecache
import types
from collections.abc import Iterator, Sequence

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
REPEATING = (
    *(ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp),
    *(ast.GeneratorExp, ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
)
"""What may run its inside several times."""


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def find(code: types.CodeType) -> Function | None:
    """A function's own syntax tree; None where it is not found for certain."""
    module = _parsed("".join(linecache.getlines(code.co_filename)))
    if module is None:
        return None
    is_lambda = code.co_name == "<lambda>"
    candidates: list[Function] = []
    for node in _functions_of(module):
        if isinstance(node, ast.Lambda):
            if is_lambda and _encloses(node, code):
                candidates.append(node)
        elif not is_lambda:
            line = min(n.lineno for n in (node, *node.decorator_list))
            if node.name == code.co_name and line == code.co_firstlineno:
                candidates.append(node)
    return candidates[0] if len(candidates) == 1 else None


@functools.lru_cache(maxsize=64)
def _functions_of(module: ast.Module) -> tuple[Function, ...]:
    kinds = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef)
    return tuple(node for node in ast.walk(module) if isinstance(node, kinds))


def own_nodes(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Nodes of statements, without those of functions and classes defined there."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def called(call: ast.Call) -> str:
    """The last name of what a call calls."""
    function = call.func
    if isinstance(function, ast.Subscript):  # Command[Literal["next"]](...)
        function = function.value
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _encloses(node: ast.Lambda, code: types.CodeType) -> bool:
    """Whether a lambda's body is exactly where a code object's instructions come from."""
    places = [p for p in code.co_positions() if None not in p and p[2:] != (0, 0)]
    if not places:
        return False
    first = min((line, column) for line, _, column, _ in places)
    last = max((line, column) for _, line, _, column in places)
    body = node.body
    return first == (body.lineno, body.col_offset) and last == (
        body.end_lineno,
        body.end_col_offset,
    )


def returned_values(tree: Function) -> Iterator[ast.expr | None]:
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
