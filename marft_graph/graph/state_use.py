"""What a node's source says of its state: which channels it reads, and what it passes on as it is.

Reads syntax trees and runs nothing. What is said to be read on every way is certain, and so is it
that nothing else is read; whatever is not plain in the source is left open.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableParallel, RunnableSequence
from langchain_core.runnables.config import run_in_executor
from langgraph.pregel import Pregel

from marft_graph.graph import source
from marft_graph.graph.channels import input_channels
from marft_graph.graph.syntax import Function, called, find
from marft_graph.graph.targets import plain_locals

ALL = "*"
"""Stands for every channel of the state."""
_READERS = frozenset({"get", "pop", "setdefault"})
_HARMLESS = frozenset({"len", "isinstance", "bool", "type", "id", "callable"})
_WHOLE = frozenset({"str", "repr"})
_REVEALING = frozenset({"locals", "vars", "eval", "exec", "dir"})
_ASKING = frozenset(
    {"invoke", "ainvoke", "stream", "astream", "batch", "abatch", "transform", "atransform"}
)
_QUIET = frozenset(
    {"join", "strip", "lstrip", "rstrip", "split", "splitlines", "format", "lower", "upper"}
    | {"replace", "startswith", "endswith", "append", "extend", "insert", "get", "pop", "items"}
    | {"values", "keys", "update", "copy", "setdefault", "dumps", "loads", "title", "count"}
)
_DEPTH = 4


@dataclasses.dataclass(frozen=True, slots=True)
class StateUse:
    """What a node, or a branch, does with its state, as far as its source is plain."""

    may_read: frozenset[str] | None = None
    """Channels that it can read at most; None: any."""
    must_read: frozenset[str] = frozenset()
    """Channels that every run has read before it first calls a model; `ALL`: all it is given."""
    carries: Mapping[str, frozenset[str]] | None = None
    """What each written channel can hold of the channels read, other than what a model made of it;
    None: not known."""
    constants: frozenset[str] = frozenset()
    """Channels that it may write as its source has them, whatever a model says."""

    @property
    def made(self) -> frozenset[str]:
        """Channels whose written value is always the node's own making."""
        own = frozenset(name for name, held in (self.carries or {}).items() if not held)
        return own - self.constants

    def __or__(self, other: StateUse) -> StateUse:
        """What holds for either of two functions."""
        known = self.may_read is not None and other.may_read is not None
        carries = None
        if self.carries is not None and other.carries is not None:
            carries = _merged(self.carries, other.carries)
        return StateUse(
            (self.may_read or frozenset()) | (other.may_read or frozenset()) if known else None,
            self.must_read & other.must_read,
            carries,
            self.constants | other.constants,
        )


def state_use(bound: Any, fields: frozenset[str] = frozenset()) -> StateUse:
    """Read what runs as a node or a branch; everything open where it has no plain source.

    Args:
        bound: a function, or a Runnable such as `app.nodes[name].bound`.
        fields: what the state has; another attribute of it is a method that may read anything.
    """
    use = _use(bound)
    must = frozenset(name.lstrip(".") for name in use.must_read) & {*fields, ALL}
    may = use.may_read
    if may is not None:
        attributes = {name[1:] for name in may if name.startswith(".")}
        may = frozenset(n.lstrip(".") for n in may) if attributes <= fields else None
    return dataclasses.replace(use, may_read=may, must_read=must)


def _use(bound: Any) -> StateUse:
    if isinstance(bound, RunnableSequence):
        return dataclasses.replace(_use(bound.first), carries=None)
    if type(bound) is RunnableParallel:
        uses = [_use(step) for step in bound.steps__.values()]
        reads = [use.may_read for use in uses]
        known = frozenset().union(*(r or () for r in reads)) if None not in reads else None
        return StateUse(known, frozenset().union(*(use.must_read for use in uses)))
    if type(bound) in (ChatPromptTemplate, PromptTemplate):
        asked = frozenset(bound.input_variables)
        return StateUse(asked | frozenset(bound.optional_variables), asked)
    places = list(_places(bound))
    uses = [_read(*place) for place in places]
    return functools.reduce(StateUse.__or__, uses) if uses else StateUse()


def _places(bound: Any) -> Iterator[tuple[types.FunctionType, int]]:
    """The functions that a node may run, and which of their parameters gets the state."""
    if isinstance(bound, functools.partial):
        if bound.func is not run_in_executor:
            for function, place in _places(bound.func):
                yield function, place + len(bound.args)
    elif isinstance(bound, types.MethodType):
        for function, place in _places(bound.__func__):
            yield function, place + 1
    elif isinstance(bound, types.FunctionType):
        yield bound, 0
    elif getattr(bound, "func", None) is not None or getattr(bound, "afunc", None) is not None:
        for name in ("func", "afunc"):
            yield from _places(getattr(bound, name, None))
    elif bound is not None and not isinstance(bound, Pregel | type):
        call = inspect.getattr_static(type(bound), "__call__", None)
        if isinstance(call, types.FunctionType):
            yield call, 1


def _read(function: types.FunctionType, place: int) -> StateUse:
    if function.__module__ == "langchain.agents.factory" and "model_node" in function.__name__:
        return StateUse(must_read=frozenset({"messages"}))
    body = _body(function, place)
    if body is None:
        return StateUse()
    return StateUse(body.may_read(), body.must_read(), body.carries(), body.constants())


def _body(function: types.FunctionType, place: int, depth: int = _DEPTH) -> _Body | None:
    tree = find(function.__code__)
    if tree is None or depth < 0:
        return None
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    if place >= len(arguments):
        return None
    names, defaults = source._names(function), function.__defaults__ or ()
    first = len(arguments) - len(defaults)
    texts = {
        argument.arg: value
        for argument, value in zip(arguments[first:], defaults, strict=True)
        if isinstance(value, str)
    }
    texts |= {k: v for k, v in (function.__kwdefaults__ or {}).items() if isinstance(v, str)}
    return _Body(tree, arguments[place].arg, names, texts, depth)


class _Open(Exception):
    """The state is used in a way that is not plain."""


class _Asked(Exception):
    """From here on a model may have been called."""


class _Left(Exception):
    """The function has been left."""


class _Body:
    """A function's syntax tree, and the parameter that holds the state."""

    def __init__(
        self,
        tree: Function,
        state: str,
        names: Callable[[str], Any],
        texts: Mapping[str, str],
        depth: int,
    ) -> None:
        self._tree = tree
        self._state = state
        self._names = names
        self._texts = texts
        self._depth = depth
        self._body: list[ast.AST] = [tree.body] if isinstance(tree, ast.Lambda) else [*tree.body]

    # Which channels can be read

    def may_read(self) -> frozenset[str] | None:
        """Channels that the function can read; None where it may be any."""
        try:
            return frozenset(key for node in self._body for key in self._reads(node))
        except _Open:
            return None

    def _reads(self, node: ast.AST) -> Iterator[str]:
        key = self._key(node)
        if key is not None:
            yield from (key,) if self._is_read(node) else ()
            yield from self._inside([*getattr(node, "args", ())[1:]])
        elif isinstance(node, ast.Name) and node.id == self._state:
            raise _Open
        elif isinstance(node, ast.Call):
            yield from self._call_reads(node)
        elif isinstance(node, ast.AugAssign) and self._key(node.target) is not None:
            yield str(self._key(node.target))
            yield from self._reads(node.value)
        elif isinstance(node, ast.Compare) and all(
            isinstance(op, ast.In | ast.NotIn) for op in node.ops
        ):
            yield from self._inside(n for n in (node.left, *node.comparators) if not self._is(n))
        elif isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            yield from self._inside(d for d in (*arguments.defaults, *arguments.kw_defaults) if d)
            if not any(argument.arg == self._state for argument in named):
                body = [node.body] if isinstance(node, ast.Lambda) else node.body
                yield from self._inside(body)
        else:
            yield from self._inside(ast.iter_child_nodes(node))

    def _inside(self, nodes: Iterable[ast.AST]) -> Iterator[str]:
        for node in nodes:
            yield from self._reads(node)

    def _call_reads(self, call: ast.Call) -> Iterator[str]:
        given = [*call.args, *(word.value for word in call.keywords)]
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name in _REVEALING:
            raise _Open
        whole = [value for value in given if self._is(value)]
        if whole and name not in _HARMLESS:
            known = self._handed_to(call)
            if known is None or None in known:
                raise _Open
            for reads in known:
                yield from reads or ()
        if not self._is(getattr(call.func, "value", None)):
            yield from self._reads(call.func)
        else:  # a method of the state that is none of a dict's reading ones
            if getattr(call.func, "attr", "") != "keys":
                raise _Open
        yield from self._inside(value for value in given if not self._is(value))

    def _handed_to(self, call: ast.Call) -> list[frozenset[str] | None] | None:
        """What each of those reads that the whole state is handed to; None where not known."""
        value = self._value(call.func)
        if isinstance(value, types.FunctionType):
            return [body.may_read() if body else None for body in self._bodies(call, value)]
        if isinstance(call.func, ast.Attribute) and call.func.attr in _ASKING:
            target = self._value(call.func.value)
            if isinstance(target, Pregel):
                return [input_channels(target)]
            if isinstance(target, RunnableSequence | ChatPromptTemplate | PromptTemplate):
                return [_use(target).may_read]
        return None

    def _bodies(self, call: ast.Call, function: types.FunctionType) -> list[_Body | None]:
        """The called function, once for each of its parameters that gets the whole state."""
        places: list[int] = [i for i, value in enumerate(call.args) if self._is(value)]
        code = function.__code__
        names = code.co_varnames[: code.co_argcount]
        for word in call.keywords:
            if self._is(word.value):
                places.append(names.index(word.arg) if word.arg in names else len(names))
        if any(isinstance(value, ast.Starred) for value in call.args):
            return [None]
        return [_body(function, place, self._depth - 1) for place in places]

    def _key(self, node: ast.AST) -> str | None:
        """The channel that an expression names: `state["x"]`, `state.x` or `state.get("x")`."""
        if isinstance(node, ast.Subscript) and self._is(node.value):
            return self._text(node.slice)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if self._is(node.func.value) and node.func.attr in _READERS and node.args:
                return self._text(node.args[0])
            return None
        if isinstance(node, ast.Attribute) and self._is(node.value):
            return f".{node.attr}" if not hasattr(dict, node.attr) else None
        return None

    def _text(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.Name):
            value = self._texts.get(node.id, self._names(node.id))
            return value if isinstance(value, str) and not self._stores(node.id) else None
        return None

    def _stores(self, name: str) -> bool:
        return any(
            isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
            for part in self._body
            for node in ast.walk(part)
        )

    def _is(self, node: Any) -> bool:
        return isinstance(node, ast.Name) and node.id == self._state and _loads(node)

    @staticmethod
    def _is_read(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) or _loads(node)

    def _value(self, node: ast.AST) -> Any:
        """What a name, or an attribute of a module, a class or a logger, stands for."""
        if isinstance(node, ast.Name):
            return self._names(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._value(node.value)
            if isinstance(owner, types.ModuleType):
                return getattr(owner, node.attr, None)
            if isinstance(owner, type):
                found = inspect.getattr_static(owner, node.attr, None)
                return getattr(found, "__func__", found)
            if isinstance(owner, logging.Logger):
                return print
        return None

    # Which channels are read before a model is called

    def must_read(self) -> frozenset[str]:
        """Channels that every run has read when it first calls a model."""
        found: set[str] = set()
        if self._stores(self._state):
            return frozenset()
        try:
            if isinstance(self._tree, ast.Lambda):
                self._evaluate(self._tree.body, found)
            else:
                self._run(self._tree.body, found)
        except (_Asked, _Left):
            pass
        return frozenset(found)

    def _run(self, body: Sequence[ast.stmt], found: set[str]) -> None:
        for place, statement in enumerate(body):
            self._step(statement, body[place + 1 :], found)

    def _step(self, statement: ast.stmt, rest: Sequence[ast.stmt], found: set[str]) -> None:
        if isinstance(statement, ast.If):
            self._evaluate(statement.test, found)
            self._either(
                lambda into: self._run(statement.body, into),
                lambda into: self._run(statement.orelse, into),
                found,
            )
        elif isinstance(statement, ast.Try):
            others = [*statement.handlers, *statement.orelse, *statement.finalbody, *rest]
            if not any(self._calls_model(node) for node in others):
                self._run(statement.body, found)  # whatever is asked is asked in here, in order
            self._stop_if_asking(statement)
        elif isinstance(statement, ast.With | ast.AsyncWith):
            for item in statement.items:
                self._evaluate(item.context_expr, found)
            self._run(statement.body, found)
        elif isinstance(statement, ast.For | ast.AsyncFor):
            self._evaluate(statement.iter, found)
            self._stop_if_asking(*statement.body, *statement.orelse)
        elif isinstance(statement, ast.While):
            self._evaluate(statement.test, found)
            self._stop_if_asking(*statement.body, *statement.orelse)
        elif isinstance(statement, ast.Match):
            self._evaluate(statement.subject, found)
            self._stop_if_asking(*statement.cases)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return
        else:
            if isinstance(statement, ast.AugAssign):
                key = self._key(statement.target)
                found.update((key,) if key else ())
            for child in ast.iter_child_nodes(statement):
                if isinstance(child, ast.expr):
                    self._evaluate(child, found)
            if isinstance(statement, ast.Return | ast.Raise):
                raise _Left

    def _either(
        self, left: Callable[[set[str]], None], right: Callable[[set[str]], None], found: set[str]
    ) -> None:
        """Of two ways what both read; of a way that leaves the function nothing has to follow."""
        read: list[set[str]] = []
        has_asked = False
        for way in (left, right):
            into: set[str] = set()
            try:
                way(into)
            except _Left:
                continue
            except _Asked:
                has_asked = True
            read.append(into)
        if not read:
            raise _Left
        found |= set.intersection(*read)
        if has_asked:
            raise _Asked

    def _evaluate(self, node: ast.AST, found: set[str]) -> None:
        """What evaluating an expression reads, in order."""
        key = self._key(node)
        if key is not None and self._is_read(node):
            found.add(key)
            for value in getattr(node, "args", ())[1:]:
                self._evaluate(value, found)
        elif isinstance(node, ast.Lambda):
            return
        elif isinstance(node, ast.IfExp):
            self._evaluate(node.test, found)
            self._either(
                lambda into: self._evaluate(node.body, into),
                lambda into: self._evaluate(node.orelse, into),
                found,
            )
        elif isinstance(node, ast.BoolOp):
            self._evaluate(node.values[0], found)
            self._stop_if_asking(*node.values[1:])
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            self._evaluate(node.generators[0].iter, found)
            self._stop_if_asking(node)
        elif isinstance(node, ast.FormattedValue) and self._is(node.value):
            found.add(ALL)
        else:
            for child in ast.iter_child_nodes(node):
                self._evaluate(child, found)
            if isinstance(node, ast.Call):
                self._call(node, found)

    def _call(self, call: ast.Call, found: set[str]) -> None:
        """What a call reads, after its arguments have been evaluated."""
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name in _WHOLE and any(self._is(value) for value in call.args):
            found.add(ALL)
        value = self._value(call.func)
        if isinstance(value, types.FunctionType):
            for body in self._bodies(call, value):
                found |= body.must_read() if body else frozenset()
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
        if self._key(call) is not None:
            return False
        value = self._value(call.func)
        if value is not None:
            return source._can_call(value)
        if isinstance(call.func, ast.Name):
            return not hasattr(builtins, call.func.id)
        named = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        return named not in _QUIET and named not in source._MAKERS

    # What is passed on as it is

    def carries(self) -> Mapping[str, frozenset[str]] | None:
        """For each channel that is written, the channels that its value can be made of."""
        held = self._held()
        found: dict[str, frozenset[str]] = {}
        for value in source._returned(self._tree):
            update = _update(value)
            if update is None:
                return None
            for key, written in update.items():
                found[key] = found.get(key, frozenset()) | self._made_of(written, held)
        return found

    def constants(self) -> frozenset[str]:
        """Channels that are written with texts of the source somewhere."""
        updates = [_update(value) or {} for value in source._returned(self._tree)]
        return frozenset(k for u in updates for k, v in u.items() if isinstance(v, ast.Constant))

    def _held(self) -> dict[str, frozenset[str]]:
        """For each local name the channels that its value can be made of."""
        held: dict[str, frozenset[str]] = {self._state: frozenset({ALL})}
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
        for part in self._body:
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
                    given = [*node.args, *(word.value for word in node.keywords)]
                    yield from ((name, given) for name in _named(node.func.value))

    def _made_of(self, node: ast.AST, held: Mapping[str, frozenset[str]]) -> frozenset[str]:
        key = self._key(node)
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
        if isinstance(call.func, ast.Name) and call.func.id in _HARMLESS:
            return frozenset()
        asked = call.func.value if isinstance(call.func, ast.Attribute) else None
        if asked is not None and source._is_model(asked, self._names, self._plain()):
            return frozenset()  # what the model made of it
        value = self._value(call.func)
        if isinstance(value, types.FunctionType) and self._answers_only(call, value):
            return frozenset()
        parts = (self._made_of(child, held) for child in ast.iter_child_nodes(call))
        return frozenset().union(*parts)

    def _answers_only(self, call: ast.Call, function: types.FunctionType) -> bool:
        """Whether a function gives back nothing of its arguments but what a model made of them."""
        count = len(call.args) + len(call.keywords)
        bodies = [_body(function, place, self._depth - 1) for place in range(count)]
        if not source._can_call(function) or any(body is None for body in bodies):
            return False
        return not any(body._gives_back() for body in bodies if body is not None)

    def _gives_back(self) -> bool:
        held = self._held()
        returned = source._returned(self._tree)
        return any(value is not None and self._made_of(value, held) for value in returned)

    def _plain(self) -> dict[str, ast.expr]:
        return {
            n: v[0] for n, v in plain_locals(self._tree, unchanged=False).items() if len(v) == 1
        }


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


def _loads(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Load)


def _merged(
    left: Mapping[str, frozenset[str]], right: Mapping[str, frozenset[str]]
) -> dict[str, frozenset[str]]:
    nothing: frozenset[str] = frozenset()
    return {name: left.get(name, nothing) | right.get(name, nothing) for name in {*left, *right}}
