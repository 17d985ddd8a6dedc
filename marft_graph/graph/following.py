"""Following users' functions: each once for every kind of arguments, within bounds."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from marft_graph.graph.evaluate import Frame, parameters
from marft_graph.graph.objects import cell_values, codes, defaults
from marft_graph.graph.syntax import find
from marft_graph.graph.values import DATA, Arguments, Called, Closure, Known, Value

if TYPE_CHECKING:
    from marft_graph.graph.search import Search

_FRAMES, _DEPTH, _CONTEXTS = 1500, 25, 8
"""Functions that are read at most, in all and in each other; ways of calling one of them."""
_HTTP = ("/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/api/generate")
_HOSTS = ("api.openai.com", "api.anthropic.com", "generativelanguage.googleapis.com")


class FollowedCode:
    """Reads functions and remembers what they give."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._memo: dict[Any, Called] = {}
        self._contexts: Counter[types.CodeType] = Counter()
        self._frames = 0
        self._depth = 0

    def follow(self, function: types.FunctionType, arguments: Arguments) -> Called:
        """What a function gives that exists already."""
        code = function.__code__
        key = _key(function, arguments)
        if key not in self._memo and self._contexts[code] >= _CONTEXTS:
            arguments = Arguments(arguments.places[:1])  # too many ways to tell them apart
            key = code, id(function), (), ()
        if key in self._memo:
            return self._memo[key]
        self._contexts[code] += 1
        self._memo[key] = [], 0
        if self._is_too_much():
            self._search.unresolve(f"{function.__qualname__}: more code than is looked at")
            return [DATA], 0
        self._look_at_code(function)
        self._memo[key] = result = self._read(function, arguments)
        return result

    def follow_closure(self, closure: Closure, arguments: Arguments) -> Called:
        """What a function gives that is defined inside another."""
        tree, frame = closure.tree, closure.frame
        places, words = arguments.places, arguments.words
        key = id(tree), id(frame), tuple(map(tuple, places)), tuple(words)
        if key in self._memo:
            return self._memo[key]
        self._memo[key] = [], 0
        if self._is_too_much():
            self._search.unresolve("more code than is looked at")
            return [DATA], 0
        bound = parameters(tree, places, words, frame.value)
        self._memo[key] = result = self._run(
            Frame(self._search, tree, frame.name, bound, frame.file)
        )
        return result

    def _is_too_much(self) -> bool:
        return self._frames > _FRAMES or self._depth > _DEPTH

    def _read(self, function: types.FunctionType, arguments: Arguments) -> Called:
        tree = find(function.__code__)
        outside = self._outside(function)
        if tree is None:
            return self._without_source(function, outside)
        bound = parameters(tree, arguments.places, arguments.words, lambda _: [])
        for name, default in defaults(function).items():
            if bound.get(name) == [DATA] or name not in bound:
                bound[name] = [Known(default), DATA]
        return self._run(Frame(self._search, tree, outside, bound, function.__code__.co_filename))

    def _run(self, frame: Frame) -> Called:
        self._frames += 1
        self._depth += 1
        try:
            values = frame.run()
        finally:
            self._depth -= 1
        return values, frame.total

    def _outside(self, function: types.FunctionType) -> Callable[[str], list[Value]]:
        """What names of a function stand for outside it."""
        cells = cell_values(function)
        space = function.__globals__
        stored = self._search.members.stored
        builtin = space.get("__builtins__", {})
        builtins = vars(builtin) if isinstance(builtin, types.ModuleType) else builtin

        def value(name: str) -> list[Value]:
            if name in cells:
                return [Known(cells[name])]
            if name in function.__code__.co_freevars:
                return [DATA]
            if name == "__globals__":
                return [Known(space)]
            if name in space:
                return [Known(space[name]), *stored(space, name)]
            if name in builtins:
                return [Known(builtins[name])]
            return stored(space, name) or [DATA]

        return value

    def _without_source(
        self, function: types.FunctionType, outside: Callable[[str], list[Value]]
    ) -> Called:
        """A function whose source is not to be had: all names in its code count as called."""
        calls = 0
        for code in codes(function.__code__):
            for name in (*code.co_names, *code.co_freevars):
                for value in outside(name):
                    if isinstance(value, Known) and isinstance(value.value, types.ModuleType):
                        for inner in code.co_names:
                            if inner in vars(value.value):
                                calls += 2 * self._search.touch(vars(value.value)[inner])
                    elif isinstance(value, Known):
                        calls += 2 * self._search.touch(value.value)
        self._search.unresolve(f"{function.__qualname__} has no source")
        return [DATA], min(2, calls)

    def _look_at_code(self, function: types.FunctionType) -> None:
        for code in codes(function.__code__):
            for constant in code.co_consts:
                self._look_at_text(constant)
            for name in code.co_names:
                held = function.__globals__.get(name)
                self._look_at_text(held)
                if isinstance(held, type):
                    self._search.note_class(held)

    def _look_at_text(self, value: Any) -> None:
        is_short = isinstance(value, str) and len(value) < 500
        if is_short and any(known in value for known in (*_HOSTS, *_HTTP)):
            self._search.clients.add(f"address {value}")


def _key(function: types.FunctionType, arguments: Arguments) -> Any:
    """What tells the ways of calling a function apart."""
    places = arguments.places if arguments.are_known else arguments.places[:1]
    words = tuple((name, tuple(values)) for name, values in arguments.words.items())
    return function.__code__, id(function), tuple(map(tuple, places)), words
