"""What a node can run: chat models, graphs, tools and providers' clients behind its code.

The user's code is followed from expression to expression (`evaluate`), through modules, classes,
properties, factories, local imports and objects that it makes. LangChain's code is not: what the
user handed to it is looked for in the objects themselves. Whatever is called and not known is kept
as `unresolved`, so that "calls no model" is only said where that is certain.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel, BaseLanguageModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.func import _TaskFunction
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel
from langgraph.store.base import BaseStore
from langgraph.types import Command, Send
from pydantic import BaseModel

from marft_graph.graph import libraries
from marft_graph.graph.evaluate import Frame, parameters
from marft_graph.graph.syntax import find
from marft_graph.graph.values import (
    DATA,
    PLAIN,
    Bound,
    Closure,
    Data,
    Items,
    Known,
    Made,
    Method,
    NewGraph,
    Parent,
    Plain,
    Value,
    collection,
)
from marft_graph.names import inner_path

_MISSING = object()
_FRAMES, _DEPTH, _OBJECTS, _CONTEXTS = 1500, 25, 20000, 8
_Called = tuple[list[Value], int]
_MAKERS = frozenset(
    {"bind", "bind_tools", "pipe", "with_config", "with_fallbacks", "with_retry", "assign", "pick"}
    | {"with_structured_output", "with_types", "with_listeners", "configurable_fields", "map"}
    | {"configurable_alternatives", "copy", "model_copy", "with_alisteners", "as_tool"}
)
_GRAPH_MAKERS = frozenset({"create_agent", "create_react_agent"})
_MODEL_MAKERS = frozenset({"init_chat_model", "init_chat_model_helper"})
_CONFIGURABLE = "_ConfigurableModel"  # what `init_chat_model(configurable_fields=...)` returns
_LOOKED_AT = (isinstance, issubclass, hasattr, len, type, id, repr, str, print, bool, callable)
_READ = frozenset(
    name
    for kind in (str, bytes, int, float, list, dict, set, tuple, BaseMessage, BaseModel, BaseStore)
    for name in dir(kind)
    if not name.startswith("_")
) - {"copy_to_model"}
_ALSO_READ = frozenset(
    {"stream_writer", "writer", "isoformat", "strftime", "timestamp", "group", "groups", "match"}
    | {"search", "findall", "json", "raise_for_status", "result", "done", "heartbeat", "info"}
    | {"debug", "warning", "error", "exception", "date", "time", "weekday", "exists", "read_text"}
)
_HTTP = ("/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/api/generate")
_HOSTS = ("api.openai.com", "api.anthropic.com", "generativelanguage.googleapis.com")


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
        self._memo: dict[Any, _Called] = {}
        self._stored: dict[tuple[int, str], list[Value]] = {}
        self._contexts: Counter[types.CodeType] = Counter()
        self._frames = 0
        self._depth = 0

    # What becomes of a value

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
                return self.call(value, [], {}, "", are_known=False)[1]
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
            self._unresolve("more objects than are looked at")
            return 0
        self._seen[id(held)] = held, 0
        calls = self._touch(held)
        self._seen[id(held)] = held, calls
        return calls

    def _touch(self, held: Any) -> int:
        if isinstance(held, BaseChatModel):
            self.models.append(held)
            return 1
        if type(held).__name__ == _CONFIGURABLE and libraries.is_langchain(type(held).__module__):
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
            values, calls = self.call(Known(held), [], {}, "", are_known=False)
            return min(2, calls + self._use_all(v for v in values if _is_run(v)))
        if isinstance(held, types.MethodType | functools.partial) or _wrapped(held) is not None:
            return self.call(Known(held), [], {}, "", are_known=False)[1]
        if isinstance(held, list | tuple | set | frozenset):
            return min(2, sum([self.touch(part) for part in held]))
        if isinstance(held, Mapping) and not isinstance(held, Runnable):
            return min(2, sum([self.touch(part) for part in held.values()]))
        if libraries.is_provider(type(held).__module__):
            self.clients.add(libraries.client_name(type(held)))
            return 0
        return self._touch_object(held)

    def _touch_class(self, kind: type) -> int:
        if issubclass(kind, Command | Send):
            self.classes.add("Command" if issubclass(kind, Command) else "Send")
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
        often = [self.touch(part) for _, part in _attributes(held)]
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
                    if (not name.startswith("__") or name == "__call__") and _is_code(held):
                        for value in self._of_class(held, owner, kind):
                            yield self.use(value)

    # Attributes and items

    def attribute(self, value: Value, name: str) -> _Called:
        """What an attribute of a value stands for, and how often reading it asks a model."""
        match value:
            case Known(held):
                return self._attribute_of(held, value, name)
            case Made(kind):
                if libraries.is_langchain(kind.__module__) or libraries.is_provider(
                    kind.__module__
                ):
                    return [Method(value, name)], 0
                if not libraries.is_followed(kind.__module__):
                    return [PLAIN], 0
                found = list(value.attributes.get(name, ()))
                held = inspect.getattr_static(kind, name, _MISSING)
                if held is _MISSING:
                    return (
                        found or [DATA if issubclass(kind, BaseModel) else Method(value, name)]
                    ), 0
                made, calls = self._member(held, value, kind)
                return [*found, *made], calls
            case Parent(owner, kind):
                return self._of_parent(owner, kind, name)
            case Plain():
                return [PLAIN], 0
            case Method(owner, _) if isinstance(owner, Known | Made | Data):
                return [Method(owner, name)], 0
        return [Method(value, name)], 0

    def _attribute_of(self, held: Any, value: Known, name: str) -> _Called:
        if isinstance(held, types.ModuleType):
            return self._of_module(held, name), 0
        if isinstance(held, type):
            if held.__module__ == "builtins":
                return [PLAIN], 0
            member = inspect.getattr_static(held, name, _MISSING)
            if member is _MISSING:
                return [*self._stored.get((id(held), name), []), Method(value, name)], 0
            return self._of_class(member, value, held), 0
        if libraries.is_provider(type(held).__module__):
            return [Method(value, name)], 0  # whatever of it is used, the client is
        stored = self._stored.get((id(held), name), [])
        own = getattr(held, "__dict__", None)
        if isinstance(own, dict) and name in own:
            return [Known(own[name]), *stored], 0
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
        stored = self._stored.get((id(vars(module)), name), [])
        if name in vars(module):
            return [Known(vars(module)[name]), *stored]
        inner = sys.modules.get(f"{module.__name__}.{name}")
        if inner is not None:
            return [Known(inner)]
        if libraries.is_provider(module.__name__):
            return [Method(Known(module), name)]
        is_open = libraries.is_followed(module.__name__) or hasattr(module, "__getattr__")
        return stored or [DATA if is_open else PLAIN]

    def _member(self, held: Any, owner: Value, kind: type) -> _Called:
        """What reading a member of a class on one of its objects gives."""
        getter = held.fget if isinstance(held, property) else None
        if isinstance(held, functools.cached_property):
            getter = held.func
        if getter is not None:
            return self.call(Bound(getter, owner), [], {}, "a property")
        return self._of_class(held, owner, kind), 0

    def _of_class(self, held: Any, owner: Value, kind: type) -> list[Value]:
        if isinstance(held, staticmethod):
            return [Known(held.__func__)]
        if isinstance(held, classmethod):
            return [Bound(held.__func__, Known(kind))]
        if isinstance(held, property | functools.cached_property):
            return [Bound(held.fget if isinstance(held, property) else held.func, owner)]
        is_class = isinstance(owner, Known) and isinstance(owner.value, type)
        if isinstance(held, types.FunctionType) or _wrapped(held) is not None:
            return [Known(held)] if is_class else [Bound(held, owner)]
        if isinstance(held, types.MemberDescriptorType | types.GetSetDescriptorType):
            return [DATA]
        return [Known(held)]

    def _of_parent(self, owner: Value, kind: type, name: str) -> _Called:
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

    def parent(self, kinds: list[Value], owners: list[Value]) -> list[Value]:
        """What `super()` stands for in a method."""
        classes = [k.value for k in kinds if isinstance(k, Known) and isinstance(k.value, type)]
        return [Parent(owner, kind) for kind in classes for owner in owners]

    def namespace(self, values: list[Value]) -> list[Value]:
        """What `globals()` stands for."""
        return values

    def item(self, value: Value, key: Any) -> list[Value]:
        """What an item of a value stands for; any where the key is not known."""
        match value:
            case Known(held) if isinstance(held, Mapping):
                if key is not None:
                    return [Known(held[key])] if key in held else [DATA]
                return [Known(part) for part in held.values()] or [DATA]
            case Known(held) if isinstance(held, list | tuple):
                if (
                    isinstance(key, int)
                    and not isinstance(key, bool)
                    and -len(held) <= key < len(held)
                ):
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
                    found, _ = self.attribute(value, getter)
                    if found and isinstance(found[0], Bound):
                        return self.call(found[0], [], {}, getter)[0]
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
        found: list[Value] = []
        for value in values:
            if isinstance(value, Items):
                found += value.values
                continue
            entered: list[Value] = []
            if isinstance(value, Known | Made):
                for method in ("__enter__", "__aenter__"):
                    for callee in self.attribute(value, method)[0]:
                        if isinstance(callee, Bound):
                            entered += self.call(callee, [], {}, method)[0]
            found += entered or [value]
        return found

    def imported(self, module: str, name: str) -> list[Value]:
        """What an import inside a function binds; modules are not loaded for it."""
        if f"{module}.{name}" in sys.modules and not hasattr(sys.modules.get(module), name):
            return [Known(sys.modules[f"{module}.{name}"])]
        if module in sys.modules:
            held = getattr(sys.modules[module], name, self)
            return [DATA] if held is self else [Known(held)]
        if libraries.is_provider(module):
            self.clients.add(f"{module}.{name}")
        is_harmless = libraries.is_python(module)
        return [PLAIN if is_harmless else DATA]

    def store(self, owner: Value, name: str, values: list[Value]) -> None:
        """The code assigns an attribute."""
        if isinstance(owner, Made):
            held = owner.attributes.setdefault(name, [])
            held += [value for value in values if value not in held]
        elif isinstance(owner, Known):
            held = self._stored.setdefault((id(owner.value), name), [])
            held += [value for value in values if value not in held]

    # Calls

    def call(
        self,
        callee: Value,
        places: list[list[Value]],
        words: Mapping[str, list[Value]],
        place: str,
        *,
        are_known: bool = True,
    ) -> _Called:
        """What a call gives, and how often it may ask a model.

        Args:
            callee: what is called.
            places: what its arguments stand for, by place.
            words: the same by name.
            place: the call in words, for `unresolved`.
            are_known: False where something else makes the call, with arguments of its own.
        """
        given = [v for values in (*places, *words.values()) for v in values]
        match callee:
            case Known(held):
                return self._call_known(held, places, words, place, are_known)
            case Bound(function, owner):
                inner = places if are_known else [[DATA]] * 20
                if isinstance(function, types.FunctionType):
                    return self._call_function(function, [[owner], *inner], words, are_known)
                return self._call_known(function, [[owner], *inner], words, place, are_known)
            case Closure(tree, frame):
                return self._run_closure(tree, frame, places, words, are_known)
            case Method(owner, name):
                return self._call_method(owner, name, given, place)
            case Made():
                found, _ = self.attribute(callee, "__call__")
                if found and isinstance(found[0], Bound):
                    return self.call(found[0], places, words, place)
                return [PLAIN], self._use_all([callee, *given])
            case Plain():
                return [PLAIN], self._use_all(given)
        calls = self._use_all([callee, *given])
        if not isinstance(callee, Items | NewGraph | Parent):
            self._unresolve(place)
        return [DATA], calls

    def _call_method(self, owner: Value, name: str, given: list[Value], place: str) -> _Called:
        if isinstance(owner, Data):
            calls = self._use_all(given)
            if name not in _READ and name not in _ALSO_READ:
                self._unresolve(place)
                return [DATA], calls
            return [DATA, *(given if name in ("get", "pop", "setdefault") else ())], calls
        if isinstance(owner, Known):
            held = owner.value
            if isinstance(held, Mapping | list | tuple | set | frozenset):
                calls = self._use_all(given)
                return [
                    *self.item(owner, None),
                    collection(self.item(owner, None)),
                    *given,
                ], calls
            if isinstance(held, contextvars.ContextVar):
                with contextlib.suppress(LookupError):
                    return [DATA, Known(held.get())], 0
                return [DATA], 0
            if held is None:  # filled by other code before this runs
                self._unresolve(place)
                return [DATA], self._use_all(given)
            if isinstance(held, str | bytes | int | float | bool):
                return [PLAIN], self._use_all(given)
        if isinstance(owner, Items):
            return [*owner.values, *given, owner], self._use_all(given)
        kind = getattr(owner, "kind", None)
        if isinstance(kind, type) and issubclass(kind, StateGraph):
            if name == "compile":
                self._unresolve(f"{place} of a graph that the code makes")
            return [owner], 0
        if name in _MAKERS:
            return [owner, *(value for value in given if not self._is_tools(value))], 0
        calls = self._use_all([owner, *given])
        kind = owner.value if isinstance(owner, Known) else None
        is_class = isinstance(kind, type)
        return ([Made(kind)] if is_class and kind is not None else [self._made_by(owner)]), calls

    def _made_by(self, owner: Value) -> Value:
        """What a method gives whose code is not followed."""
        held = owner.value if isinstance(owner, Known) else getattr(owner, "kind", None)
        module = held.__module__ if isinstance(held, type) else type(held).__module__
        if libraries.is_followed(module):
            return DATA
        return PLAIN

    def _is_tools(self, value: Value) -> bool:
        """Whether a value is a tool, or tools: binding them to a model does not run them."""
        match value:
            case Known(held):
                parts = held if isinstance(held, list | tuple) else [held]
                return bool(parts) and all(
                    isinstance(part, BaseTool | types.FunctionType | type | dict) for part in parts
                )
            case Items(values):
                return all(self._is_tools(inner) for inner in values)
            case Closure():
                return True
        return False

    def _call_known(
        self,
        held: Any,
        places: list[list[Value]],
        words: Mapping[str, list[Value]],
        place: str,
        are_known: bool,
    ) -> _Called:
        given = [v for values in (*places, *words.values()) for v in values]
        if isinstance(held, types.FunctionType):
            return self._call_function(held, places, words, are_known)
        if isinstance(held, types.MethodType):
            inner = Bound(held.__func__, Known(held.__self__))
            return self.call(inner, places, words, place, are_known=are_known)
        if isinstance(held, functools.partial):
            first: list[list[Value]] = [[Known(a)] for a in held.args]
            named: dict[str, list[Value]] = {n: [Known(v)] for n, v in held.keywords.items()}
            if not are_known:
                places = [[DATA]] * 20
            whole = {**named, **words}
            return self._call_known(held.func, [*first, *places], whole, place, True)
        wrapped = _wrapped(held)
        if wrapped is not None:
            return self._call_known(wrapped, places, words, place, are_known)
        if isinstance(held, type):
            return self._call_class(held, places, words, given)
        if held is getattr and len(places) > 1:
            return self._call_getattr(places)
        if (held is map or held is filter) and places:
            calls = self._use_all(given)
            results = [
                v
                for f in places[0]
                for v in self.call(f, [self._all_items(places[1:])], {}, place)[0]
            ]
            return [collection(results)], calls
        if any(held is looked for looked in _LOOKED_AT):
            return [PLAIN], 0
        if any(held is open_ for open_ in (eval, exec, __import__)):
            self._unresolve(place)
            return [DATA], self._use_all(given)
        if isinstance(held, types.BuiltinFunctionType):
            keeps = held in (next, iter, sorted, reversed, enumerate, zip, max, min)
            return (self._all_items(places) if keeps else [PLAIN]), self._use_all(given)
        found, _ = self.attribute(Known(held), "__call__")
        if found and isinstance(found[0], Bound):
            return self.call(found[0], places, words, place, are_known=are_known)
        calls = self._use_all([Known(held), *given])
        module = type(held).__module__
        is_open = libraries.is_followed(module) or held is None
        if is_open:
            self._unresolve(place)
        return [DATA if is_open else PLAIN], calls

    def _all_items(self, places: list[list[Value]]) -> list[Value]:
        return [
            v for values in places for value in values for v in (*self.item(value, None), value)
        ]

    def _call_getattr(self, places: list[list[Value]]) -> _Called:
        found: list[Value] = [v for values in places[2:] for v in values]
        for name in places[1]:
            for owner in places[0]:
                if isinstance(name, Known) and isinstance(name.value, str):
                    found += self.attribute(owner, name.value)[0]
                else:
                    self.use(owner)
                    found.append(DATA)
        return found, 0

    def _call_class(
        self,
        kind: type,
        places: list[list[Value]],
        words: Mapping[str, list[Value]],
        given: list[Value],
    ) -> _Called:
        if issubclass(kind, Command | Send):
            self.classes.add("Command" if issubclass(kind, Command) else "Send")
        if kind in (list, tuple, set, frozenset, dict, enumerate, zip, reversed, map, filter):
            if kind in (map, filter):
                return self._mapped(places)
            return [collection([*self._all_items(places), *given])], 0
        if kind in _LOOKED_AT or kind.__module__ == "builtins":
            return [PLAIN], 0
        if issubclass(kind, functools.partial) and places:
            rest = [v for values in (*places[1:], *words.values()) for v in values]
            return list(places[0]), self._use_all(rest)
        if libraries.is_provider(kind.__module__):
            return [Made(kind)], 0
        if issubclass(kind, BaseChatModel):
            return [Made(kind)], 0
        made = Made(kind)
        if not libraries.is_followed(kind.__module__):
            return ([made] if libraries.is_langchain(kind.__module__) else [PLAIN]), self._use_all(
                given
            )
        for name, values in words.items():
            made.attributes[name] = list(values)
        calls = 0
        maker = inspect.getattr_static(kind, "__init__", None)
        if isinstance(maker, types.FunctionType) and libraries.is_followed(_module(maker)):
            calls = self.call(Bound(maker, made), places, words, f"{kind.__name__}()")[1]
        elif places:  # a dataclass, a named tuple
            names = list(inspect.get_annotations(kind))
            for name, values in zip(names, places, strict=False):
                made.attributes[name] = list(values)
        return [made], calls

    def _mapped(self, places: list[list[Value]]) -> _Called:
        results, total = [], 0
        for function in places[0] if places else ():
            arguments = [self._all_items([values]) for values in places[1:]]
            values, calls = self.call(function, arguments, {}, "map")
            results += values
            total = 2 if calls or total else 0
        return [collection(results)], total

    def _call_function(
        self,
        function: types.FunctionType,
        places: list[list[Value]],
        words: Mapping[str, list[Value]],
        are_known: bool,
    ) -> _Called:
        module = _module(function)
        given = [v for values in (*places, *words.values()) for v in values]
        if function not in self.functions:
            self.functions.append(function)
        if libraries.is_followed(module):
            return self._follow(function, places, words, are_known)
        if libraries.is_provider(module):
            self.clients.add(f"{libraries.package(module)}.{function.__name__}")
            return [PLAIN], 0
        if not libraries.is_langchain(module):
            return self._call_other(function, given, are_known)
        if function.__name__ in _MODEL_MAKERS:
            return [Made(BaseChatModel)], 0
        if function.__name__ in _GRAPH_MAKERS:
            names = [v.value for v in words.get("name", ()) if isinstance(v, Known)]
            name = inner_path("", graph=str(names[0] or "") if names else "")
            return [NewGraph(name.removeprefix("/"))], 0
        held = self._held_by(function)
        is_method = bool(places) and places[0] != [] and isinstance(places[0][0], Known | Made)
        if is_method and not held and isinstance(places[0][0], Known):
            kind = places[0][0].value
            if isinstance(kind, type):  # a class method that makes an object
                return [Made(kind)], self._use_all([v for vs in places[1:] for v in vs])
        calls = self._use_all(given) + sum([self.touch(part) for part in held])
        return [DATA], min(2, calls)

    def _held_by(self, function: types.FunctionType) -> list[Any]:
        """What a function of LangChain was given when it was made; tools it only offers a model."""
        found: list[Any] = [getattr(function, "__wrapped__", None), *(function.__defaults__ or ())]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet: a name that is assigned later
                found.append(cell.cell_contents)
        return [part for part in found if part is not None and not _offers_tools(part)]

    def _call_other(
        self, function: types.FunctionType, given: list[Value], are_known: bool
    ) -> _Called:
        """A function of Python's own library, or of one that knows no chat models."""
        module, name = _module(function), function.__name__
        if module == "importlib" and name == "import_module":
            names = [v.value for v in given if isinstance(v, Known)]
            known = [Known(sys.modules[n]) for n in names if n in sys.modules]
            return [*known, *([] if known else [DATA])], 0
        calls = self._use_all(given)
        wrapped = getattr(function, "__wrapped__", None)
        held = [wrapped] if wrapped is not None else []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):
                held.append(cell.cell_contents)
        results: list[Value] = []
        for part in held:
            if isinstance(part, types.FunctionType) and libraries.is_followed(_module(part)):
                values, often = self.call(Known(part), [[v] for v in given], {}, name)
                results += values  # `contextmanager`, `wraps` and their like
                calls += often
            else:
                calls += self.touch(part)
        if name in ("asyncio.gather", "gather", "as_completed", "wait_for", "run", "cast", "copy"):
            results += given
        if name in ("deepcopy", "ensure_future", "create_task", "shield", "reduce", "chain"):
            results += given
        return results or [PLAIN], min(2, calls)

    def _use_all(self, values: Iterable[Value]) -> int:
        return min(2, sum([self.use(value) for value in values]))

    # Functions whose code is followed

    def _follow(
        self,
        function: types.FunctionType,
        places: list[list[Value]],
        words: Mapping[str, list[Value]],
        are_known: bool,
    ) -> _Called:
        key = (
            function.__code__,
            id(function),
            tuple(tuple(values) for values in places)
            if are_known
            else tuple(map(tuple, places[:1])),
            tuple((name, tuple(values)) for name, values in words.items()),
        )
        if key not in self._memo and self._contexts[function.__code__] >= _CONTEXTS:
            places, words = places[:1], {}  # called in too many ways to tell them apart
            key = (function.__code__, id(function), (), ())
        if key in self._memo:
            return self._memo[key]
        self._contexts[function.__code__] += 1
        self._memo[key] = [], 0
        if self._frames > _FRAMES or self._depth > _DEPTH:
            self._unresolve(f"{function.__qualname__}: more code than is looked at")
            return [DATA], 0
        self._look_at_code(function)
        tree = find(function.__code__)
        outside = self._outside(function)
        if tree is None:
            result = self._without_source(function, outside)
        else:
            bound = parameters(tree, places, words, lambda _: [])
            for name, default in _defaults(function).items():
                if bound.get(name) == [DATA] or name not in bound:
                    bound[name] = [Known(default), DATA]
            frame = Frame(self, tree, outside, bound, function.__code__.co_filename)
            result = self._run(frame)
        self._memo[key] = result
        return result

    def _run_closure(
        self,
        tree: Any,
        frame: Frame,
        places: list[list[Value]],
        words: Mapping[str, list[Value]],
        are_known: bool,
    ) -> _Called:
        key = (id(tree), id(frame), tuple(map(tuple, places)), tuple(words))
        if key in self._memo:
            return self._memo[key]
        self._memo[key] = [], 0
        if self._frames > _FRAMES or self._depth > _DEPTH:
            self._unresolve("more code than is looked at")
            return [DATA], 0
        bound = parameters(tree, places, words, frame.value)
        result = self._run(Frame(self, tree, frame.name, bound, frame.file))
        self._memo[key] = result
        return result

    def _run(self, frame: Frame) -> _Called:
        self._frames += 1
        self._depth += 1
        try:
            values = frame.run()
        finally:
            self._depth -= 1
        return values, frame.total

    def _outside(self, function: types.FunctionType) -> Callable[[str], list[Value]]:
        """What names of a function stand for outside it."""
        cells: dict[str, Any] = {}
        free = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in free:
            with contextlib.suppress(ValueError):
                cells[name] = cell.cell_contents
        space = function.__globals__
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
                return [Known(space[name]), *self._stored.get((id(space), name), ())]
            if name in builtins:
                return [Known(builtins[name])]
            return self._stored.get((id(space), name)) or [DATA]

        return value

    def _without_source(
        self, function: types.FunctionType, outside: Callable[[str], list[Value]]
    ) -> _Called:
        """A function whose source is not to be had: all names in its code count as called."""
        calls = 0
        for code in codes(function.__code__):
            for name in (*code.co_names, *code.co_freevars):
                for value in outside(name):
                    if isinstance(value, Known) and isinstance(value.value, types.ModuleType):
                        for inner in code.co_names:
                            if inner in vars(value.value):
                                calls += 2 * self.touch(vars(value.value)[inner])
                    elif isinstance(value, Known):
                        calls += 2 * self.touch(value.value)
        self._unresolve(f"{function.__qualname__} has no source")
        return [DATA], min(2, calls)

    def _look_at_code(self, function: types.FunctionType) -> None:
        for code in codes(function.__code__):
            for constant in code.co_consts:
                self._look_at_text(constant)
            for name in code.co_names:
                held = function.__globals__.get(name)
                self._look_at_text(held)
                if isinstance(held, type):
                    if issubclass(held, Command):
                        self.classes.add("Command")
                    elif issubclass(held, Send):
                        self.classes.add("Send")

    def _look_at_text(self, value: Any) -> None:
        is_short = isinstance(value, str) and len(value) < 500
        if is_short and any(known in value for known in (*_HOSTS, *_HTTP)):
            self.clients.add(f"address {value}")

    def _unresolve(self, place: str) -> None:
        if place not in self.unresolved:
            self.unresolved.append(place)


def codes(code: types.CodeType) -> Iterable[types.CodeType]:
    """A function's code and that of the functions defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def _module(function: types.FunctionType) -> str:
    """The module of a function's code; what wraps a function claims to be in that one's."""
    return str(function.__globals__.get("__name__", ""))


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    given = function.__defaults__ or ()
    found = dict(zip(names[len(names) - len(given) :], given, strict=True))
    return found | (function.__kwdefaults__ or {})


def _wrapped(held: Any) -> Any:
    """The function in what `functools.cache` and its like made."""
    if isinstance(held, types.FunctionType | type) or not callable(held):
        return None
    if isinstance(held, Runnable | _TaskFunction):
        return None
    inner = inspect.getattr_static(held, "__wrapped__", None)
    if inner is None:
        inner = getattr(held, "__dict__", {}).get("__wrapped__")
    return inner if isinstance(inner, types.FunctionType) else None


def _is_run(value: Value) -> bool:
    """Whether LangChain runs a value that a function returns: a chain, a model."""
    if isinstance(value, Made):
        return issubclass(value.kind, Runnable)
    return isinstance(value, NewGraph) or (
        isinstance(value, Known) and isinstance(value.value, Runnable)
    )


def _is_code(held: Any) -> bool:
    kinds = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)
    return isinstance(held, kinds) or _wrapped(held) is not None


def _offers_tools(part: Any) -> bool:
    """Whether a value is tools, which a model node offers its model and does not run."""
    if isinstance(part, dict):
        part = list(part.values())
    parts = part if isinstance(part, list | tuple) else [part]
    is_node = type(part).__name__ == "ToolNode"
    return is_node or any(isinstance(inner, BaseTool) for inner in parts)


def _attributes(value: Any) -> Iterable[tuple[str, Any]]:
    names: set[str] = set(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names.update([slots] if isinstance(slots, str) else slots)
    for name in sorted(names):
        try:
            yield (
                name,
                value.__dict__[name]
                if name in getattr(value, "__dict__", {})
                else getattr(value, name),
            )
        except AttributeError:  # a slot that was never filled
            continue
