"""From a data set's examples to what the graph takes as its input."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from marft_graph.data import rows_of_table
from marft_graph.errors import DatasetError
from marft_graph.rollout.rewards import shown

InputFunction = Callable[[Mapping[str, Any]], Any] | Sequence[str]
"""The graph's input for an example: a function, or a list of the example's keys that are given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppInputs:
    """How the app is called: what each part of a call is, or the function of an example for it."""

    inputs: InputFunction | None = None
    """The graph's input, or the keys of the example that it is; None: those that it has."""


def graph_inputs(
    graph: Pregel[Any, Any, Any, Any],
    examples: Iterable[Mapping[str, Any]],
    inputs: InputFunction | None = None,
    *,
    withheld: frozenset[str] = frozenset(),
) -> tuple[list[Mapping[str, Any]], list[Any]]:
    """The examples as a list, and the graph's input for each.

    Without `inputs`, an example's keys that the graph's input schema has are handed over, all but
    those in `withheld`.

    Raises:
        DatasetError: there is no example, or one is no mapping or lacks the graph's keys.
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
    known, required = input_keys(graph)
    if inputs is not None:
        make = inputs if callable(inputs) else _chosen(inputs, known)
        return listed, [_converted(make, example) for example in listed]
    if known and not known - withheld:
        raise DatasetError(
            f"the graph's input has {', '.join(map(repr, sorted(known)))} only, which the reward "
            "names and a node writes, as with labels; give `inputs=`, a list of keys or a function "
            "from example to input"
        )
    known -= withheld
    return listed, [_selected(example, known, required) for example in listed]


def input_keys(graph: Pregel[Any, Any, Any, Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Keys that a graph's input may have, and those that its input schema demands.

    A state class names everything the app ever stores, so it demands nothing; only a separate
    input schema does.
    """
    if isinstance(graph, CompiledStateGraph):
        builder = graph.builder
        known = frozenset(builder.schemas[builder.input_schema]) - {"__root__"}
        is_explicit = builder.input_schema is not builder.state_schema
        demanded = getattr(builder.input_schema, "__required_keys__", ()) if is_explicit else ()
        return known, frozenset(demanded) & known
    channels = graph.input_channels
    return frozenset() if isinstance(channels, str) else frozenset(channels), frozenset()


def _selected(example: Mapping[str, Any], known: frozenset[str], required: frozenset[str]) -> Any:
    if not known:  # the graph takes one value without keys
        return example
    given = {key: value for key, value in example.items() if key in known}
    if given and required <= given.keys():
        return given
    missing = sorted(required - given.keys()) or sorted(known)
    keys = ", ".join(map(repr, example)) or "none"
    names = [key for key in example if isinstance(key, str)]
    pairs = [
        f"{close[0]!r} looks like {name!r}"
        for name in missing
        if (close := difflib.get_close_matches(name, names, n=1, cutoff=0.5))
    ]
    raise DatasetError(
        f"an example has the keys {keys}; the graph's input has "
        f"{', '.join(map(repr, sorted(known)))}"
        + (f" and demands {', '.join(map(repr, sorted(required)))}" if required else "")
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


def _converted(inputs: Callable[[Mapping[str, Any]], Any], example: Mapping[str, Any]) -> Any:
    try:
        return inputs(example)
    except Exception as error:
        raise DatasetError(
            f"`inputs` raised {type(error).__name__}: {error}, on example {shown(example)}"
        ) from error
