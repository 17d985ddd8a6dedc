"""What the calls in a node's code give, and how often they may ask a model.

The user's functions are followed (`following`). Of a function that is not followed it counts as
called what it was handed, and what it holds. A call of which nothing is known is `unresolved`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.tools import BaseTool
from langgraph.graph import StateGraph
from langgraph.store.base import BaseStore
from pydantic import BaseModel

from marft_graph.graph import libraries
from marft_graph.graph.objects import cell_values, held_by, module_of, wrapped_function
from marft_graph.graph.values import (
    DATA,
    PLAIN,
    Arguments,
    Bound,
    Called,
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

if TYPE_CHECKING:
    from marft_graph.graph.search import Search

_MAKERS = frozenset(
    {"bind", "bind_tools", "pipe", "with_config", "with_fallbacks", "with_retry", "assign", "pick"}
    | {"with_structured_output", "with_types", "with_listeners", "configurable_fields", "map"}
    | {"configurable_alternatives", "copy", "model_copy", "with_alisteners", "as_tool"}
)
"""Methods that make a Runnable of a Runnable, and run nothing."""
_ASKING = frozenset({"invoke", "ainvoke", "stream", "astream", "generate", "agenerate"})
_GRAPH_MAKERS = frozenset({"create_agent", "create_react_agent"})
_MODEL_MAKERS = frozenset({"init_chat_model", "init_chat_model_helper"})
_PASSING_ON = frozenset(
    {"asyncio.gather", "gather", "as_completed", "wait_for", "run", "cast", "copy", "deepcopy"}
    | {"ensure_future", "create_task", "shield", "reduce", "chain"}
)
"""Functions of Python that give what they were handed."""
_LOOKED_AT = (isinstance, issubclass, hasattr, len, type, id, repr, str, print, bool, callable)
"""What calls nothing that it is handed."""
_READ = frozenset(
    name
    for kind in (str, bytes, int, float, list, dict, set, tuple, BaseMessage, BaseModel, BaseStore)
    for name in dir(kind)
    if not name.startswith("_")
) - {"copy_to_model"}
"""Methods of data, which call no model."""
_ALSO_READ = frozenset(
    {"stream_writer", "writer", "isoformat", "strftime", "timestamp", "group", "groups", "match"}
    | {"search", "findall", "json", "raise_for_status", "result", "done", "heartbeat", "info"}
    | {"debug", "warning", "error", "exception", "date", "time", "weekday", "exists", "read_text"}
)


class Calls:
    """What calls give, and what they use on the way."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def call(self, callee: Value, arguments: Arguments, place: str) -> Called:
        """What a call gives, and how often it may ask a model.

        Args:
            callee: what is called.
            arguments: what its arguments stand for.
            place: the call in words, for `unresolved`.
        """
        values = arguments.values
        match callee:
            case Known(held):
                return self._call_known(held, arguments, place)
            case Bound(function, owner):
                found = self._call_known(function, arguments.behind([[owner]]), place)
                self._note_own_way(callee, is_met=found[1] > 0)
                return found
            case Closure():
                return self._search.code.follow_closure(callee, arguments)
            case Method(owner, name):
                return self._call_method(owner, name, values, place)
            case Made():
                methods, _ = self._search.members.attribute(callee, "__call__")
                if methods and isinstance(methods[0], Bound):
                    known = dataclasses.replace(arguments, are_known=True)
                    return self.call(methods[0], known, place)
                return [PLAIN], self._search.use_all([callee, *values])
            case Plain():
                return [PLAIN], self._search.use_all(values)
        calls = self._search.use_all([callee, *values])
        if not isinstance(callee, Items | NewGraph | Parent):
            self._search.unresolve(place)
        return [DATA], calls

    def _note_own_way(self, callee: Bound, *, is_met: bool) -> None:
        """A chat model whose class asks in a way of its own, past LangChain's, is a client."""
        held = callee.owner.value if isinstance(callee.owner, Known) else None
        name = getattr(callee.function, "__name__", "")
        if isinstance(held, BaseChatModel) and name in _ASKING and not is_met:
            self._search.clients.add(f"{type(held).__name__}.{name}")

    def _call_method(self, owner: Value, name: str, values: list[Value], place: str) -> Called:
        match owner:
            case Data():
                calls = self._search.use_all(values)
                if name not in _READ and name not in _ALSO_READ:
                    self._search.unresolve(place)
                    return [DATA], calls
                return [DATA, *(values if name in ("get", "pop", "setdefault") else ())], calls
            case Known(Mapping() | list() | tuple() | set() | frozenset()):
                items = self._search.members.item(owner, None)
                return [*items, collection(items), *values], self._search.use_all(values)
            case Known(contextvars.ContextVar() as variable):
                with contextlib.suppress(LookupError):
                    return [DATA, Known(variable.get())], 0
                return [DATA], 0
            case Known(None):  # filled by other code before this runs
                self._search.unresolve(place)
                return [DATA], self._search.use_all(values)
            case Known(str() | bytes() | int() | float() | bool()):
                return [PLAIN], self._search.use_all(values)
            case Items(items):
                return [*items, *values, owner], self._search.use_all(values)
            case Made(kind) if issubclass(kind, StateGraph):
                if name == "compile":
                    self._search.unresolve(f"{place} of a graph that the code makes")
                return [owner], 0
        is_of_pool = name == "map" and bool(values)  # that of a Runnable takes nothing
        if name in _MAKERS and not is_of_pool:
            return [owner, *(value for value in values if not _is_tools(value))], 0
        calls = self._search.use_all([owner, *values])
        if isinstance(owner, Known) and isinstance(owner.value, type):
            return [Made(owner.value)], calls
        return [_made_by(owner)], calls

    def _call_known(self, held: Any, arguments: Arguments, place: str) -> Called:
        """An object that exists is called."""
        if isinstance(held, types.FunctionType):
            return self._call_function(held, arguments)
        if isinstance(held, types.MethodType):
            return self.call(Bound(held.__func__, Known(held.__self__)), arguments, place)
        if isinstance(held, functools.partial):
            words: dict[str, list[Value]] = {n: [Known(v)] for n, v in held.keywords.items()}
            words |= arguments.words
            places = arguments.behind([[Known(value)] for value in held.args]).places
            return self._call_known(held.func, Arguments(places, words), place)
        wrapped = wrapped_function(held)
        if wrapped is not None:
            return self._call_known(wrapped, arguments, place)
        if isinstance(held, type):
            return self._call_class(held, arguments)
        if isinstance(held, types.BuiltinFunctionType):
            return self._call_builtin(held, arguments, place)
        methods, _ = self._search.members.attribute(Known(held), "__call__")
        if methods and isinstance(methods[0], Bound):
            return self.call(methods[0], arguments, place)
        calls = self._search.use_all([Known(held), *arguments.values])
        is_open = libraries.is_followed(type(held).__module__) or held is None
        if is_open:
            self._search.unresolve(place)
        return [DATA if is_open else PLAIN], calls

    def _call_builtin(self, held: Any, arguments: Arguments, place: str) -> Called:
        """A function that is not written in Python."""
        if held is getattr and len(arguments.places) > 1:
            return self._call_getattr(arguments.places)
        if any(held is looked for looked in _LOOKED_AT):
            return [PLAIN], 0
        calls = self._search.use_all(arguments.values)
        if any(held is open_ for open_ in (eval, exec, __import__)):
            self._search.unresolve(place)
            return [DATA], calls
        keeps = held in (next, iter, sorted, max, min)
        return (self._all_items(arguments.places) if keeps else [PLAIN]), calls

    def _all_items(self, places: list[list[Value]]) -> list[Value]:
        item = self._search.members.item
        return [v for values in places for value in values for v in (*item(value, None), value)]

    def _call_getattr(self, places: list[list[Value]]) -> Called:
        results = [v for values in places[2:] for v in values]
        for name in places[1]:
            for owner in places[0]:
                if isinstance(name, Known) and isinstance(name.value, str):
                    results += self._search.members.attribute(owner, name.value)[0]
                else:
                    self._search.use(owner)
                    results.append(DATA)
        return results, 0

    def _call_class(self, kind: type, arguments: Arguments) -> Called:
        self._search.note_class(kind)
        places = arguments.places
        if kind in (map, filter):
            return self._mapped(places)
        if kind in (list, tuple, set, frozenset, dict, enumerate, zip, reversed):
            return [collection([*self._all_items(places), *arguments.values])], 0
        if kind in _LOOKED_AT or kind.__module__ == "builtins":
            return [PLAIN], 0
        if issubclass(kind, functools.partial) and places:
            rest = Arguments(places[1:], arguments.words)
            return list(places[0]), self._search.use_all(rest.values)
        if libraries.is_provider(kind.__module__) or issubclass(kind, BaseChatModel):
            return [Made(kind)], 0
        if libraries.is_langchain(kind.__module__):
            return [Made(kind)], self._search.use_all(arguments.values)
        if not libraries.is_followed(kind.__module__):
            return [PLAIN], self._search.use_all(arguments.values)
        return self._make(kind, arguments)

    def _make(self, kind: type, arguments: Arguments) -> Called:
        """An object of a class whose code is followed."""
        attributes = {name: list(values) for name, values in arguments.words.items()}
        made = Made(kind, attributes)
        maker = inspect.getattr_static(kind, "__init__", None)
        if isinstance(maker, types.FunctionType) and libraries.is_followed(module_of(maker)):
            _, calls = self.call(Bound(maker, made), arguments, f"{kind.__name__}()")
            return [made], calls
        names = list(inspect.get_annotations(kind))  # a dataclass, a named tuple
        for name, values in zip(names, arguments.places, strict=False):
            attributes[name] = list(values)
        return [made], 0

    def _mapped(self, places: list[list[Value]]) -> Called:
        results, total = [], 0
        for function in places[0] if places else ():
            items = [self._all_items([values]) for values in places[1:]]
            values, calls = self.call(function, Arguments(items), "map")
            results += values
            total = 2 if calls or total else 0
        return [collection(results)], total

    def _call_function(self, function: types.FunctionType, arguments: Arguments) -> Called:
        module = module_of(function)
        if function not in self._search.functions:
            self._search.functions.append(function)
        if libraries.is_followed(module):
            return self._search.code.follow(function, arguments)
        if libraries.is_provider(module):
            self._search.clients.add(f"{libraries.package(module)}.{function.__name__}")
            return [PLAIN], 0
        if not libraries.is_langchain(module):
            return self._call_other(function, arguments.values)
        return self._call_langchain(function, arguments)

    def _call_langchain(self, function: types.FunctionType, arguments: Arguments) -> Called:
        """A function of LangChain: it may call whatever it was handed, now or when it was made."""
        if function.__name__ in _MODEL_MAKERS:
            return [Made(BaseChatModel)], 0
        if function.__name__ in _GRAPH_MAKERS:
            names = [v.value for v in arguments.words.get("name", ()) if isinstance(v, Known)]
            name = inner_path("", graph=str(names[0] or "") if names else "")
            return [NewGraph(name.removeprefix("/"))], 0
        held = held_by(function)
        places = arguments.places
        if not held and places and places[0]:
            match places[0][0]:
                case Known(type() as kind):  # a class method that makes an object
                    rest = Arguments(places[1:])
                    return [Made(kind)], self._search.use_all(rest.values)
        calls = self._search.use_all(arguments.values)
        calls += sum([self._search.touch(part) for part in held])
        return [DATA], min(2, calls)

    def _call_other(self, function: types.FunctionType, values: list[Value]) -> Called:
        """A function of Python's own library, or of one that knows no chat models."""
        module, name = module_of(function), function.__name__
        if module == "importlib" and name == "import_module":
            names = [v.value for v in values if isinstance(v, Known)]
            known = [Known(sys.modules[n]) for n in names if n in sys.modules]
            return [*known, *([] if known else [DATA])], 0
        calls = self._search.use_all(values)
        wrapped = getattr(function, "__wrapped__", None)
        held = [*([] if wrapped is None else [wrapped]), *cell_values(function).values()]
        results: list[Value] = []
        for part in held:
            if isinstance(part, types.FunctionType) and libraries.is_followed(module_of(part)):
                inner, often = self.call(Known(part), Arguments([[v] for v in values]), name)
                results += inner  # `contextmanager`, `wraps` and their like
                calls += often
            else:
                calls += self._search.touch(part)
        if name in _PASSING_ON:
            results += values
        return results or [PLAIN], min(2, calls)


def _made_by(owner: Value) -> Value:
    """What a method gives whose code is not followed."""
    held = owner.value if isinstance(owner, Known) else getattr(owner, "kind", None)
    module = held.__module__ if isinstance(held, type) else type(held).__module__
    if libraries.is_followed(module):
        return DATA
    return PLAIN


def _is_tools(value: Value) -> bool:
    """Whether a value is a tool, or tools: binding them to a model does not run them."""
    match value:
        case Known(held):
            parts = held if isinstance(held, list | tuple) else [held]
            return bool(parts) and all(
                isinstance(part, BaseTool | types.FunctionType | type | dict) for part in parts
            )
        case Items(values):
            return all(_is_tools(inner) for inner in values)
        case Closure():
            return True
    return False
