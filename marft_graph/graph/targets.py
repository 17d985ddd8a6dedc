"""Which nodes a function's returned values lead to: by name, `Send` or `Command`.

A list counts with all that is ever added to it; whatever else may change a value leaves it open.
"""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from marft_graph.graph.syntax import Function, called, own_nodes

Names = frozenset[str]
_NOTHING: Names = frozenset()
_ADDING = ("append", "extend", "insert")
_TESTS = (ast.Return, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.If, ast.IfExp, ast.While)
_READING = (*_TESTS, ast.Starred, ast.For, ast.AsyncFor, ast.comprehension, ast.FormattedValue)


class Targets:
    """Nodes that the values of one function lead to."""

    def __init__(self, tree: Function, names: Callable[[str], Any]) -> None:
        self._tree = tree
        self._names = names
        self._assigned = plain_locals(tree)
        self._lists = _lists(tree)
        self._bound = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }

    def of(self, value: ast.expr | None) -> Names | None:
        """Nodes that a value may lead to; None where it may be any."""
        if value is None or isinstance(value, ast.Dict):
            return _NOTHING
        if isinstance(value, ast.Constant):
            return _NOTHING if value.value is None else _text(value.value)
        if isinstance(value, ast.Name):
            return self._of_name(value.id)
        if isinstance(value, ast.Attribute):
            return _text(self._constant(value))
        if isinstance(value, ast.List | ast.Tuple | ast.Set):
            return _union(self.of(item) for item in value.elts)
        if isinstance(value, ast.Starred):
            return self.of(value.value)
        if isinstance(value, ast.ListComp | ast.GeneratorExp):
            return self.of(value.elt)
        if isinstance(value, ast.IfExp):
            return _union(self.of(part) for part in (value.body, value.orelse))
        if isinstance(value, ast.BoolOp):
            return _union(self.of(part) for part in value.values)
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            is_text = any(isinstance(p, ast.Constant) for p in (value.left, value.right))
            return None if is_text else _union(self.of(p) for p in (value.left, value.right))
        if isinstance(value, ast.Subscript):
            return self._of_any_item(value.value)
        return self._of_call(value) if isinstance(value, ast.Call) else None

    def named(self, returned: Sequence[ast.expr | None]) -> Names:
        """Nodes that are named anywhere as a target: by a returned value, `Send` or `Command`."""
        calls = [node for node in ast.walk(self._tree) if isinstance(node, ast.Call)]
        made = [node for node in calls if called(node) in ("Send", "Command")]
        targets = [self.of(value) for value in (*returned, *made)]
        return _NOTHING.union(*(names for names in targets if names is not None))

    def sent(self) -> Names:
        """Nodes that are named in a `Send`."""
        made = [node for node in ast.walk(self._tree) if isinstance(node, ast.Call)]
        targets = [self.of(call) for call in made if called(call) == "Send"]
        return _NOTHING.union(*(names for names in targets if names is not None))

    def is_one(self, value: ast.expr | None) -> bool:
        """Whether a value leads to one node at most."""
        if value is None or isinstance(value, ast.Dict | ast.Constant):
            return True
        if isinstance(value, ast.Name):
            if value.id in self._assigned:
                return all(self.is_one(known) for known in self._assigned[value.id])
            return value.id not in self._bound and isinstance(self._names(value.id), str)
        if isinstance(value, ast.IfExp):
            return self.is_one(value.body) and self.is_one(value.orelse)
        if isinstance(value, ast.Call) and called(value) == "Command" and not value.args:
            words = {word.arg: word.value for word in value.keywords}
            return None not in words and self.is_one(words.get("goto"))
        return isinstance(value, ast.Call) and called(value) == "Send"

    def is_list(self, value: ast.expr | None) -> bool:
        """Whether a value certainly is a list, whatever the function is declared to return."""
        if isinstance(value, ast.Name):
            known = [*self._assigned.get(value.id, ()), *self._lists.get(value.id, ())]
            return value.id in self._lists or any(map(self.is_list, known))
        if isinstance(value, ast.Call):
            return called(value) in ("list", "sorted")
        return isinstance(value, ast.List | ast.Tuple | ast.ListComp)

    def may_stay(self, value: ast.expr | None) -> bool:
        """Whether a node that returns a value may go nowhere by it."""
        if value is None or isinstance(value, ast.Dict):
            return True
        if isinstance(value, ast.Constant):
            return value.value is None
        if isinstance(value, ast.Name) and value.id in self._assigned:
            return any(map(self.may_stay, self._assigned[value.id]))
        if isinstance(value, ast.IfExp):
            return self.may_stay(value.body) or self.may_stay(value.orelse)
        return self.may_be_empty(value)

    def may_be_empty(self, value: ast.expr | None) -> bool:
        """Whether a value may be a list without an item."""
        if isinstance(value, ast.List | ast.Tuple):
            items = value.elts
            return all(isinstance(i, ast.Starred) and self.may_be_empty(i.value) for i in items)
        if isinstance(value, ast.ListComp):
            return not all(_has_items(g) for g in value.generators)
        if isinstance(value, ast.Name):
            if value.id in self._lists:
                return all(self.may_be_empty(given) for given in self._starts(value.id))
            return any(map(self.may_be_empty, self._assigned.get(value.id, ())))
        if isinstance(value, ast.IfExp):
            return self.may_be_empty(value.body) or self.may_be_empty(value.orelse)
        if isinstance(value, ast.Call) and called(value) == "Command" and not value.args:
            words = {word.arg: word.value for word in value.keywords}
            return None not in words and self.may_stay(words.get("goto"))
        return False

    def _starts(self, name: str) -> list[ast.expr]:
        """What a list is at first, without what is added to it."""
        return [
            node.value
            for node in own_nodes(_body(self._tree))
            if isinstance(node, ast.Assign | ast.AnnAssign)
            and node.value is not None
            and name in _assigned_names(node)
        ]

    def _of_name(self, name: str) -> Names | None:
        if name in self._lists:
            return _union(self.of(part) for part in self._lists[name])
        if name in self._assigned:
            return _union(self.of(known) for known in self._assigned[name])
        return None if name in self._bound else _text(self._names(name))

    def _of_call(self, value: ast.Call) -> Names | None:
        words = {word.arg: word.value for word in value.keywords}
        if called(value) == "Send":
            node = value.args[0] if value.args else words.get("node")
            return None if node is None else self.of(node)
        if called(value) == "Command" and not value.args:
            if None in words or "graph" in words:
                return None
            return self.of(words["goto"]) if "goto" in words else _NOTHING
        if called(value) == "get" and isinstance(value.func, ast.Attribute) and value.args:
            return _union([self._of_any_item(value.func.value), *map(self.of, value.args[1:])])
        if called(value) in ("list", "sorted", "set") and len(value.args) == 1:
            return self.of(value.args[0])
        return None

    def _of_any_item(self, value: ast.expr) -> Names | None:
        """Nodes that an item of a dict or list leads to, whichever it is."""
        if isinstance(value, ast.Dict):
            return _union(self.of(item) for item in value.values)
        if isinstance(value, ast.List | ast.Tuple):
            return self.of(value)
        if isinstance(value, ast.Name | ast.Attribute):
            held = self._constant(value)
            if isinstance(held, Mapping):
                return _union(_text(item) for item in held.values())
            if isinstance(held, list | tuple):
                return _union(_text(item) for item in held)
        return None

    def _constant(self, value: ast.expr) -> Any:
        """What a name, or an attribute of a module or a class, stands for; None if not known."""
        if isinstance(value, ast.Name):
            return None if value.id in self._bound else self._names(value.id)
        if isinstance(value, ast.Attribute):
            owner = self._constant(value.value)
            if isinstance(owner, types.ModuleType | type):
                return vars(owner).get(value.attr)
        return None


@functools.lru_cache(maxsize=256)
def plain_locals(tree: Function, *, unchanged: bool = True) -> dict[str, list[ast.expr]]:
    """Local names that are only ever given plain values, with all of them.

    Args:
        tree: the function.
        unchanged: leave out lists and objects that something may change after they are made.
    """
    assigned: dict[str, list[ast.expr]] = {}
    stores: dict[str, int] = {}
    for node in own_nodes(_body(tree)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for name in _assigned_names(node):
                assigned.setdefault(name, []).append(node.value)
        for name in _stored(node):
            stores[name] = stores.get(name, 0) + 1
    changed = _changed_elsewhere(tree)
    mutable = {name for name in assigned if unchanged and any(map(_is_mutable, assigned[name]))}
    return {
        name: values
        for name, values in assigned.items()
        if stores[name] == len(values)
        and name not in changed
        and not (name in mutable and not _is_only_read(tree, name))
        and not any(_uses(value, assigned) for value in values)
    }


def _lists(tree: Function) -> dict[str, list[ast.expr]]:
    """Local lists that are only added to, each with all that it may hold."""
    starts: dict[str, list[ast.expr]] = {}
    added: dict[str, list[ast.expr]] = {}
    stores: dict[str, int] = {}
    for node in own_nodes(_body(tree)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for name in _assigned_names(node):
                starts.setdefault(name, []).append(node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            if isinstance(node.op, ast.Add):
                added.setdefault(node.target.id, []).append(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and node.func.attr in _ADDING and node.args:
                added.setdefault(owner.id, []).append(node.args[-1])
        for name in _stored(node):
            stores[name] = stores.get(name, 0) + 1
    changed = _changed_elsewhere(tree)
    sums = {
        name: sum(isinstance(n, ast.AugAssign) for n in _stores_of(tree, name)) for name in added
    }
    return {
        name: [*values, *added[name]]
        for name, values in starts.items()
        if name in added
        and stores[name] == len(values) + sums[name]
        and all(isinstance(value, ast.List | ast.ListComp) for value in values)
        and name not in changed
        and _is_only_read(tree, name, but=_ADDING)
    }


def _stores_of(tree: Function, name: str) -> list[ast.AST]:
    return [node for node in own_nodes(_body(tree)) if name in _target_names(node)]


def _target_names(node: ast.AST) -> list[str]:
    is_name = isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
    return [node.target.id] if is_name else []  # type: ignore[attr-defined]


def _body(tree: Function) -> list[ast.stmt]:
    return [] if isinstance(tree, ast.Lambda) else tree.body


def _assigned_names(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    if len(targets) == 1 and isinstance(targets[0], ast.Name):
        return [targets[0].id]
    return []


def _stored(node: ast.AST) -> list[str]:
    """Names that a node itself binds."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return [node.id]
    if isinstance(node, ast.MatchAs | ast.MatchStar | ast.ExceptHandler) and node.name:
        return [node.name]
    if isinstance(node, ast.MatchMapping) and node.rest:
        return [node.rest]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    return []


def _changed_elsewhere(tree: Function) -> set[str]:
    """Names that are parameters, or that a function inside this one may set."""
    arguments = tree.args
    parameters = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    changed = {argument.arg for argument in parameters}
    for node in ast.walk(tree):
        if isinstance(node, ast.Nonlocal | ast.Global):
            changed.update(node.names)
    return changed


def _is_only_read(tree: Function, name: str, but: Sequence[str] = ()) -> bool:
    """Whether nothing can change the list behind a name, but methods that are named."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    own_statements = set(own_nodes(_body(tree)))
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)):
            continue
        around = parents[node]
        if node not in own_statements:
            return False  # in a function that is defined inside
        if isinstance(around, ast.Attribute):
            is_call = isinstance(parents[around], ast.Call)
            if not (is_call and around.attr in but):
                return False
        elif isinstance(around, ast.keyword):
            if around.arg != "goto":
                return False
        elif isinstance(around, ast.Call):
            if called(around) not in ("len", "bool", "list", "sorted", "set", "any", "all"):
                return False
        elif isinstance(around, ast.BinOp):
            if not isinstance(around.op, ast.Add):
                return False
        elif not isinstance(around, _READING):
            return False
    return True


def _is_mutable(value: ast.expr) -> bool:
    kinds = (ast.List, ast.ListComp, ast.Dict, ast.DictComp, ast.Set, ast.SetComp, ast.Call)
    return any(isinstance(node, kinds) for node in ast.walk(value))


def _has_items(generator: ast.comprehension) -> bool:
    """Whether a loop of a comprehension certainly yields something."""
    source = generator.iter
    if generator.ifs:
        return False
    if isinstance(source, ast.Constant):
        return isinstance(source.value, str) and bool(source.value)
    if isinstance(source, ast.List | ast.Tuple):
        return any(not isinstance(item, ast.Starred) for item in source.elts)
    if isinstance(source, ast.Call) and called(source) == "range" and len(source.args) == 1:
        count = source.args[0]
        return isinstance(count, ast.Constant) and isinstance(count.value, int) and count.value > 0
    return False


def _uses(value: ast.expr, names: Mapping[str, Any]) -> bool:
    return any(isinstance(node, ast.Name) and node.id in names for node in ast.walk(value))


def _text(value: Any) -> Names | None:
    return frozenset({str(value)}) if isinstance(value, str) else None


def _union(sets: Iterable[Names | None]) -> Names | None:
    def both(left: Names | None, right: Names | None) -> Names | None:
        return None if left is None or right is None else left | right

    nothing: Names | None = _NOTHING
    return functools.reduce(both, sets, nothing)
