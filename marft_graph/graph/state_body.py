"""A function's source with the parameter that holds the state: what in it names a channel."""

from __future__ import annotations

import ast
import inspect
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from marft_graph.graph.objects import outer_names
from marft_graph.graph.syntax import Function, find

ALL = "*"
"""Stands for every channel of the state."""
_READERS = frozenset({"get", "pop", "setdefault"})
_DEPTH = 4


@dataclass(frozen=True)
class StateBody:
    """A function's syntax tree, and the parameter that holds the state."""

    tree: Function
    state: str
    """Name of the parameter."""
    names: Callable[[str], Any]
    """What names stand for outside the function."""
    texts: Mapping[str, str]
    """Texts that are defaults of parameters, by name."""
    depth: int
    """How many functions deep it is still followed."""

    @property
    def body(self) -> list[ast.AST]:
        """Statements, or the one expression of a lambda."""
        return [self.tree.body] if isinstance(self.tree, ast.Lambda) else [*self.tree.body]

    def key(self, node: ast.AST) -> str | None:
        """The channel that an expression names: `state["x"]`, `state.x` or `state.get("x")`."""
        if isinstance(node, ast.Subscript) and self.is_state(node.value):
            return self._text(node.slice)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if self.is_state(node.func.value) and node.func.attr in _READERS and node.args:
                return self._text(node.args[0])
            return None
        if isinstance(node, ast.Attribute) and self.is_state(node.value):
            return f".{node.attr}" if not hasattr(dict, node.attr) else None
        return None

    def _text(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.Name):
            value = self.texts.get(node.id, self.names(node.id))
            return value if isinstance(value, str) and not self.stores(node.id) else None
        return None

    def stores(self, name: str) -> bool:
        """Whether the function assigns a local name."""
        return any(
            isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
            for part in self.body
            for node in ast.walk(part)
        )

    def is_state(self, node: Any) -> bool:
        """Whether an expression is the whole state."""
        return isinstance(node, ast.Name) and node.id == self.state and _loads(node)

    @staticmethod
    def is_read(node: ast.AST) -> bool:
        """Whether an expression that names a channel reads it, and does not assign it."""
        return isinstance(node, ast.Call) or _loads(node)

    def value_of(self, node: ast.AST) -> Any:
        """What a name, or an attribute of a module, a class or a logger, stands for."""
        if isinstance(node, ast.Name):
            return self.names(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.value_of(node.value)
            if isinstance(owner, types.ModuleType):
                return getattr(owner, node.attr, None)
            if isinstance(owner, type):
                member = inspect.getattr_static(owner, node.attr, None)
                return getattr(member, "__func__", member)
            if isinstance(owner, logging.Logger):
                return print
        return None

    def handed_to(self, call: ast.Call, function: types.FunctionType) -> list[StateBody | None]:
        """The called function, once for each of its parameters that gets the whole state."""
        places: list[int] = [i for i, value in enumerate(call.args) if self.is_state(value)]
        code = function.__code__
        names = code.co_varnames[: code.co_argcount]
        for word in call.keywords:
            if self.is_state(word.value):
                places.append(names.index(word.arg) if word.arg in names else len(names))
        if any(isinstance(value, ast.Starred) for value in call.args):
            return [None]
        return [body_of(function, place, self.depth - 1) for place in places]


def body_of(function: types.FunctionType, place: int, depth: int = _DEPTH) -> StateBody | None:
    """The source of a function whose parameter at `place` gets the state; None if not known."""
    tree = find(function.__code__)
    if tree is None or depth < 0:
        return None
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    if place >= len(arguments):
        return None
    names, defaults = outer_names(function), function.__defaults__ or ()
    first = len(arguments) - len(defaults)
    texts = {
        argument.arg: value
        for argument, value in zip(arguments[first:], defaults, strict=True)
        if isinstance(value, str)
    }
    texts |= {k: v for k, v in (function.__kwdefaults__ or {}).items() if isinstance(v, str)}
    return StateBody(tree, arguments[place].arg, names, texts, depth)


def _loads(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Load)
