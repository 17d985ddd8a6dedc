"""What the expressions of one function stand for: objects that exist, and those that it makes.

Follows a syntax tree without regard to the order of its statements, so that a name stands for all
that is ever assigned to it. What is not known stays `DATA`; what to make of a call of that is the
search's to say.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from marft_graph.graph.syntax import REPEATING, Function, own_nodes
from marft_graph.graph.values import (
    DATA,
    PLAIN,
    Arguments,
    Closure,
    Known,
    Value,
    collection,
    parent,
)

if TYPE_CHECKING:
    from marft_graph.graph.search import Search

Thunk = Callable[[], list[Value]]
_MOST, _ROUNDS = 40, 16
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Frame:
    """One function while it is read."""

    def __init__(
        self,
        search: Search,
        tree: Function,
        outside: Callable[[str], list[Value]],
        bound: Mapping[str, list[Value]],
        file: str,
    ) -> None:
        self.search = search
        self.tree = tree
        self.file = file
        self.calls: dict[int, int] = {}
        """How often each expression may call a model, by its id; two for more than once."""
        self._outside = outside
        self._bound = dict(bound)
        self._known: dict[str, list[Value]] = {}
        self._reading: set[str] = set()
        self._repeated: set[int] = set()
        self._globals = {
            name for node in self._own() if isinstance(node, ast.Global) for name in node.names
        }
        self._assigned = self._assignments()

    @property
    def body(self) -> list[Any]:
        """Statements, or the one expression of a lambda."""
        return [self.tree.body] if isinstance(self.tree, ast.Lambda) else self.tree.body

    def run(self) -> list[Value]:
        """Read every expression once; what the function can return, or yield."""
        for node in self._own():
            if isinstance(node, REPEATING):
                self._repeated.update(id(inner) for inner in ast.walk(node))
        if isinstance(self.tree, ast.Lambda):
            return self.value(self.tree.body)
        returned: list[Value] = []
        yielded: list[Value] = []
        for statement in self._statements(self.tree.body):
            if isinstance(statement, ast.Return) and statement.value is not None:
                returned += self.value(statement.value)
            elif isinstance(statement, ast.ClassDef):
                self._run_class(statement)
            elif not isinstance(statement, _DEFINITIONS):
                self._run_statement(statement)
        for node in self._own():
            if isinstance(node, ast.Yield | ast.YieldFrom) and node.value is not None:
                values = self.value(node.value)
                yielded += values if isinstance(node, ast.Yield) else self.items(values)
        return _distinct([*returned, *([collection(yielded)] if yielded else [])])

    @property
    def total(self) -> int:
        """How often one run of the function may call a model: 0, 1, or 2 for more."""
        return min(2, sum(self.calls.values()))

    def note(self, node: ast.AST, calls: int) -> None:
        """Keep that an expression may call a model."""
        if calls:
            often = 2 if id(node) in self._repeated else calls
            self.calls[id(node)] = max(often, self.calls.get(id(node), 0))

    def name(self, name: str) -> list[Value]:
        """What a name stands for."""
        if name in self._globals:
            return self._outside(name)
        if name in self._known:
            return self._known[name]
        if name not in self._assigned and name not in self._bound:
            return self._outside(name)
        values = list(self._bound.get(name, ()))
        self._known[name] = values  # what is known so far, where a name is assigned from itself
        for _ in range(_ROUNDS):
            before = len(values)
            for thunk in self._assigned.get(name, ()):
                values[:] = _distinct([*values, *thunk()])
            if len(values) == before or len(values) == _MOST:
                break
        return values

    def value(self, node: ast.expr | None) -> list[Value]:
        """What an expression stands for; the calls in it are made."""
        if node is None or isinstance(node, ast.Constant):
            return [Known(node.value) if node is not None else PLAIN]
        if isinstance(node, ast.Name):
            return self.name(node.id)
        if isinstance(node, ast.Attribute):
            return self._each(self.value(node.value), lambda v: self._attribute(node, v))
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Await | ast.Starred | ast.NamedExpr):
            return self.value(node.value)
        if isinstance(node, ast.IfExp):
            self.value(node.test)
            return _distinct([*self.value(node.body), *self.value(node.orelse)])
        if isinstance(node, ast.BoolOp):
            return _distinct([v for part in node.values for v in self.value(part)])
        if isinstance(node, ast.BinOp):
            both = [*self.value(node.left), *self.value(node.right)]
            return _distinct(both) if isinstance(node.op, ast.BitOr | ast.Add) else [PLAIN]
        if isinstance(node, ast.Subscript):
            self.value(node.slice)
            key = node.slice.value if isinstance(node.slice, ast.Constant) else None
            return self._each(self.value(node.value), lambda v: self.search.members.item(v, key))
        if isinstance(node, ast.Lambda):
            return [Closure(node, self)]
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return [collection(v for part in node.elts for v in self._element(part))]
        if isinstance(node, ast.Dict):
            for name in node.keys:
                self.value(name)
            return [collection(v for part in node.values for v in self.value(part))]
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
            self._run_generators(node.generators)
            return [collection(self.value(node.elt))]
        if isinstance(node, ast.DictComp):
            self._run_generators(node.generators)
            self.value(node.key)
            return [collection(self.value(node.value))]
        for child in _expressions(node):
            self.value(child)
        return [DATA] if isinstance(node, ast.Yield | ast.YieldFrom) else [PLAIN]

    def items(self, values: Iterable[Value]) -> list[Value]:
        """What iterating over values yields."""
        return self._each(list(values), lambda value: self.search.members.item(value, None))

    def _element(self, node: ast.expr) -> list[Value]:
        values = self.value(node)
        return self.items(values) if isinstance(node, ast.Starred) else values

    def _each(self, values: list[Value], make: Callable[[Value], Iterable[Value]]) -> list[Value]:
        return _distinct([found for value in values for found in make(value)])

    def _attribute(self, node: ast.Attribute, value: Value) -> list[Value]:
        values, calls = self.search.members.attribute(value, node.attr)
        self.note(node, calls)
        return values

    def _call(self, node: ast.Call) -> list[Value]:
        places = [self._element(argument) for argument in node.args]
        words = {word.arg or "": self.value(word.value) for word in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            return parent(self._outside("__class__"), self._first_parameter())
        if isinstance(node.func, ast.Name) and node.func.id == "globals":
            return self._outside("__globals__")
        file = self.file.rpartition("/")[2]
        place = f"{ast.unparse(node.func)} ({file}, line {node.lineno})"
        results: list[Value] = []
        total = 0
        for callee in self.value(node.func):
            values, calls = self.search.calls.call(callee, Arguments(places, words), place)
            results += values
            total = max(total, calls)
        self.note(node, total)
        return _distinct(results)

    def _first_parameter(self) -> list[Value]:
        names = [a.arg for a in (*self.tree.args.posonlyargs, *self.tree.args.args)]
        return self.name(names[0]) if names else []

    def _run_generators(self, generators: list[ast.comprehension]) -> None:
        for generator in generators:
            self.value(generator.iter)
            for test in generator.ifs:
                self.value(test)

    def _run_statement(self, statement: ast.stmt) -> None:
        for child in _expressions(statement):
            self.value(child)
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            return
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            values = self.value(statement.value)
            if isinstance(target, ast.Attribute):
                for owner in self.value(target.value):
                    self.search.members.store(owner, target.attr, values)
            elif isinstance(target, ast.Name) and target.id in self._globals:
                for owner in self._outside("__globals__"):
                    self.search.members.store(owner, target.id, values)
            elif isinstance(target, ast.Subscript):
                for value in values:
                    self.note(target, self.search.use(value))

    def _run_class(self, statement: ast.ClassDef) -> None:
        """A class that is defined in the code: as if all its methods were called."""
        for inner in statement.body:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                self.note(inner, self.search.use(Closure(inner, self)))
            elif not isinstance(inner, ast.ClassDef):
                self._run_statement(inner)

    def _statements(self, body: list[ast.stmt]) -> Iterator[ast.stmt]:
        """Statements of the function, those inside others after them."""
        for statement in body:
            yield statement
            if isinstance(statement, _DEFINITIONS):
                continue
            for inner in ast.iter_child_nodes(statement):
                if isinstance(inner, ast.stmt):
                    yield from self._statements([inner])
                elif isinstance(inner, ast.ExceptHandler | ast.match_case):
                    yield from self._statements(inner.body)

    def _own(self) -> Iterator[ast.AST]:
        return own_nodes(self.body)

    def _assignments(self) -> dict[str, list[Thunk]]:
        """For every local name what it is made of."""
        assigned: dict[str, list[Thunk]] = {}
        for statement in self._statements(self.body) if self.body else ():
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                closure = Closure(statement, self)
                assigned.setdefault(statement.name, []).append(self._decorated(statement, closure))
            elif isinstance(statement, ast.ClassDef):
                assigned.setdefault(statement.name, []).append(lambda: [PLAIN])
        for node in self._own():
            for target, thunk in self._bindings(node):
                for name, part in _names(target, thunk, self.items):
                    assigned.setdefault(name, []).append(part)
        return assigned

    def _decorated(
        self, statement: ast.FunctionDef | ast.AsyncFunctionDef, closure: Closure
    ) -> Thunk:
        def thunk() -> list[Value]:
            values: list[Value] = [closure]
            for decorator in reversed(statement.decorator_list):
                results: list[Value] = []
                for callee in self.value(decorator):
                    made, calls = self.search.calls.call(
                        callee, Arguments([values]), statement.name
                    )
                    self.note(decorator, calls)
                    results += made
                values = _distinct([*values, *results])
            return values

        return thunk

    def _bindings(self, node: ast.AST) -> Iterator[tuple[ast.expr | str, Thunk]]:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield target, lambda: self.value(node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr | ast.AugAssign):
            if node.value is not None:
                yield node.target, lambda: self.value(node.value)
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            yield node.target, lambda: self.items(self.value(node.iter))
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            context = node.context_expr
            yield node.optional_vars, lambda: self.search.members.entered(self.value(context))
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            if node.name:
                yield node.name, lambda: [DATA]
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest, lambda: [DATA]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or name, _module(name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, self._imported(node, alias.name)

    def _imported(self, node: ast.ImportFrom, name: str) -> Thunk:
        def thunk() -> list[Value]:
            module = node.module or ""
            if node.level:
                around = [v.value for v in self._outside("__package__") if isinstance(v, Known)]
                parts = str(around[0] if around else "").split(".")
                parts = parts[: len(parts) - node.level + 1]
                module = ".".join([*parts, *([module] if module else [])])
            return self.search.members.imported(module, name)

        return thunk


def _module(name: str) -> Thunk:
    return lambda: [Known(sys.modules[name])] if name in sys.modules else [DATA]


def _names(
    target: ast.expr | str, thunk: Thunk, items: Callable[[list[Value]], list[Value]]
) -> Iterator[tuple[str, Thunk]]:
    """Names that a target of an assignment binds, each with what it may stand for."""
    if isinstance(target, str):
        yield target, thunk
    elif isinstance(target, ast.Name):
        yield target.id, thunk
    elif isinstance(target, ast.Starred):
        yield from _names(target.value, thunk, items)
    elif isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from _names(part, lambda: items(thunk()), items)


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions directly in a node, without those of statements inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            if not isinstance(getattr(child, "ctx", None), ast.Store | ast.Del):
                yield child
        elif not isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _expressions(child)


def _distinct(values: Iterable[Value]) -> list[Value]:
    return list(dict.fromkeys(values))[:_MOST]


def parameters(
    tree: Function,
    places: list[list[Value]],
    words: Mapping[str, list[Value]],
    defaults: Callable[[ast.expr], list[Value]],
) -> dict[str, list[Value]]:
    """What a call gives each parameter; DATA where that is not known."""
    names = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)]
    only = [a.arg for a in tree.args.kwonlyargs]
    bound: dict[str, list[Value]] = dict(zip(names, places, strict=False))
    bound |= {name: values for name, values in words.items() if name in (*names, *only)}
    rest = [v for values in places[len(names) :] for v in values]
    others = [v for name, values in words.items() if name not in bound for v in values]
    if tree.args.vararg is not None:
        bound[tree.args.vararg.arg] = [collection(rest)]
    if tree.args.kwarg is not None:
        bound[tree.args.kwarg.arg] = [collection(others)]
    after = zip(names[::-1], tree.args.defaults[::-1], strict=False)
    keywords = zip(only, tree.args.kw_defaults, strict=True)
    for name, default in (*after, *keywords):
        if default is not None and name not in bound:
            bound[name] = [*defaults(default), DATA]
    unknown: list[Value] = [DATA]
    return {
        name: bound.get(name, [PLAIN] if name == "writer" else unknown)
        for name in (*names, *only, *bound)
    }
