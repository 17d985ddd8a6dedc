"""What attributes and items of values stand for, and what a node's code assigns to them."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from marft_graph.graph import libraries
from marft_graph.graph.objects import wrapped_function
from marft_graph.graph.values import (
    DATA,
    PLAIN,
    Arguments,
    Bound,
    Called,
    Data,
    Items,
    Known,
    Made,
    Method,
    Parent,
    Plain,
    Value,
)

if TYPE_CHECKING:
    from marft_graph.graph.search import Search

_MISSING = object()


class Members:
    """Attributes and items of values, with those that the code assigns."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._stored: dict[tuple[int, str], list[Value]] = {}

    def attribute(self, value: Value, name: str) -> Called:
        """What an attribute of a value stands for, and how often reading it asks a model."""
        match value:
            case Known(held):
                return self._attribute_of(held, value, name)
            case Made(kind):
                return self._attribute_of_made(value, kind, name)
            case Parent(owner, kind):
                return self._of_parent(owner, kind, name)
            case Plain():
                return [PLAIN], 0
            case Method(owner, _) if isinstance(owner, Known | Made | Data):
                return [Method(owner, name)], 0
        return [Method(value, name)], 0

    def _attribute_of_made(self, made: Made, kind: type, name: str) -> Called:
        module = kind.__module__
        if libraries.is_langchain(module) or libraries.is_provider(module):
            return [Method(made, name)], 0
        if not libraries.is_followed(module):
            return [PLAIN], 0
        assigned = list(made.attributes.get(name, ()))
        member = inspect.getattr_static(kind, name, _MISSING)
        if member is _MISSING:
            unknown = DATA if issubclass(kind, BaseModel) else Method(made, name)
            return assigned or [unknown], 0
        values, calls = self._member(member, made, kind)
        return [*assigned, *values], calls

    def _attribute_of(self, held: Any, value: Known, name: str) -> Called:
        if isinstance(held, types.ModuleType):
            return self._of_module(held, name), 0
        if isinstance(held, type):
            if held.__module__ == "builtins":
                return [PLAIN], 0
            member = inspect.getattr_static(held, name, _MISSING)
            if member is _MISSING:
                return [*self.stored(held, name), Method(value, name)], 0
            return of_class(member, value, held), 0
        if libraries.is_provider(type(held).__module__):
            return [Method(value, name)], 0  # whatever of it is used, the client is
        stored = self.stored(held, name)
        instance = getattr(held, "__dict__", None)
        if isinstance(instance, dict) and name in instance:
            return [Known(instance[name]), *stored], 0
        member = inspect.getattr_static(type(held), name, _MISSING)
        if isinstance(member, types.MemberDescriptorType):  # a slot
            try:
                return [Known(member.__get__(held)), *stored], 0
            except AttributeError:
                return [*stored, DATA], 0
        module = type(held).__module__
        if member is _MISSING or not libraries.is_followed(module):
            return [*stored, Method(value, name)], 0
        made, calls = self._member(member, value, type(held))
        return [*stored, *made], calls

    def _of_module(self, module: types.ModuleType, name: str) -> list[Value]:
        if module is sys and name == "modules":
            return [DATA]
        stored = self.stored(vars(module), name)
        if name in vars(module):
            return [Known(vars(module)[name]), *stored]
        inner = sys.modules.get(f"{module.__name__}.{name}")
        if inner is not None:
            return [Known(inner)]
        if libraries.is_provider(module.__name__):
            return [Method(Known(module), name)]
        is_open = libraries.is_followed(module.__name__) or hasattr(module, "__getattr__")
        return stored or [DATA if is_open else PLAIN]

    def _member(self, held: Any, owner: Value, kind: type) -> Called:
        """What reading a member of a class on one of its objects gives."""
        getter = held.fget if isinstance(held, property) else None
        if isinstance(held, functools.cached_property):
            getter = held.func
        if getter is not None:
            return self._search.calls.call(Bound(getter, owner), Arguments(), "a property")
        return of_class(held, owner, kind), 0

    def _of_parent(self, owner: Value, kind: type, name: str) -> Called:
        actual = kind
        if isinstance(owner, Known):
            actual = owner.value if isinstance(owner.value, type) else type(owner.value)
        elif isinstance(owner, Made):
            actual = owner.kind
        order = actual.__mro__
        after = order[order.index(kind) + 1 :] if kind in order else ()
        for place in after:
            if name in vars(place):
                return self._member(vars(place)[name], owner, actual)
        return [PLAIN], 0

    def item(self, value: Value, key: Any) -> list[Value]:
        """What an item of a value stands for; any where the key is not known."""
        match value:
            case Known(held) if isinstance(held, Mapping):
                if key is not None:
                    return [Known(held[key])] if key in held else [DATA]
                return [Known(part) for part in held.values()] or [DATA]
            case Known(held) if isinstance(held, list | tuple):
                is_index = isinstance(key, int) and not isinstance(key, bool)
                if is_index and -len(held) <= key < len(held):
                    return [Known(held[key])]
                return [Known(part) for part in held] or [DATA]
            case Known(held) if isinstance(held, set | frozenset):
                return [Known(part) for part in held]
            case Known(held) if isinstance(held, type) or hasattr(held, "__origin__"):
                return [value]  # a generic class with its arguments
            case Known(held) if isinstance(held, str | bytes | range):
                return [PLAIN]
            case Known() | Made():
                for getter in ("__getitem__", "__iter__") if key is not None else ("__iter__",):
                    methods, _ = self.attribute(value, getter)
                    if methods and isinstance(methods[0], Bound):
                        return self._search.calls.call(methods[0], Arguments(), getter)[0]
                return [DATA]
            case Items(values):
                return list(values)
            case Method(owner, name) if isinstance(owner, Data) and name:
                return [DATA]
            case Plain():
                return [PLAIN]
        return [DATA]

    def entered(self, values: list[Value]) -> list[Value]:
        """What `with ... as name` binds."""
        results: list[Value] = []
        for value in values:
            if isinstance(value, Items):
                results += value.values
                continue
            entered: list[Value] = []
            if isinstance(value, Known | Made):
                for method in ("__enter__", "__aenter__"):
                    for callee in self.attribute(value, method)[0]:
                        if isinstance(callee, Bound):
                            entered += self._search.calls.call(callee, Arguments(), method)[0]
            results += entered or [value]
        return results

    def imported(self, module: str, name: str) -> list[Value]:
        """What an import inside a function binds; modules are not loaded for it."""
        if f"{module}.{name}" in sys.modules and not hasattr(sys.modules.get(module), name):
            return [Known(sys.modules[f"{module}.{name}"])]
        if module in sys.modules:
            held = getattr(sys.modules[module], name, self)
            return [DATA] if held is self else [Known(held)]
        if libraries.is_provider(module):
            self._search.clients.add(f"{module}.{name}")
        return [PLAIN if libraries.is_python(module) else DATA]

    def stored(self, owner: Any, name: str) -> list[Value]:
        """What the code assigns to an attribute of an object, or a global to a module's dict."""
        return self._stored.get((id(owner), name), [])

    def store(self, owner: Value, name: str, values: list[Value]) -> None:
        """The code assigns an attribute."""
        if isinstance(owner, Made):
            held = owner.attributes.setdefault(name, [])
            held += [value for value in values if value not in held]
        elif isinstance(owner, Known):
            held = self._stored.setdefault((id(owner.value), name), [])
            held += [value for value in values if value not in held]


def of_class(held: Any, owner: Value, kind: type) -> list[Value]:
    """What a member of a class stands for where it is not called: properties as methods."""
    if isinstance(held, staticmethod):
        return [Known(held.__func__)]
    if isinstance(held, classmethod):
        return [Bound(held.__func__, Known(kind))]
    if isinstance(held, property | functools.cached_property):
        return [Bound(held.fget if isinstance(held, property) else held.func, owner)]
    is_class = isinstance(owner, Known) and isinstance(owner.value, type)
    if isinstance(held, types.FunctionType) or wrapped_function(held) is not None:
        return [Known(held)] if is_class else [Bound(held, owner)]
    if isinstance(held, types.MemberDescriptorType | types.GetSetDescriptorType):
        return [DATA]
    return [Known(held)]
