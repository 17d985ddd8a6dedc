"""What a node can run: chat models, graphs, tools and providers' clients behind its code.

The user's code is followed from expression to expression (`evaluate`), through modules, classes
and properties (`members`), factories and objects that it makes (`calls`, `following`). LangChain's
code is not: what the user handed to it is looked for in the objects themselves. Whatever is called
and not known is kept as `unresolved`, so that "calls no model" is only said where that is certain.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel, BaseLanguageModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.func import _TaskFunction
from langgraph.pregel import Pregel
from langgraph.types import Command, Send

from marft_graph.graph import libraries
from marft_graph.graph.calls import Calls
from marft_graph.graph.following import FollowedCode
from marft_graph.graph.members import Members, of_class
from marft_graph.graph.objects import attributes, is_code, wrapped_function
from marft_graph.graph.values import (
    UNKNOWN,
    Bound,
    Closure,
    Items,
    Known,
    Made,
    Method,
    NewGraph,
    Value,
)

_OBJECTS = 20000
_CONFIGURABLE = "_ConfigurableModel"  # what `init_chat_model(configurable_fields=...)` returns


class Search:
    """Walks from a node's Runnable to what its code can call or hold."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.graphs: list[Pregel[Any, Any, Any, Any]] = []
        self.new_graphs: list[str] = []
        self.tasks: dict[str, _TaskFunction[Any, Any]] = {}
        self.tools: dict[str, BaseTool] = {}
        self.clients: set[str] = set()
        self.unresolved: list[str] = []
        self.functions: list[types.FunctionType] = []
        self.classes: set[str] = set()
        """`Command` and `Send`, where the code uses them by whatever name."""
        self._seen: dict[int, tuple[Any, int]] = {}
        self.members = Members(self)
        self.calls = Calls(self)
        self.code = FollowedCode(self)

    def use(self, value: Value) -> int:
        """A value goes where it may be called: note what it holds; how often it asks a model."""
        match value:
            case Known(held):
                return self.touch(held)
            case Made(kind, attributes):
                known = self._seen.get(id(attributes))
                if known is None:
                    self._seen[id(attributes)] = attributes, 0
                    known = attributes, self._use_made(value, kind)
                    self._seen[id(attributes)] = known
                return known[1]
            case Bound() | Closure():
                return self.calls.call(value, UNKNOWN, "")[1]
            case Method(owner, _):
                return self.use(owner)
            case Items(values):
                return min(2, sum([self.use(inner) for inner in values]))
            case NewGraph(name):
                self.new_graphs.append(name)
                return 2
        return 0

    def touch(self, held: Any) -> int:
        """An object goes where it may be called; how often that may ask a model."""
        if id(held) in self._seen:
            return self._seen[id(held)][1]
        if len(self._seen) > _OBJECTS:
            self.unresolve("more objects than are looked at")
            return 0
        self._seen[id(held)] = held, 0
        calls = self._touch(held)
        self._seen[id(held)] = held, calls
        return calls

    def _touch(self, held: Any) -> int:
        if isinstance(held, BaseChatModel) or _is_configurable(held):
            self.models.append(held)
            return 1
        if isinstance(held, Pregel):
            self.graphs.append(held)
            return 2
        if isinstance(held, _TaskFunction):
            self.tasks[held.func.__name__] = held
            return 2
        if isinstance(held, BaseTool):
            self.tools[held.name] = held
            return 2
        if isinstance(held, BaseLanguageModel):  # completes text: no chat model
            self.clients.add(libraries.client_name(type(held)))
            return 0
        if isinstance(held, Embeddings | BaseMessage | types.ModuleType):
            return 0
        if isinstance(held, type):
            return self._touch_class(held)
        if isinstance(held, types.FunctionType):
            values, calls = self.calls.call(Known(held), UNKNOWN, "")
            return min(2, calls + self.use_all(v for v in values if _is_run(v)))
        if isinstance(held, types.MethodType | functools.partial) or wrapped_function(held):
            return self.calls.call(Known(held), UNKNOWN, "")[1]
        if isinstance(held, list | tuple | set | frozenset):
            return min(2, sum([self.touch(part) for part in held]))
        if isinstance(held, Mapping) and not isinstance(held, Runnable):
            return min(2, sum([self.touch(part) for part in held.values()]))
        if libraries.is_provider(type(held).__module__):
            self.clients.add(libraries.client_name(type(held)))
            return 0
        return self._touch_object(held)

    def _touch_class(self, kind: type) -> int:
        self.note_class(kind)
        if issubclass(kind, BaseChatModel) and not inspect.isabstract(kind):
            self.models.append(kind)
            return 1
        return 0

    def _touch_object(self, held: Any) -> int:
        module = type(held).__module__
        is_followed = libraries.is_followed(module)
        if not is_followed and not libraries.is_langchain(module):
            inner = getattr(held, "__dict__", {})
            if libraries.is_python(module) and isinstance(inner, dict):
                return min(2, sum([self.touch(part) for part in list(inner.values())]))
            return 0
        often = [self.touch(part) for part in attributes(held)]
        calls = max(often, default=0)  # a Runnable has a function for each of sync and async
        if is_followed:
            calls = sum(often)
            calls += sum(self._methods(type(held), Known(held)))
        return min(2, calls)

    def _use_made(self, value: Made, kind: type) -> int:
        if issubclass(kind, BaseChatModel):
            self.models.append(kind)
            return 1
        if libraries.is_provider(kind.__module__):
            self.clients.add(libraries.client_name(kind))
            return 0
        calls = sum([self.use(v) for values in value.attributes.values() for v in values])
        if libraries.is_followed(kind.__module__):
            calls += sum(self._methods(kind, value))
        return min(2, calls)

    def _methods(self, kind: type, owner: Value) -> Iterable[int]:
        """As if all that users wrote in a class were called."""
        for place in kind.__mro__:
            if libraries.is_followed(place.__module__):
                for name, held in list(vars(place).items()):
                    if (not name.startswith("__") or name == "__call__") and is_code(held):
                        for value in of_class(held, owner, kind):
                            yield self.use(value)

    def use_all(self, values: Iterable[Value]) -> int:
        """Values go where they may be called; how often they ask a model together."""
        return min(2, sum([self.use(value) for value in values]))

    def note_class(self, kind: type) -> None:
        """The code uses a class."""
        if issubclass(kind, Command | Send):
            self.classes.add("Command" if issubclass(kind, Command) else "Send")

    def unresolve(self, place: str) -> None:
        """A call is not known."""
        if place not in self.unresolved:
            self.unresolved.append(place)


def _is_configurable(held: Any) -> bool:
    kind = type(held)
    return kind.__name__ == _CONFIGURABLE and libraries.is_langchain(kind.__module__)


def _is_run(value: Value) -> bool:
    """Whether LangChain runs a value that a function returns: a chain, a model."""
    if isinstance(value, Made):
        return issubclass(value.kind, Runnable)
    return isinstance(value, NewGraph) or (
        isinstance(value, Known) and isinstance(value.value, Runnable)
    )
