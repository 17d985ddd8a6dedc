"""Which channels every run of a function has read before it first calls a model.

Follows statements in order, up to the first call that may ask a model or leave the function.
"""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Callable, Sequence

from marft_graph.graph.model_calls import MAKERS, can_call
from marft_graph.graph.state_body import ALL, StateBody

_WHOLE = frozenset({"str", "repr"})
_QUIET = frozenset(
    {"join", "strip", "lstrip", "rstrip", "split", "splitlines", "format", "lower", "upper"}
    | {"replace", "startswith", "endswith", "append", "extend", "insert", "get", "pop", "items"}
    | {"values", "keys", "update", "copy", "setdefault", "dumps", "loads", "title", "count"}
)
"""Methods of data, which call no model."""


class _Asked(Exception):
    """From here on a model may have been called."""


class _Left(Exception):
    """The function has been left."""


def must_read(body: StateBody) -> frozenset[str]:
    """Channels that every run has read when it first calls a model."""
    if body.stores(body.state):
        return frozenset()
    read: set[str] = set()
    certain = _CertainReads(body)
    try:
        if isinstance(body.tree, ast.Lambda):
            certain.evaluate(body.tree.body, read)
        else:
            certain.run(body.tree.body, read)
    except (_Asked, _Left):
        pass
    return frozenset(read)


class _CertainReads:
    """Walks a function in order; each method adds to `read` what is certainly read in it."""

    def __init__(self, body: StateBody) -> None:
        self._body = body

    def run(self, body: Sequence[ast.stmt], read: set[str]) -> None:
        for place, statement in enumerate(body):
            self._step(statement, body[place + 1 :], read)

    def _step(self, statement: ast.stmt, rest: Sequence[ast.stmt], read: set[str]) -> None:
        if isinstance(statement, ast.If):
            self.evaluate(statement.test, read)
            self._either(
                lambda into: self.run(statement.body, into),
                lambda into: self.run(statement.orelse, into),
                read,
            )
        elif isinstance(statement, ast.Try):
            others = [*statement.handlers, *statement.orelse, *statement.finalbody, *rest]
            if not any(self._calls_model(node) for node in others):
                self.run(statement.body, read)  # whatever is asked is asked in here, in order
            self._stop_if_asking(statement)
        elif isinstance(statement, ast.With | ast.AsyncWith):
            for item in statement.items:
                self.evaluate(item.context_expr, read)
            self.run(statement.body, read)
        elif isinstance(statement, ast.For | ast.AsyncFor):
            self.evaluate(statement.iter, read)
            self._stop_if_asking(*statement.body, *statement.orelse)
        elif isinstance(statement, ast.While):
            self.evaluate(statement.test, read)
            self._stop_if_asking(*statement.body, *statement.orelse)
        elif isinstance(statement, ast.Match):
            self.evaluate(statement.subject, read)
            self._stop_if_asking(*statement.cases)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return
        else:
            if isinstance(statement, ast.AugAssign):
                key = self._body.key(statement.target)
                read.update((key,) if key else ())
            for child in ast.iter_child_nodes(statement):
                if isinstance(child, ast.expr):
                    self.evaluate(child, read)
            if isinstance(statement, ast.Return | ast.Raise):
                raise _Left

    def _either(
        self, left: Callable[[set[str]], None], right: Callable[[set[str]], None], read: set[str]
    ) -> None:
        """Of two ways what both read; of a way that leaves the function nothing has to follow."""
        ways: list[set[str]] = []
        has_asked = False
        for way in (left, right):
            into: set[str] = set()
            try:
                way(into)
            except _Left:
                continue
            except _Asked:
                has_asked = True
            ways.append(into)
        if not ways:
            raise _Left
        read |= set.intersection(*ways)
        if has_asked:
            raise _Asked

    def evaluate(self, node: ast.AST, read: set[str]) -> None:
        """What evaluating an expression reads, in order."""
        key = self._body.key(node)
        if key is not None and self._body.is_read(node):
            read.add(key)
            for value in getattr(node, "args", ())[1:]:
                self.evaluate(value, read)
        elif isinstance(node, ast.Lambda):
            return
        elif isinstance(node, ast.IfExp):
            self.evaluate(node.test, read)
            self._either(
                lambda into: self.evaluate(node.body, into),
                lambda into: self.evaluate(node.orelse, into),
                read,
            )
        elif isinstance(node, ast.BoolOp):
            self.evaluate(node.values[0], read)
            self._stop_if_asking(*node.values[1:])
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            self.evaluate(node.generators[0].iter, read)
            self._stop_if_asking(node)
        elif isinstance(node, ast.FormattedValue) and self._body.is_state(node.value):
            read.add(ALL)
        else:
            for child in ast.iter_child_nodes(node):
                self.evaluate(child, read)
            if isinstance(node, ast.Call):
                self._call(node, read)

    def _call(self, call: ast.Call, read: set[str]) -> None:
        """What a call reads, after its arguments have been evaluated."""
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name in _WHOLE and any(self._body.is_state(value) for value in call.args):
            read.add(ALL)
        value = self._body.value_of(call.func)
        if isinstance(value, types.FunctionType):
            for body in self._body.handed_to(call, value):
                read |= must_read(body) if body else frozenset()
        self._stop_if_asking(call)

    def _stop_if_asking(self, *nodes: ast.AST) -> None:
        if any(self._may_ask(node) for node in nodes):
            raise _Asked

    def _may_ask(self, node: ast.AST) -> bool:
        """Whether a model may be called in some code, or the function left."""
        leaves = any(isinstance(inner, ast.Return | ast.Raise) for inner in ast.walk(node))
        return leaves or self._calls_model(node)

    def _calls_model(self, node: ast.AST) -> bool:
        return any(self._asks(call) for call in ast.walk(node) if isinstance(call, ast.Call))

    def _asks(self, call: ast.Call) -> bool:
        if self._body.key(call) is not None:
            return False
        value = self._body.value_of(call.func)
        if value is not None:
            return can_call(value)
        if isinstance(call.func, ast.Name):
            return not hasattr(builtins, call.func.id)
        named = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        return named not in _QUIET and named not in MAKERS
