"""The tasks and graph runs of an episode while its events are replayed, and what comes from where.

`Task` and `Run` hold what is known of one task and of one run of a graph; the `Ledger` knows the
episode's calls and the objects that went through its channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import BaseMessage

from marft_graph.rollout.atoms import Atom, Atoms, is_constant, is_lasting, parts, text_of
from marft_graph.rollout.read_log import TaskReads
from marft_graph.rollout.shape import GraphShape
from marft_graph.rollout.verbatim import (
    LEAST,
    as_text,
    leaves,
    quotes,
    shows,
    texts_of_answer,
)
from marft_graph.rollout.views import fields_of

Calls = frozenset[int]
_NONE: Calls = frozenset()


@dataclass(frozen=True, slots=True)
class CallMark:
    """What the tracer needs to know of a call.

    `begun` and `ended` count on one clock of the episode; `key` sorts calls that do not depend on
    each other, and must not depend on timing; `attempts` are namespaces and attempt numbers of the
    tasks around the call; `prompt` and `answer` are what it was asked and the text that
    it was answered with.
    """

    namespace: str
    begun: int
    ended: int
    key: tuple[Any, ...] = ()
    attempts: tuple[tuple[str, int], ...] = ()
    answer: str = ""
    prompt: Sequence[BaseMessage] = ()


@dataclass(slots=True)
class Task:
    """One task: a node's run in one superstep."""

    name: str
    run: Run
    known: Calls
    """What its input depends on."""
    reads: Mapping[str, Calls]
    """The same by channel, of what it was given."""
    held: Mapping[str, Calls]
    """The same of all channels, where it asked for them itself."""
    given: Any
    """What it was given."""
    is_sent: bool
    """Whether a `Send` started it."""
    seen: TaskReads
    """What it did read."""
    calls: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    subtasks: list[Task] = field(default_factory=list)
    """Tasks of the functional API that its code called."""
    parts: dict[int, str] | None = None
    """The channel of each object in what it was given, by the object's id, once asked for."""
    seen_by_branches: Calls | None = None
    """What its conditional edges had read when it was over; None: not known."""
    is_over: bool = False
    failed: Task | None = None
    """Of an error handler the task that failed."""

    def input_at(self, moment: float, ledger: Ledger, text: str | None = None) -> Calls:
        """What it had read by a moment; with a text, of copied states and lists what it shows."""
        seen, known = self.seen, self.known
        if seen.is_seen:
            channels = [c for c, at in seen.channels.items() if at < moment]
            known = _NONE.union(*(ledger.quoted_of(self, c, text) for c in channels))
            copied = [c for c, at in seen.copied.items() if at < moment]
            known = known.union(*(ledger.shown_of(self, c, text) for c in copied))
        return known.union(
            *(self.held.get(c, _NONE) for c, at in seen.fetched.items() if at < moment)
        )

    def known_at(self, moment: float, ledger: Ledger, text: str | None = None) -> Calls:
        """The input, and what the task's own calls and graph runs had answered by a moment."""
        earlier = {call for call in self.calls if ledger.calls[call].ended < moment}
        for run in self.runs:
            if run.last_moment(ledger) < moment:
                earlier |= run.everything()
        if self.failed is not None and text is not None:  # the error may tell what was answered
            failed = self.failed.all_calls()
            earlier |= {call for call in failed if ledger.is_quoted(call, text)}
        earlier |= self._results(moment, ledger, text)
        return self.input_at(moment, ledger, text) | earlier

    def _results(self, moment: float, ledger: Ledger, text: str | None = None) -> Calls:
        """What the results of its subtasks depend on.

        One that went into another stands for it, unless a text shows both.
        """
        over = [task for task in self.subtasks if task.last_moment(ledger) < moment]
        inside = [call for task in over for call in task.all_calls()]
        used = _NONE.union(*(ledger.parents.get(call, _NONE) for call in inside))
        results = _NONE.union(*(task.output(ledger) for task in over))
        if text is not None:
            used = frozenset(call for call in used if not ledger.is_quoted(call, text))
        return results - used

    def last_moment(self, ledger: Ledger) -> int:
        """When the last call that its result depends on ended."""
        calls = [*self.known, *self.all_calls()]
        return max((ledger.calls[call].ended for call in calls), default=-1)

    def output(self, ledger: Ledger) -> Calls:
        """What the task's writes depend on: its last calls, or its input where it made none."""
        calls = [call for call in self.calls if not self.is_router(call, ledger)]
        inside = [*calls, *self._nested_calls()]
        if not inside:
            return self.input_at(math.inf, ledger) | self._results(math.inf, ledger)
        used = _NONE.union(*(ledger.parents.get(call, _NONE) for call in inside))
        output = frozenset(calls) - used
        for run in self.runs:
            end = run.last_moment(ledger)
            if not any(end < ledger.calls[call].begun for call in calls):
                output |= run.everything()
        for task in self.subtasks:
            end = task.last_moment(ledger)
            if not any(end < ledger.calls[call].begun for call in calls):
                output |= task.output(ledger) - used
        return output

    def has_read(self, channel: str) -> bool:
        """Whether it read a channel at all."""
        seen = self.seen
        return not seen.is_seen or channel in seen.channels or channel in seen.copied

    def is_router(self, call: int, ledger: Ledger) -> bool:
        """Whether a call was made by a conditional edge, after what the task wrote."""
        routed_at = self.seen.routed_at
        return routed_at is not None and routed_at < ledger.calls[call].begun

    def output_of(self, channel: str, ledger: Ledger, value: Any = None) -> Calls:
        """The same for one channel: a node that is a graph hands its channels over by name."""
        if self.runs and self.is_graph:
            left = [task for task in self.runs[-1].tasks if not task.is_over]  # Command(PARENT)
            return self.runs[-1].of_channel(channel).union(*(t.output(ledger) for t in left))
        passed_on = ledger.passed_on(self, value)
        if passed_on is not None:
            return passed_on
        if not any(not self.is_router(call, ledger) for call in self.calls):
            return self.output(ledger)
        return self.output(ledger) | ledger.kept_in(self, value)

    @property
    def is_graph(self) -> bool:
        """Whether the node is a graph itself."""
        shape = self.run.shape
        return self.seen.is_graph or (shape is not None and self.name in shape.subgraphs)

    def all_calls(self) -> list[int]:
        """The task's calls and those of the graphs and subtasks that it ran."""
        return self.calls + self._nested_calls()

    def _nested_calls(self) -> list[int]:
        subtasks = [call for task in self.subtasks for call in task.all_calls()]
        return [call for run in self.runs for call in run.calls()] + subtasks


@dataclass(slots=True)
class Run:
    """One run of a graph: its channels' provenance, superstep by superstep."""

    parent: Task | None
    shape: GraphShape | None
    """None for a graph that a node invokes by itself, whose shape is not known."""
    entry: Calls
    """What the run's input depends on."""
    reducers: frozenset[str] | None = None
    """Channels that collect their writers; None where they are not known."""
    initial: Mapping[str, Calls] | None = None
    """What the channels depend on that its input fills; None where these are not known."""
    number: int = 0
    """Its place among the episode's runs."""
    provenance: dict[str, Calls] = field(default_factory=dict)
    current: list[Task] = field(default_factory=list)
    previous: list[Task] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    written: list[tuple[Task, Mapping[str, Any]]] = field(default_factory=list)
    values: Mapping[str, Any] = field(default_factory=dict)

    def of_channel(self, channel: str) -> Calls:
        """What a channel depends on."""
        if channel in self.provenance:
            return self.provenance[channel]
        return self.entry if self.initial is None else self.initial.get(channel, _NONE)

    def is_inside(self, task: Task) -> bool:
        """Whether a task started it, or a graph inside the task did."""
        parent = self.parent
        while parent is not None and parent is not task:
            parent = parent.run.parent
        return parent is task

    def everything(self) -> Calls:
        """What the run's result depends on."""
        return _NONE.union(*self.provenance.values()) if self.provenance else self.entry

    def calls(self) -> list[int]:
        """The calls that were made inside the run."""
        return [call for task in self.tasks for call in task.all_calls()]

    def last_moment(self, ledger: Ledger) -> int:
        """When the last call inside the run ended."""
        return max((ledger.calls[call].ended for call in self.calls()), default=-1)

    def collects(self, channel: str, value: Any) -> bool:
        """Whether a channel keeps what it held when `value` was written."""
        if self.reducers is not None:
            return channel in self.reducers
        # A plain channel holds the very object that was written; a reducer makes a new one.
        return channel in self.values and self.values[channel] is not value


class Ledger:
    """The calls of an episode, their parents as far as known, and where objects come from."""

    def __init__(self, calls: Sequence[CallMark]) -> None:
        self.calls = calls
        self.parents: dict[int, Calls] = {}
        self.runs: list[Run] = []
        """All runs of graphs, by number."""
        self._atoms = Atoms()

    def enter(self, run: Run) -> Run:
        """Give a run its number."""
        run.number = len(self.runs)
        self.runs.append(run)
        return run

    def note_write(self, task: Task, channel: str, value: Any, made: Calls) -> None:
        """Note the objects in what a task wrote to a channel."""
        self._atoms.add(value, made, task.run.number, channel, self._answers(task))

    def passed_on(self, task: Task, value: Any) -> Calls | None:
        """What a value depends on that a task wrote as it got it; None where it may be new."""
        return self.made_of(task, value, is_sent=False)

    def shown_of(self, task: Task, channel: str, text: str | None) -> Calls:
        """What those parts of a channel depend on that a text shows; all without a text."""
        parts = [*leaves(self._value_given(task, channel))]
        if text is None or not parts:
            return task.reads.get(channel, _NONE)
        shown = [part for part, leaf in parts if shows(text, leaf)]
        return _NONE.union(*(self._origin(task, channel, part) for part in shown))

    def quoted_of(self, task: Task, channel: str, text: str | None) -> Calls:
        """What a channel depends on that a task read; of a list the items that a text quotes."""
        known = task.reads.get(channel, _NONE)
        return self.quoted(known, self._value_given(task, channel), text)

    def quoted(self, known: Calls, value: Any, text: str | None) -> Calls:
        """Of the calls that a value depends on those behind the items that a text quotes.

        All of them without a text, where the value is no collection, and where the text quotes
        none of its items: it was then made from them in another way.
        """
        items = value.values() if isinstance(value, Mapping) else value
        if text is None or len(known) < 2 or not isinstance(value, list | tuple | Mapping):
            return known
        shown, is_certain = _NONE, False
        for item in items:
            texts = [leaf for _, leaf in leaves(item) if leaf.strip()]
            if not texts or any(shows(text, leaf) for leaf in texts):
                shown |= self._behind(item, known, "\n".join(texts))
            is_certain = is_certain or any(quotes(text, leaf) for leaf in texts)
        return shown if is_certain else known

    def is_quoted(self, call: int, text: str) -> bool:
        """Whether a text quotes a call's answer, or part of one that is JSON."""
        return any(quotes(text, said) for said in texts_of_answer(self.calls[call].answer))

    def _behind(self, item: Any, known: Calls, text: str) -> Calls:
        """Of some calls those that an item of a list depends on."""
        atom = self._atoms.of(item)
        behind = atom.calls if atom is not None and atom.calls <= known else known
        if len(behind) < 2:
            return behind
        said = {call: texts_of_answer(self.calls[call].answer) for call in behind}
        quoted = {c for c, texts in said.items() if any(quotes(text, part) for part in texts)}
        return frozenset({*quoted, *(c for c in behind if not said[c])}) if quoted else behind

    def kept_in(self, task: Task, value: Any) -> Calls:
        """What texts depend on that a task read and wrote again beside its model's answer."""
        text, answers = as_text(value), self._answers(task)
        found = _NONE
        for channel, calls in task.reads.items():
            if not calls or not task.has_read(channel):
                continue
            for part, leaf in leaves(self._value_given(task, channel)):
                is_new = len(leaf) >= LEAST and not any(leaf in answer for answer in answers)
                if is_new and leaf in text:
                    found |= self._origin(task, channel, part)
        return found

    def _origin(self, task: Task, channel: str, part: Any) -> Calls:
        """What one part of a channel's value depends on."""
        atom, known = self._atoms.of(part), task.reads.get(channel, _NONE)
        return known if atom is None or not atom.calls <= known else atom.calls

    def _value_given(self, task: Task, channel: str) -> Any:
        given = task.given
        return given.get(channel) if isinstance(given, Mapping) else getattr(given, channel, None)

    def made_of(self, task: Task, value: Any, *, is_sent: bool) -> Calls | None:
        """What a value that a task wrote or sent is made of; None where it may be new."""
        if isinstance(value, list | tuple) and value:
            items = [self.made_of(task, item, is_sent=is_sent) for item in value]
            known = [item for item in items if item is not None]
            return _NONE.union(*known) if len(known) == len(items) else None
        if not is_sent and not is_lasting(value):
            return None
        if is_constant(value):
            return _NONE
        text = text_of(value)
        if text and text in self._answers(task):
            return self._answered(task, text)
        atom = self._atoms.of(value)
        if atom is None and isinstance(value, BaseMessage) and not getattr(value, "tool_calls", 0):
            atom = self._atoms.of(value.content)
        if atom is not None and self._had(task, atom, is_sent=is_sent):
            return atom.calls
        given = self._given(task, value, is_sent=is_sent)
        return self._answered(task, text) if given is None and text else given

    def _answered(self, task: Task, text: str) -> Calls | None:
        """The last call in a task, or in a graph that it ran, that was answered with a text."""
        calls = [c for c in task.all_calls() if self.calls[c].answer == text]
        calls = [call for call in calls if not task.is_router(call, self)]
        last = max(calls, key=lambda call: self.calls[call].ended, default=None)
        return None if last is None else frozenset({last})

    def _answers(self, task: Task) -> set[str]:
        """What a task's own calls were answered with."""
        return {self.calls[call].answer for call in task.calls}

    def _had(self, task: Task, atom: Atom, *, is_sent: bool) -> bool:
        """Whether a task got an object from its state or from a graph that it ran."""
        run = self.runs[atom.run]
        if run.is_inside(task):
            return True
        if run is not task.run:
            return False
        return is_sent or task.has_read(atom.channel)

    def _given(self, task: Task, value: Any, *, is_sent: bool) -> Calls | None:
        """What a value depends on that a task was given in its input, unchanged."""
        if task.parts is None:
            given = task.given
            names = given if isinstance(given, Mapping) else fields_of(given)
            task.parts = {
                id(part): name for name in names for part in parts(self._value_given(task, name))
            }
        channel = task.parts.get(id(value))
        is_routed = is_sent and channel in task.seen.routed
        if channel is None or not (is_routed or task.has_read(channel)):
            return None
        return self._origin(task, channel, value)
