"""What a node's source says of its state: which channels it reads, and what it passes on as it is.

Reads syntax trees and runs nothing. What is said to be read on every way is certain, and so is it
that nothing else is read; whatever is not plain in the source is left open.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableParallel, RunnableSequence
from langchain_core.runnables.config import run_in_executor
from langgraph.pregel import Pregel

from marft_graph.graph.certain_reads import must_read
from marft_graph.graph.channels import input_channels
from marft_graph.graph.passed_on import HARMLESS, PassedOn
from marft_graph.graph.state_body import ALL, StateBody, body_of

__all__ = ["ALL", "StateUse", "state_use"]

_REVEALING = frozenset({"locals", "vars", "eval", "exec", "dir"})
_ASKING = frozenset(
    {"invoke", "ainvoke", "stream", "astream", "batch", "abatch", "transform", "atransform"}
)


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
        made = frozenset(name for name, held in (self.carries or {}).items() if not held)
        return made - self.constants

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
        needed = frozenset(bound.input_variables)
        return StateUse(needed | frozenset(bound.optional_variables), needed)
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
    body = body_of(function, place)
    if body is None:
        return StateUse()
    passed_on = PassedOn(body)
    return StateUse(may_read(body), must_read(body), passed_on.carries(), passed_on.constants())


class _Open(Exception):
    """The state is used in a way that is not plain."""


def may_read(body: StateBody) -> frozenset[str] | None:
    """Channels that a function can read; None where it may be any."""
    possible = _PossibleReads(body)
    try:
        return frozenset(key for node in body.body for key in possible.reads(node))
    except _Open:
        return None


class _PossibleReads:
    """Every place of a function that may read a channel."""

    def __init__(self, body: StateBody) -> None:
        self._body = body

    def reads(self, node: ast.AST) -> Iterator[str]:
        key = self._body.key(node)
        if key is not None:
            yield from (key,) if self._body.is_read(node) else ()
            yield from self._inside([*getattr(node, "args", ())[1:]])
        elif isinstance(node, ast.Name) and node.id == self._body.state:
            raise _Open
        elif isinstance(node, ast.Call):
            yield from self._call_reads(node)
        elif isinstance(node, ast.AugAssign) and self._body.key(node.target) is not None:
            yield str(self._body.key(node.target))
            yield from self.reads(node.value)
        elif isinstance(node, ast.Compare) and all(
            isinstance(op, ast.In | ast.NotIn) for op in node.ops
        ):
            yield from self._inside(
                n for n in (node.left, *node.comparators) if not self._body.is_state(n)
            )
        elif isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            yield from self._inside(d for d in (*arguments.defaults, *arguments.kw_defaults) if d)
            if not any(argument.arg == self._body.state for argument in named):
                body = [node.body] if isinstance(node, ast.Lambda) else node.body
                yield from self._inside(body)
        else:
            yield from self._inside(ast.iter_child_nodes(node))

    def _inside(self, nodes: Iterable[ast.AST]) -> Iterator[str]:
        for node in nodes:
            yield from self.reads(node)

    def _call_reads(self, call: ast.Call) -> Iterator[str]:
        values = [*call.args, *(word.value for word in call.keywords)]
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name in _REVEALING:
            raise _Open
        whole = [value for value in values if self._body.is_state(value)]
        if whole and name not in HARMLESS:
            known = self._handed_on(call)
            if known is None or None in known:
                raise _Open
            for reads in known:
                yield from reads or ()
        if not self._body.is_state(getattr(call.func, "value", None)):
            yield from self.reads(call.func)
        else:  # a method of the state that is none of a dict's reading ones
            if getattr(call.func, "attr", "") != "keys":
                raise _Open
        yield from self._inside(value for value in values if not self._body.is_state(value))

    def _handed_on(self, call: ast.Call) -> list[frozenset[str] | None] | None:
        """What each of those reads that the whole state is handed to; None where not known."""
        value = self._body.value_of(call.func)
        if isinstance(value, types.FunctionType):
            return [may_read(body) if body else None for body in self._body.handed_to(call, value)]
        if isinstance(call.func, ast.Attribute) and call.func.attr in _ASKING:
            target = self._body.value_of(call.func.value)
            if isinstance(target, Pregel):
                return [input_channels(target)]
            if isinstance(target, RunnableSequence | ChatPromptTemplate | PromptTemplate):
                return [_use(target).may_read]
        return None


def _merged(
    left: Mapping[str, frozenset[str]], right: Mapping[str, frozenset[str]]
) -> dict[str, frozenset[str]]:
    nothing: frozenset[str] = frozenset()
    return {name: left.get(name, nothing) | right.get(name, nothing) for name in {*left, *right}}
