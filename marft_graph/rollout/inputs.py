"""From a data set's examples to what the app is called with: input, context, config and store.

Everything is made for each episode by itself, of a copy of its example.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from langgraph.store.base import BaseStore
from pydantic import BaseModel

from marft_graph.data import rows_of_table
from marft_graph.errors import ConfigError, DatasetError
from marft_graph.rollout.copies import copy_or_same, own_copy
from marft_graph.rollout.rewards import shown
from marft_graph.rollout.scopes import outside_runs

App = Pregel[Any, Any, Any, Any]
InputFunction = Callable[[Mapping[str, Any]], Any] | Sequence[str]
"""The graph's input for an example: a function, or a list of the example's keys that are given."""
Reviewer = Callable[[Mapping[str, Any], Any, Any], Any]
"""`reviewer(example, state, interrupt)`, sync or async: what the interrupted node gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppInputs:
    """What the app is called with, each a value for all episodes or a function of the example."""

    inputs: InputFunction | None = None
    """The graph's input, or the keys of the example that it is; None: those that it has."""
    context: Any = None
    """What nodes find as `runtime.context`; None: the graph's `context_schema` with its defaults,
    where all its fields have one."""
    configurable: Any = None
    """Values of `config["configurable"]`: a mapping, or a function of the example."""
    store: Any = None
    """What the episode's store holds at its beginning: by namespace, dicts of keys to values, or a
    store, which is copied; None: what the app's own store in memory holds."""
    on_interrupt: Reviewer | None = None
    """Answers the app's interrupts; None: an episode that is interrupted fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppCall:
    """What one episode calls the app with; nothing in it belongs to another episode."""

    value: Any
    context: Any = None
    configurable: Mapping[str, Any] = field(default_factory=dict)
    store: BaseStore | Mapping[Any, Mapping[str, Any]] | None = None


def listed_examples(
    graph: App,
    examples: Iterable[Mapping[str, Any]],
    given: AppInputs,
    *,
    withheld: frozenset[str] = frozenset(),
) -> list[Mapping[str, Any]]:
    """The examples as a list, once it is certain that the graph can be called with them.

    Functions of the example are tried on the first one.

    Raises:
        DatasetError: there is no example, one is no mapping or has none of the graph's keys, or a
            function of the example raised.
        ConfigError: something that the app is to be called with is of the wrong kind.
    """
    listed = list(rows_of_table(examples, "the data set"))
    if not listed:
        raise DatasetError("the data set is empty; at least one example is needed")
    for example in listed:
        if not isinstance(example, Mapping):
            raise DatasetError(
                f"an example is {reprlib.repr(example)}, a {type(example).__name__}; each must be "
                "a mapping such as {'question': ..., 'answer': ...}"
            )
    if given.inputs is None:
        for example in listed:
            _selected(graph, example, withheld)
    if given.on_interrupt is not None and not callable(given.on_interrupt):
        raise ConfigError(
            f"on_interrupt is {reprlib.repr(given.on_interrupt)}; it must be a function "
            "`reviewer(example, state, interrupt)`"
        )
    app_call(graph, listed[0], given, withheld=withheld)
    return listed


def app_call(
    graph: App,
    example: Mapping[str, Any],
    given: AppInputs,
    *,
    withheld: frozenset[str] = frozenset(),
) -> AppCall:
    """What an episode of an example calls the app with; every part of it is the episode's own.

    Without `inputs`, the example's keys that the graph's input has are handed over, all but those
    in `withheld`.

    Raises:
        DatasetError, ConfigError: as in `listed_examples`.
    """
    with outside_runs():  # a function of the example may ask models
        if given.inputs is None:
            value = _selected(graph, own_copy(example), withheld)
        else:
            make = given.inputs
            if not callable(make):
                make = _chosen(make, input_keys(graph))
            value = copy_or_same(_asked("inputs", make, own_copy(example)))
        return AppCall(
            value=value,
            context=_context(graph, given.context, example),
            configurable=_configurable(_part("configurable", given.configurable, example)),
            store=_store(_part("store", given.store, example)),
        )


def _part(name: str, value: Any, example: Mapping[str, Any]) -> Any:
    """A value, or what a function makes of the example, as the episode's own."""
    if isinstance(value, type):
        raise ConfigError(
            f"{name} is the class {value.__name__}; give a value such as {value.__name__}(...), or "
            "a function of the example that returns one"
        )
    is_function = callable(value) and not isinstance(value, BaseStore)
    if is_function and not _is_instance_of_data(value):
        value = _asked(name, value, own_copy(example))
    return value if isinstance(value, BaseStore) else copy_or_same(value)


def _is_instance_of_data(value: Any) -> bool:
    return isinstance(value, BaseModel) or dataclasses.is_dataclass(value)


def _context(graph: App, value: Any, example: Mapping[str, Any]) -> Any:
    schema = graph.context_schema
    made = _part("context", value, example)
    if made is not None or not isinstance(schema, type):
        return made
    if dataclasses.is_dataclass(schema):
        needed = [
            spec.name
            for spec in dataclasses.fields(schema)
            if spec.init
            and spec.default is dataclasses.MISSING
            and spec.default_factory is dataclasses.MISSING
        ]
    elif issubclass(schema, BaseModel):
        needed = [name for name, spec in schema.model_fields.items() if spec.is_required()]
    else:
        return None
    return None if needed else schema()


def context_hint(graph: App, context: Any) -> str:
    """What to say of an error that may come from a context that nobody gave; empty elsewhere."""
    if graph.context_schema is None or context is not None:
        return ""
    name = getattr(graph.context_schema, "__name__", "context_schema")
    return (
        f". The graph has a context_schema, {name}, and no context was given: give `context=`, a "
        "value or a function of the example"
    )


def _configurable(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if isinstance(value, Mapping) and set(value) == {"configurable"}:
        value = value["configurable"]
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"configurable is {reprlib.repr(value)}, a {type(value).__name__}; it must be a "
            "mapping of names to values, or a function of the example that returns one"
        )
    return value


def _store(value: Any) -> BaseStore | Mapping[Any, Mapping[str, Any]] | None:
    if value is None or isinstance(value, BaseStore):
        return value
    is_right = isinstance(value, Mapping) and all(
        isinstance(items, Mapping) and all(isinstance(item, dict) for item in items.values())
        for items in value.values()
    )
    if not is_right:
        raise ConfigError(
            f"store is {reprlib.repr(value)}; it must be contents by namespace, such as "
            '{("memories", "ada"): {"diet": {"text": "vegan"}}}, a store, or a function of the '
            "example that returns one of them"
        )
    contents: Mapping[Any, Mapping[str, Any]] = value
    return contents


def input_keys(graph: App) -> frozenset[str]:
    """Keys that a graph's input may have; LangGraph demands none of them."""
    if isinstance(graph, CompiledStateGraph):
        builder = graph.builder
        return frozenset(builder.schemas[builder.input_schema]) - {"__root__"}
    channels = graph.input_channels
    return frozenset() if isinstance(channels, str) else frozenset(channels)


def _selected(graph: App, example: Mapping[str, Any], withheld: frozenset[str]) -> Any:
    """The example's keys that the graph's input has."""
    known = input_keys(graph)
    if known and not known - withheld:
        raise DatasetError(
            f"the graph's input has {', '.join(map(repr, sorted(known)))} only, which the reward "
            "names and a node writes, as with labels; give `inputs=`, a list of keys or a function "
            "from example to input"
        )
    known -= withheld
    if not known:  # the graph takes one value without keys
        return example
    given = {key: value for key, value in example.items() if key in known}
    if given:
        return given
    keys = ", ".join(map(repr, example)) or "none"
    names = [key for key in example if isinstance(key, str)]
    pairs = [
        f"{close[0]!r} looks like {name!r}"
        for name in sorted(known)
        if (close := difflib.get_close_matches(name, names, n=1, cutoff=0.5))
    ]
    raise DatasetError(
        f"an example has the keys {keys}; the graph's input has "
        f"{', '.join(map(repr, sorted(known)))}"
        + (f" ({'; '.join(pairs)})" if pairs else "")
        + ". Rename the data set's columns, or give `inputs=`, a list of keys or a function from "
        "example to input"
    )


def _chosen(keys: Sequence[str], known: frozenset[str]) -> Callable[[Mapping[str, Any]], Any]:
    """The function that hands over exactly some keys.

    Raises:
        DatasetError: it is no list of keys that the graph's input has.
    """
    is_list = isinstance(keys, Sequence) and not isinstance(keys, str | bytes)
    if not is_list or not keys or not all(isinstance(key, str) for key in keys):
        raise DatasetError(
            f"inputs is {reprlib.repr(keys)}; it must be a function from example to input, or a "
            "list of the example's keys that the graph is given, such as ['question']"
        )
    if known and (strange := [key for key in keys if key not in known]):
        raise DatasetError(
            f"inputs names {', '.join(map(repr, strange))}; the graph's input has "
            f"{', '.join(map(repr, sorted(known)))}"
        )
    return lambda example: {key: example[key] for key in keys}


def _asked(name: str, function: Callable[..., Any], example: Mapping[str, Any]) -> Any:
    """What a function of the user's makes of an example."""
    try:
        return function(example)
    except Exception as error:
        raise DatasetError(
            f"`{name}` raised {type(error).__name__}: {error}, on example {shown(example)}"
        ) from error
