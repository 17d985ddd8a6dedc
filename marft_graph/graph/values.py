"""What an expression in a node's code can stand for, as far as it shows without a run."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marft_graph.graph.evaluate import Frame


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """An object that exists already, such as a global or what a closure holds."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """An instance that the code makes of a class."""

    kind: type
    attributes: dict[str, list[Value]] = field(default_factory=dict)
    """What its methods assign to `self`."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A function with the object that it is a method of."""

    function: Any
    owner: Value


@dataclass(frozen=True, slots=True)
class Method:
    """A method, by name, of an object whose code is not followed, such as a model's `invoke`."""

    owner: Value
    name: str


@dataclass(frozen=True, slots=True)
class Items:
    """A list, dict or iterator of values; made by `collection`."""

    values: tuple[Value, ...]
    depth: int = 1
    """How many collections are in each other."""


@dataclass(frozen=True, slots=True)
class Closure:
    """A function that is defined inside the code."""

    tree: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    frame: Frame


@dataclass(frozen=True, slots=True)
class NewGraph:
    """A graph that the code makes, such as by `create_agent`; its name, if it gets one."""

    name: str = ""


@dataclass(frozen=True, slots=True)
class Parent:
    """What `super()` stands for."""

    owner: Value
    kind: type


@dataclass(frozen=True, slots=True)
class Plain:
    """A value whose methods call no chat model: texts, numbers, what other libraries make."""


@dataclass(frozen=True, slots=True)
class Data:
    """What a function was given and nothing is known of: the state, the config."""


Value = Known | Made | Bound | Method | Items | Closure | NewGraph | Parent | Plain | Data
PLAIN, DATA = Plain(), Data()
Called = tuple[list[Value], int]
"""What a call gives, and how often it may ask a model: 0, 1, or 2 for more."""

_MOST, _DEEPEST, _PLACES = 40, 3, 20


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the arguments of a call stand for."""

    places: list[list[Value]] = field(default_factory=list)
    """By place."""
    words: Mapping[str, list[Value]] = field(default_factory=dict)
    """By name."""
    are_known: bool = True
    """False where something else makes the call, with arguments that the code does not show."""

    @property
    def values(self) -> list[Value]:
        """All of them."""
        return [v for values in (*self.places, *self.words.values()) for v in values]

    def behind(self, first: list[list[Value]]) -> Arguments:
        """These arguments behind others, such as the object that a method belongs to."""
        places = self.places if self.are_known else [[DATA]] * _PLACES
        return replace(self, places=[*first, *places])


UNKNOWN = Arguments(are_known=False)


def collection(values: Iterable[Value]) -> Items:
    """Values as a collection; what is nested deeply counts as if it were not."""
    parts: dict[Value, None] = {}
    for value in values:
        if isinstance(value, Items) and value.depth >= _DEEPEST:
            parts.update(dict.fromkeys(value.values))
        else:
            parts[value] = None
    kept = tuple(parts)[:_MOST]
    return Items(kept, 1 + max((v.depth for v in kept if isinstance(v, Items)), default=0))


def parent(kinds: list[Value], owners: list[Value]) -> list[Value]:
    """What `super()` stands for in a method."""
    classes = [k.value for k in kinds if isinstance(k, Known) and isinstance(k.value, type)]
    return [Parent(owner, kind) for kind in classes for owner in owners]
