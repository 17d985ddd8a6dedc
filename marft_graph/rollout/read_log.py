"""What was noted of the tasks of one run: which channels each read and when, and who sent what."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from langgraph.types import Command, Send

from marft_graph.rollout.views import Note

_DEPTH = 4


@dataclasses.dataclass(slots=True)
class TaskReads:
    """What one task was seen to do with the state that it was given."""

    is_seen: bool = False
    """Whether it was given a view; if not, all that it was given counts as read."""
    is_graph: bool = False
    """Whether the node is a graph itself, which is handed channels by name."""
    channels: dict[str, int] = dataclasses.field(default_factory=dict)
    """Channels that it has read, each with the first moment on the episode's clock."""
    copied: dict[str, int] = dataclasses.field(default_factory=dict)
    """The same of those that went into a copy of the whole state, which may or may not be used."""
    routed: dict[str, int] = dataclasses.field(default_factory=dict)
    """The same of its conditional edges, which see the state after the task's writes."""
    fetched: dict[str, int] = dataclasses.field(default_factory=dict)
    """Channels that prebuilt tool nodes read past their input."""
    is_routed_unseen: bool = False
    """Whether a conditional edge got no view."""
    routed_at: int | None = None
    """When its conditional edges began."""


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """What a graph was started with."""

    keys: frozenset[str]
    """Channels that its input fills."""
    is_state: bool
    """Whether the input was the state of the task around it, unchanged."""
    moment: int
    """When it was started."""
    text: str
    """All texts of the input."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sender:
    """Which task made a `Send`."""

    arg: Any
    """What was sent: kept, so that its id stays its own."""
    task: str
    by_branch: bool


class ReadLog:
    """What all tasks of one run were seen to read.

    Args:
        clock: the run's clock; calls of models are counted on the same one.
    """

    def __init__(self, clock: Iterator[int] | None = None) -> None:
        self.tasks: dict[str, TaskReads] = {}
        """By the task's id."""
        self.reducers: dict[str, frozenset[str]] = {}
        """Channels that collect their writers, by the namespace of the graph's run."""
        self.starts: dict[str, Start] = {}
        """By the namespace of the graph's run."""
        self._clock = itertools.count() if clock is None else clock
        self._senders: dict[int, Sender] = {}

    def sender(self, arg: Any) -> Sender | None:
        """Who sent a payload."""
        found = self._senders.get(id(arg))
        return found if found is not None and found.arg is arg else None

    def tick(self) -> int:
        """The present moment."""
        return next(self._clock)

    def noting(self, into: dict[str, int], copied: dict[str, int] | None = None) -> Note:
        """A function that notes the first moment of each read."""

        def note(channel: str, is_copied: bool = False) -> None:
            names = copied if is_copied and copied is not None else into
            if channel not in names:
                names[channel] = next(self._clock)

        return note

    def sent(self, task: str, value: Any, *, by_branch: bool) -> None:
        """Note the task behind each `Send` in a value."""
        for send in _sends(value):
            self._senders.setdefault(id(send.arg), Sender(send.arg, task, by_branch))


def _sends(value: Any, depth: int = _DEPTH) -> Iterator[Send]:
    if isinstance(value, Send):
        yield value
    elif isinstance(value, Command) and depth:
        yield from _sends(value.goto, depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for item in value:
            yield from _sends(item, depth - 1)
