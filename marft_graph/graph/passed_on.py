"""What a function writes of its state as it is, beside what a model made of it."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator, Mapping

from marft_graph.graph.model_calls import assigned_once, can_call, is_model
from marft_graph.graph.state_body import ALL, StateBody, body_of
from marft_graph.graph.syntax import called, returned_values

HARMLESS = frozenset({"len", "isinstance", "bool", "type", "id", "callable"})
"""Functions that pass on nothing of what they are handed."""


class PassedOn:
    """Which channels' content the values can be made of that a function returns."""

    def __init__(self, body: StateBody) -> None:
        self._body = body

    def carries(self) -> Mapping[str, frozenset[str]] | None:
        """For each channel that is written, the channels that its value can be made of."""
        held = self._held()
        carried: dict[str, frozenset[str]] = {}
        for value in returned_values(self._body.tree):
            update = _update(value)
            if update is None:
                return None
            for key, written in update.items():
                carried[key] = carried.get(key, frozenset()) | self._made_of(written, held)
        return carried

    def constants(self) -> frozenset[str]:
        """Channels that are written with texts of the source somewhere."""
        updates = [_update(value) or {} for value in returned_values(self._body.tree)]
        return frozenset(k for u in updates for k, v in u.items() if isinstance(v, ast.Constant))

    def _held(self) -> dict[str, frozenset[str]]:
        """For each local name the channels that its value can be made of."""
        held: dict[str, frozenset[str]] = {self._body.state: frozenset({ALL})}
        changed = True
        while changed:
            changed = False
            for name, values in self._assignments():
                made_of = frozenset[str]().union(*(self._made_of(v, held) for v in values))
                if not made_of <= held.get(name, frozenset()):
                    held[name] = held.get(name, frozenset()) | made_of
                    changed = True
        return held

    def _assignments(self) -> Iterator[tuple[str, list[ast.expr]]]:
        """Names with what they are given, or what is put into them."""
        for part in self._body.body:
            for node in ast.walk(part):
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        yield from ((name, [node.value]) for name in _named(target))
                elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
                    if node.value is not None:
                        yield from ((name, [node.value]) for name in _named(node.target))
                elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
                    yield from ((name, [node.iter]) for name in _named(node.target))
                elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                    yield from ((n, [node.context_expr]) for n in _named(node.optional_vars))
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    values = [*node.args, *(word.value for word in node.keywords)]
                    yield from ((name, values) for name in _named(node.func.value))

    def _made_of(self, node: ast.AST, held: Mapping[str, frozenset[str]]) -> frozenset[str]:
        key = self._body.key(node)
        if key is not None:
            return frozenset({key.lstrip(".")})
        if isinstance(node, ast.Name):
            return held.get(node.id, frozenset())
        if isinstance(node, ast.Compare):
            return frozenset()
        if isinstance(node, ast.Call):
            return self._call_made_of(node, held)
        parts = (self._made_of(child, held) for child in ast.iter_child_nodes(node))
        return frozenset().union(*parts)

    def _call_made_of(self, call: ast.Call, held: Mapping[str, frozenset[str]]) -> frozenset[str]:
        if isinstance(call.func, ast.Name) and call.func.id in HARMLESS:
            return frozenset()
        asked = call.func.value if isinstance(call.func, ast.Attribute) else None
        if asked is not None and is_model(asked, self._body.names, assigned_once(self._body.tree)):
            return frozenset()  # what the model made of it
        value = self._body.value_of(call.func)
        if isinstance(value, types.FunctionType) and self._answers_only(call, value):
            return frozenset()
        parts = (self._made_of(child, held) for child in ast.iter_child_nodes(call))
        return frozenset().union(*parts)

    def _answers_only(self, call: ast.Call, function: types.FunctionType) -> bool:
        """Whether a function gives back nothing of its arguments but what a model made of them."""
        count = len(call.args) + len(call.keywords)
        bodies = [body_of(function, place, self._body.depth - 1) for place in range(count)]
        if not can_call(function) or any(body is None for body in bodies):
            return False
        return not any(PassedOn(body)._gives_back() for body in bodies if body is not None)

    def _gives_back(self) -> bool:
        held = self._held()
        returned = returned_values(self._body.tree)
        return any(value is not None and self._made_of(value, held) for value in returned)


def _update(value: ast.expr | None) -> dict[str, ast.expr] | None:
    """What a returned value writes, by channel; None where that is not plain."""
    if value is None or (isinstance(value, ast.Constant) and value.value is None):
        return {}
    if isinstance(value, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in value.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(map(str, keys), value.values, strict=True))
    if isinstance(value, ast.Call) and not value.args:
        words = {word.arg: word.value for word in value.keywords}
        if None not in words and called(value) == "Command":
            return _update(words.get("update"))
        if None not in words and called(value) == "dict":
            return {str(word): written for word, written in words.items()}
    return None


def _named(target: ast.AST) -> Iterator[str]:
    """Names at the root of what is assigned to: of `a`, `a, b`, `a.b` and `a["b"]`."""
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Subscript | ast.Attribute | ast.Starred):
        yield from _named(target.value)
    elif isinstance(target, ast.Tuple | ast.List):
        for item in target.elts:
            yield from _named(item)
