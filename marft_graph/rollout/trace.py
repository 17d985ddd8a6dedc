"""Who depends on whom: an episode's `parents`, found afterwards from what the run itself reported.

Each graph run (a namespace of LangGraph's `tasks` stream) keeps for every channel its *provenance*:
the calls whose output the channel holds. A plain channel's provenance is replaced by its last
writer's, a reducer's collects all writers'. A call depends on the channels that its task had read
before it (`reads`; where that could not be seen, on all that the task was given) and on the task's
earlier calls. What a task writes comes from its last calls, or, where it made none, from what it
read; a value that it passes on as it is keeps its own. What was sent depends on what its sender
read; where the sender is not known, on all tasks of the superstep that may have sent it. Pure
functions of recorded events: nothing here runs anything.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import BaseMessage
from langgraph.pregel import Pregel

from marft_graph.graph.channels import branch_channels, collects
from marft_graph.graph.roles import inspect_node
from marft_graph.rollout.atoms import Atom, Atoms, is_constant, is_lasting, parts, text_of
from marft_graph.rollout.reads import ReadLog, Start, TaskReads
from marft_graph.rollout.verbatim import LEAST, as_text, leaves, shows
from marft_graph.rollout.views import fields_of

Calls = frozenset[int]
_NONE: Calls = frozenset()
_NOBODY: frozenset[str] = frozenset()
_SEND_TRIGGER = "__pregel_push"


@dataclass(frozen=True, slots=True)
class Event:
    """One item of `astream(..., stream_mode=["tasks", "values"], subgraphs=True)`."""

    namespace: tuple[str, ...]
    mode: str
    payload: Any


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


@dataclass(frozen=True, slots=True)
class Trace:
    """What an episode's events tell of its calls."""

    order: list[tuple[int, tuple[int, ...]]]
    """As `trace_parents` returns it."""
    inputs: Mapping[str, tuple[int, ...]]
    """Positions in `order` of the calls that a task's input depends on, by the task's namespace."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a compiled graph says of its channels and nodes."""

    reducers: frozenset[str]
    """Channels that collect their writers."""
    channels: Mapping[str, frozenset[str]]
    """Channels that each node is given."""
    targets: Mapping[str, frozenset[str] | None]
    """Nodes that a node may send to, None for any; absent where it cannot send."""
    branches: Mapping[str, frozenset[str]]
    """Channels that the branches of a node read; they also see all that the node has written."""
    subgraphs: Mapping[str, GraphShape]
    """Nodes that are graphs themselves."""

    @classmethod
    def of(cls, graph: Pregel[Any, Any, Any, Any]) -> GraphShape:
        """The shape of a compiled graph."""
        reducers = {name for name, channel in graph.channels.items() if collects(channel)}
        channels, subgraphs, read = {}, {}, {}
        targets: dict[str, frozenset[str] | None] = {}
        for name, node in graph.nodes.items():
            given = [node.channels] if isinstance(node.channels, str) else node.channels
            channels[name] = frozenset(given)
            if isinstance(node.bound, Pregel):
                subgraphs[name] = cls.of(node.bound)
            if "Send" in inspect_node(node.bound).mentions:
                targets[name] = None
        builder = getattr(graph, "builder", None)
        for name, branches in (builder.branches if builder is not None else {}).items():
            read[name] = frozenset().union(
                *(branch_channels(graph, name, branch) for branch in branches.values())
            )
            for branch in branches.values():
                found = inspect_node(branch.path)
                if "Send" in found.mentions or found.is_opaque:
                    known = targets.get(name, _NOBODY)
                    ends = frozenset((branch.ends or {}).values())
                    targets[name] = None if known is None or not ends else known | ends
        return cls(frozenset(reducers), channels, targets, read, subgraphs)


def trace_parents(
    events: Sequence[Event],
    calls: Sequence[CallMark],
    shape: GraphShape,
    attempts: Mapping[str, int] | None = None,
) -> list[tuple[int, tuple[int, ...]]]:
    """The calls that count, in topological order, each with its parents.

    Args:
        events: in the order in which the run reported them.
        calls: in any order.
        shape: of the graph that was run.
        attempts: how many attempts each task took, by namespace, where any was retried. Calls of an
            attempt that failed and was retried are left out.

    Returns:
        Pairs of a position in `calls` and the parents, which are positions in the returned list,
        ascending. Among calls that are free to go first, the smallest `key` does.
    """
    return trace_episode(events, calls, shape, attempts).order


def trace_episode(
    events: Sequence[Event],
    calls: Sequence[CallMark],
    shape: GraphShape,
    attempts: Mapping[str, int] | None = None,
    tasks: Iterable[str] = (),
    reads: ReadLog | None = None,
) -> Trace:
    """The same, and what the inputs of some tasks, given by their namespaces, depend on.

    Without `reads` a task counts as reading all that it was given.
    """
    last = attempts or {}
    kept = [index for index, call in enumerate(calls) if is_last_attempt(call.attempts, last)]
    tracer = _Tracer(calls, shape, ReadLog() if reads is None else reads)
    tracer.assign(kept, {event.payload["id"] for event in events if event.mode == "tasks"})
    for event in events:
        tracer.see(event)
    order = _in_order(kept, tracer.finished(), calls)
    position = {index: place for place, (index, _) in enumerate(order)}
    inputs = {
        namespace: tuple(sorted(position[index] for index in tracer.input_of(namespace)))
        for namespace in tasks
    }
    return Trace(order, inputs)


def is_last_attempt(attempts: Iterable[tuple[str, int]], last: Mapping[str, int]) -> bool:
    """Whether no task around something has begun again since.

    >>> is_last_attempt([("actor:1f-a", 1)], {"actor:1f-a": 2})
    False
    """
    return all(attempt >= last.get(namespace, 1) for namespace, attempt in attempts)


def _in_order(
    kept: Sequence[int], parents: Mapping[int, Calls], calls: Sequence[CallMark]
) -> list[tuple[int, tuple[int, ...]]]:
    children: dict[int, list[int]] = {index: [] for index in kept}
    missing = {index: len(parents[index]) for index in kept}
    for index in kept:
        for parent in parents[index]:
            children[parent].append(index)
    ready = [(calls[index].key, index) for index in kept if not missing[index]]
    heapq.heapify(ready)
    position: dict[int, int] = {}
    ordered: list[tuple[int, tuple[int, ...]]] = []
    while ready:
        _, index = heapq.heappop(ready)
        position[index] = len(ordered)
        ordered.append((index, tuple(sorted(position[p] for p in parents[index]))))
        for child in children[index]:
            missing[child] -= 1
            if not missing[child]:
                heapq.heappush(ready, (calls[child].key, child))
    return ordered


@dataclass(slots=True)
class _Task:
    """One task: a node's run in one superstep."""

    name: str
    run: _Run
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
    runs: list[_Run] = field(default_factory=list)
    subtasks: list[_Task] = field(default_factory=list)
    """Tasks of the functional API that its code called."""
    parts: dict[int, str] | None = None
    """The channel of each object in what it was given, by the object's id, once asked for."""
    seen_by_branches: Calls | None = None
    """What its conditional edges had read when it was over; None: not known."""
    is_over: bool = False

    def input_at(self, moment: float, tracer: _Tracer, text: str | None = None) -> Calls:
        """What it had read by a moment; of a copied state what a text shows, if there is one."""
        seen, known = self.seen, self.known
        if seen.is_seen:
            read = (self.reads.get(c, _NONE) for c, at in seen.channels.items() if at < moment)
            known = _NONE.union(*read)
            copied = [c for c, at in seen.copied.items() if at < moment]
            known = known.union(*(tracer.shown_of(self, c, text) for c in copied))
        return known.union(
            *(self.held.get(c, _NONE) for c, at in seen.fetched.items() if at < moment)
        )

    def known_at(self, moment: float, tracer: _Tracer, text: str | None = None) -> Calls:
        """The input, and what the task's own calls and graph runs had answered by a moment."""
        earlier = {call for call in self.calls if tracer.calls[call].ended < moment}
        for run in self.runs:
            if run.last_moment(tracer) < moment:
                earlier |= run.everything()
        earlier |= self._results(moment, tracer)
        return self.input_at(moment, tracer, text) | earlier

    def _results(self, moment: float, tracer: _Tracer) -> Calls:
        """What the results of its subtasks depend on; one that went into another stands for it."""
        over = [task for task in self.subtasks if task.last_moment(tracer) < moment]
        inside = [call for task in over for call in task.all_calls()]
        used = _NONE.union(*(tracer.parents.get(call, _NONE) for call in inside))
        return _NONE.union(*(task.output(tracer) for task in over)) - used

    def last_moment(self, tracer: _Tracer) -> int:
        """When the last call that its result depends on ended."""
        calls = [*self.known, *self.all_calls()]
        return max((tracer.calls[call].ended for call in calls), default=-1)

    def output(self, tracer: _Tracer) -> Calls:
        """What the task's writes depend on: its last calls, or its input where it made none."""
        calls = [call for call in self.calls if not self.is_router(call, tracer)]
        inside = [*calls, *self._nested_calls()]
        if not inside:
            return self.input_at(math.inf, tracer) | self._results(math.inf, tracer)
        used = _NONE.union(*(tracer.parents.get(call, _NONE) for call in inside))
        output = frozenset(calls) - used
        for run in self.runs:
            end = run.last_moment(tracer)
            if not any(end < tracer.calls[call].begun for call in calls):
                output |= run.everything()
        for task in self.subtasks:
            end = task.last_moment(tracer)
            if not any(end < tracer.calls[call].begun for call in calls):
                output |= task.output(tracer) - used
        return output

    def has_read(self, channel: str) -> bool:
        """Whether it read a channel at all."""
        seen = self.seen
        return not seen.is_seen or channel in seen.channels or channel in seen.copied

    def is_router(self, call: int, tracer: _Tracer) -> bool:
        """Whether a call was made by a conditional edge, after what the task wrote."""
        routed_at = self.seen.routed_at
        return routed_at is not None and routed_at < tracer.calls[call].begun

    def output_of(self, channel: str, tracer: _Tracer, value: Any = None) -> Calls:
        """The same for one channel: a node that is a graph hands its channels over by name."""
        if self.runs and self.is_graph:
            left = [task for task in self.runs[-1].tasks if not task.is_over]  # Command(PARENT)
            return self.runs[-1].of_channel(channel).union(*(t.output(tracer) for t in left))
        passed_on = tracer.passed_on(self, value)
        if passed_on is not None:
            return passed_on
        if not any(not self.is_router(call, tracer) for call in self.calls):
            return self.output(tracer)
        return self.output(tracer) | tracer.kept_in(self, value)

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
class _Run:
    """One run of a graph: its channels' provenance, superstep by superstep."""

    parent: _Task | None
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
    current: list[_Task] = field(default_factory=list)
    previous: list[_Task] = field(default_factory=list)
    tasks: list[_Task] = field(default_factory=list)
    written: list[tuple[_Task, Mapping[str, Any]]] = field(default_factory=list)
    values: Mapping[str, Any] = field(default_factory=dict)

    def of_channel(self, channel: str) -> Calls:
        if channel in self.provenance:
            return self.provenance[channel]
        return self.entry if self.initial is None else self.initial.get(channel, _NONE)

    def is_inside(self, task: _Task) -> bool:
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

    def last_moment(self, tracer: _Tracer) -> int:
        """When the last call inside the run ended."""
        return max((tracer.calls[call].ended for call in self.calls()), default=-1)

    def collects(self, channel: str, value: Any) -> bool:
        """Whether a channel keeps what it held when `value` was written."""
        if self.reducers is not None:
            return channel in self.reducers
        # A plain channel holds the very object that was written; a reducer makes a new one.
        return channel in self.values and self.values[channel] is not value


class _Tracer:
    """Replays an episode's events."""

    def __init__(self, calls: Sequence[CallMark], shape: GraphShape, reads: ReadLog) -> None:
        self.calls = calls
        self._reads = reads
        self.parents: dict[int, Calls] = {}
        self._shape = shape
        self._runs: dict[tuple[str, ...], _Run] = {}
        self._numbered: list[_Run] = []
        self._atoms = Atoms()
        self._tasks: dict[str, _Task] = {}
        self._calls_of: dict[str, list[int]] = {}

    def assign(self, kept: Sequence[int], reported: Collection[str]) -> None:
        """Give the calls that count to the tasks that made them."""
        for index in sorted(kept, key=lambda index: self.calls[index].begun):
            task = _task_id(self.calls[index].namespace.split("|"), reported)
            self._calls_of.setdefault(task, []).append(index)

    def see(self, event: Event) -> None:
        run = self._run(event.namespace)
        payload = event.payload
        if event.mode == "values":
            run.values = payload if isinstance(payload, Mapping) else {}
            if all(task.is_over for task in run.current):
                self._apply_writes(run)
        elif "result" in payload or "error" in payload:
            self._end_task(run, payload)
        else:
            self._start_task(run, payload)

    def finished(self) -> dict[int, Calls]:
        """Parents of every call; where a task's end was never reported, by what is known of it."""
        for index in itertools.chain.from_iterable(self._calls_of.values()):
            if index not in self.parents:
                call = self.calls[index]
                task = self._around(call.namespace.split("|"))
                prompt = as_text(list(call.prompt))
                self.parents[index] = task.known_at(call.begun, self, prompt) if task else _NONE
        return self.parents

    def input_of(self, namespace: str) -> Calls:
        """What a task has read, or the innermost one around it that is known.

        One that has read nothing that a call made is about what it was given.
        """
        task = self._around(namespace.split("|"))
        return _NONE if task is None else task.input_at(math.inf, self) or task.known

    def _run(self, namespace: tuple[str, ...]) -> _Run:
        if namespace not in self._runs:
            self._runs[namespace] = self._new_run(namespace)
        return self._runs[namespace]

    def _new_run(self, namespace: tuple[str, ...]) -> _Run:
        reducers = self._reads.reducers.get("|".join(namespace))
        parent = self._around(namespace)
        if parent is None:
            shape = None if namespace else self._shape
            run = _Run(None, shape, _NONE, reducers if shape is None else shape.reducers)
            run.number = len(self._numbered)
            self._numbered.append(run)
            return run
        outer = parent.run.shape
        shape = outer.subgraphs.get(parent.name) if outer is not None else None
        start = self._reads.starts.get("|".join(namespace))
        entry = parent.known_at(start.moment if start else self._first_call_in(namespace), self)
        run = _Run(parent, shape, entry, reducers if shape is None else shape.reducers)
        if parent.is_graph:
            run.initial = parent.reads or None
        elif start is not None:
            run.initial = _filled(start, parent, entry)
        run.number = len(self._numbered)
        self._numbered.append(run)
        parent.runs.append(run)
        return run

    def _around(self, namespace: Sequence[str]) -> _Task | None:
        """The innermost reported task of a namespace."""
        for part in reversed(namespace):
            task = self._tasks.get(part.rpartition(":")[2])
            if task is not None:
                return task
        return None

    def _first_call_in(self, namespace: tuple[str, ...]) -> float:
        prefix = "|".join(namespace) + "|"
        inside = [call.begun for call in self.calls if call.namespace.startswith(prefix)]
        return min(inside, default=math.inf)

    def _start_task(self, run: _Run, payload: Mapping[str, Any]) -> None:
        if run.current and all(task.is_over for task in run.current):
            self._apply_writes(run)
            run.previous, run.current = run.current, []
        name, seen = payload["name"], self._reads.tasks.get(payload["id"], TaskReads())
        caller = self._caller(run, payload)
        reads: dict[str, Calls] = {}
        if caller is not None:
            known = caller.known_at(self._first_call_of(payload["id"]), self)
        elif _SEND_TRIGGER in payload["triggers"]:
            known, reads = self._sent_by(run, name, payload["input"])
        else:
            reads = {channel: run.of_channel(channel) for channel in _read(run, payload)}
            known = _NONE.union(*reads.values())
        held = {channel: run.of_channel(channel) for channel in seen.fetched}
        calls = self._calls_of.get(payload["id"], [])
        given, is_sent = payload["input"], _SEND_TRIGGER in payload["triggers"]
        task = _Task(name, run, known, reads, held, given, is_sent, seen, calls)
        if caller is None:
            run.current.append(task)
            run.tasks.append(task)
        else:
            caller.subtasks.append(task)
        self._tasks[payload["id"]] = task

    def _caller(self, run: _Run, payload: Mapping[str, Any]) -> _Task | None:
        """The task whose code called a task of the functional API; None for other tasks."""
        match payload["input"]:
            case (tuple(), dict()) if _SEND_TRIGGER in payload["triggers"]:
                pass
            case _:
                return None
        for call in self.calls:  # the namespaces of its calls name it
            ids = [part.rpartition(":")[2] for part in call.namespace.split("|")]
            if payload["id"] in ids[1:]:
                return self._tasks.get(ids[ids.index(payload["id"]) - 1])
        return next((task for task in run.current if not task.is_over), None)

    def _first_call_of(self, task: str) -> float:
        inside = [call.begun for call in self.calls if f":{task}" in call.namespace]
        return min(inside, default=math.inf)

    def _sent_by(self, run: _Run, name: str, arg: Any) -> tuple[Calls, dict[str, Calls]]:
        """What a `Send` depends on, as a whole and by what it names."""
        sender = self._reads.sender(arg)
        task = self._tasks.get(sender.task) if sender is not None else None
        if sender is None or task is None:
            known = self._sent_to(run, name)
        elif sender.by_branch and task.seen_by_branches is not None:
            known = task.seen_by_branches
        else:
            known = task.input_at(math.inf, self) | task.output(self)
        names = arg if isinstance(arg, Mapping) else {n: getattr(arg, n) for n in fields_of(arg)}
        reads: dict[str, Calls] = {}
        for channel, value in names.items():
            made_of = None if task is None else self._made_of(task, value, is_sent=True)
            reads[str(channel)] = known if made_of is None else made_of
        if names:
            return _NONE.union(*reads.values()), reads
        made_of = None if task is None else self._made_of(task, arg, is_sent=True)
        return (known if made_of is None else made_of), {}

    def passed_on(self, task: _Task, value: Any) -> Calls | None:
        """What a value depends on that a task wrote as it got it; None where it may be new."""
        return self._made_of(task, value, is_sent=False)

    def shown_of(self, task: _Task, channel: str, text: str | None) -> Calls:
        """What those parts of a channel depend on that a text shows; all without a text."""
        parts = [*leaves(self._value_given(task, channel))]
        if text is None or not parts:
            return task.reads.get(channel, _NONE)
        shown = [part for part, leaf in parts if shows(text, leaf)]
        return _NONE.union(*(self._origin(task, channel, part) for part in shown))

    def kept_in(self, task: _Task, value: Any) -> Calls:
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

    def _origin(self, task: _Task, channel: str, part: Any) -> Calls:
        """What one part of a channel's value depends on."""
        atom, known = self._atoms.of(part), task.reads.get(channel, _NONE)
        return known if atom is None or not atom.calls <= known else atom.calls

    def _value_given(self, task: _Task, channel: str) -> Any:
        given = task.given
        return given.get(channel) if isinstance(given, Mapping) else getattr(given, channel, None)

    def _made_of(self, task: _Task, value: Any, *, is_sent: bool) -> Calls | None:
        if isinstance(value, list | tuple) and value:
            items = [self._made_of(task, item, is_sent=is_sent) for item in value]
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

    def _answered(self, task: _Task, text: str) -> Calls | None:
        """The last call in a task, or in a graph that it ran, that was answered with a text."""
        calls = [c for c in task.all_calls() if self.calls[c].answer == text]
        calls = [call for call in calls if not task.is_router(call, self)]
        last = max(calls, key=lambda call: self.calls[call].ended, default=None)
        return None if last is None else frozenset({last})

    def _answers(self, task: _Task) -> set[str]:
        """What a task's own calls were answered with."""
        return {self.calls[call].answer for call in task.calls}

    def _had(self, task: _Task, atom: Atom, *, is_sent: bool) -> bool:
        """Whether a task got an object from its state or from a graph that it ran."""
        run = self._numbered[atom.run]
        if run.is_inside(task):
            return True
        if run is not task.run:
            return False
        return is_sent or task.has_read(atom.channel)

    def _given(self, task: _Task, value: Any, *, is_sent: bool) -> Calls | None:
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

    def _sent_to(self, run: _Run, name: str) -> Calls:
        """What the senders of a `Send` task knew; the run's input where the entry sent it."""
        if not run.previous:
            return run.entry | _NONE.union(*run.provenance.values())
        declared = run.shape.targets if run.shape is not None else {}
        senders = [t for t in run.previous if _may_send(declared.get(t.name, _NOBODY), name)]
        return _NONE.union(
            *(
                t.input_at(math.inf, self) | t.output(self)
                if t.seen_by_branches is None
                else t.seen_by_branches
                for t in senders or run.previous
            )
        )

    def _end_task(self, run: _Run, payload: Mapping[str, Any]) -> None:
        task = self._tasks.get(payload["id"])
        if task is None:
            return
        task.is_over = True
        result = payload.get("result")
        if isinstance(result, Mapping) and not payload.get("error"):
            run.written.append((task, result))
        written = result if isinstance(result, Mapping) else {}
        for call in task.calls:
            begun = self.calls[call].begun
            prompt = as_text(list(self.calls[call].prompt)) if task.seen.copied else None
            self.parents[call] = task.known_at(begun, self, prompt)
            if task.is_router(call, self):
                self.parents[call] |= self._routed_at(task, written, begun)
        has_branches = run.shape is not None and task.name in run.shape.branches
        if has_branches or task.seen.routed_at is not None:
            routers = {call for call in task.calls if task.is_router(call, self)}
            task.seen_by_branches = self._routed_at(task, written, math.inf) | routers

    def _routed_at(self, task: _Task, written: Mapping[str, Any], moment: float) -> Calls:
        """What a node's branches had read by a moment, after what the node has written."""
        run, seen, shape = task.run, task.seen, task.run.shape
        if seen.routed_at is not None and not seen.is_routed_unseen:
            read = [channel for channel, at in seen.routed.items() if at < moment]
        else:
            given = shape.branches.get(task.name, _NOBODY) if shape is not None else task.reads
            read = [*given, *written]
        found = _NONE
        for channel in read:
            if channel in written:
                found |= task.output_of(channel, self, written[channel])
            if channel not in written or run.collects(channel, written[channel]):
                found |= run.of_channel(channel)
        return found

    def _apply_writes(self, run: _Run) -> None:
        """Give the channels of a finished superstep their new provenance."""
        fresh: dict[str, Calls] = {}
        for task, result in run.written:
            for channel, value in result.items():
                held = fresh.get(channel)
                if held is None:
                    held = run.of_channel(channel) if run.collects(channel, value) else _NONE
                made = task.output_of(channel, self, value)
                fresh[channel] = held | made
                self._atoms.add(value, made, run.number, channel, self._answers(task))
        run.provenance.update(fresh)
        run.written = []


def _read(run: _Run, payload: Mapping[str, Any]) -> Iterable[str]:
    """Channels that a task was given."""
    given = payload["input"]
    if isinstance(given, Mapping):
        names = {str(name) for name in given}
    else:
        names = set(fields_of(given)) or set(run.provenance)
    declared = run.shape.channels.get(payload["name"]) if run.shape is not None else None
    if declared is None:
        return names
    return (names & declared) or (declared if names else names)


def _filled(start: Start, parent: _Task, entry: Calls) -> dict[str, Calls]:
    """What the channels of a graph that a node's code runs hold at first."""
    if start.is_state:
        return {channel: parent.reads.get(channel, entry) for channel in start.keys}
    return dict.fromkeys(start.keys, entry)


def _may_send(targets: frozenset[str] | None, name: str) -> bool:
    return targets is None or name in targets


def _task_id(namespace: Sequence[str], reported: Collection[str]) -> str:
    """The innermost reported task of a namespace: a graph with a thread of its own reports none."""
    ids = [part.rpartition(":")[2] for part in namespace if not part.isdigit()]
    return next((name for name in reversed(ids) if name in reported), ids[-1] if ids else "")
