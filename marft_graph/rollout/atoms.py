"""Objects that say themselves where they come from.

What a task writes is taken to come from its last calls. But a task that passes on the very object
that it was given (`return {**state, ...}`), or that a graph inside it made
(`{"messages": [result["messages"][-1]]}`), or that sends one item of a list, handed on that object
and nothing else. Objects are known by identity: texts, messages and items of lists, never small
constants.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

Calls = frozenset[int]
_NONE: Calls = frozenset()
_MOST_ITEMS = 10_000
_HANDED_BACK = "__is_handoff_back"
"""Set in their metadata by langgraph-supervisor."""


@dataclass(frozen=True, slots=True)
class Atom:
    """An object that a channel holds, whole or as an item of a list."""

    value: Any
    """Kept, so that its id stays its own."""
    calls: Calls
    """The calls that it was made by."""
    run: int
    """Number of the graph run that wrote it."""
    channel: str


class Atoms:
    """The objects that the channels of an episode's graph runs have held."""

    def __init__(self) -> None:
        self._known: dict[int, Atom] = {}

    def add(
        self, value: Any, calls: Calls, run: int, channel: str, answers: Collection[str] = ()
    ) -> None:
        """Note what was written to a channel.

        What is known already keeps its origin, unless it is one of the writer's own `answers`: a
        scripted engine may give the same object twice.
        """
        for part in parts(value):
            if id(part) not in self._known or text_of(part) in answers:
                self._known[id(part)] = Atom(part, calls, run, channel)

    def of(self, value: Any) -> Atom | None:
        """The atom that an object is."""
        return self._known.get(id(value))


def parts(value: Any) -> Iterator[Any]:
    """The objects in a value that can be known again: itself, its items, what messages hold."""
    if _is_own(value):
        yield value
    if isinstance(value, BaseMessage):
        if _is_own(value.content):
            yield value.content
        if isinstance(value, AIMessage):
            yield from value.tool_calls
    elif isinstance(value, list | tuple) and len(value) < _MOST_ITEMS:
        for item in value:
            if not isinstance(item, list | tuple):
                yield from parts(item)


def _is_own(value: Any) -> bool:
    """Whether an object is no constant that others may hold as well."""
    if isinstance(value, str | bytes):
        return len(value) > 1
    return value is not None and not isinstance(value, bool | int | float | list | tuple)


def text_of(value: Any) -> Any:
    """The text of a message, or a text itself; None of anything else."""
    text = value.content if isinstance(value, BaseMessage) else value
    return text if isinstance(text, str) else None


def is_lasting(value: Any) -> bool:
    """Whether an object stays what it is, so that to have it is to know what is in it."""
    return isinstance(value, str | bytes | BaseMessage)


def is_constant(value: Any) -> bool:
    """Whether it is a message that a package's hand-over writes by itself."""
    return isinstance(value, BaseMessage) and bool(value.response_metadata.get(_HANDED_BACK))
