"""Who depends on whom: an episode's `parents`, found afterwards from what the run itself reported.

Each graph run (a namespace of LangGraph's `tasks` stream) keeps for every channel its *provenance*:
the calls whose output the channel holds. A plain channel's provenance is replaced by its last
writer's, a reducer's collects all writers'. A task knows the provenance of the channels it read;
its calls depend on that and on the task's earlier calls; what it writes comes from its last calls,
or, where it made none, from what it knew. The run does not tell which task a `Send` came from: what
was sent depends on all tasks of the superstep that may have sent it. Pure functions of recorded
events: nothing here runs anything.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langgraph.pregel import Pregel
from pydantic import BaseModel

from marft_graph.graph.channels import branch_channels, collects
from marft_graph.graph.roles import inspect_node

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
    tasks around the call.
    """

    namespace: str
    begun: int
    ended: int
    key: tuple[Any, ...] = ()
    attempts: tuple[tuple[str, int], ...] = ()


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
) -> Trace:
    """The same, and what the inputs of some tasks, given by their namespaces, depend on."""
    last = attempts or {}
    kept = [index for index, call in enumerate(calls) if is_last_attempt(call.attempts, last)]
    tracer = _Tracer(calls, kept, shape)
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
    """The same by channel; empty for what a `Send` started."""
    given: Mapping[str, Calls]
    """What a subgraph that the task runs is handed, by channel."""
    calls: list[int] = field(default_factory=list)
    runs: list[_Run] = field(default_factory=list)
    seen_by_branches: Calls = _NONE
    """What the channels that its branches read depended on when it was over."""
    is_over: bool = False

    def known_at(self, moment: float, tracer: _Tracer) -> Calls:
        """The input, and what the task's own calls and graph runs had answered by a moment."""
        earlier = {call for call in self.calls if tracer.calls[call].ended < moment}
        for run in self.runs:
            if run.last_moment(tracer) < moment:
                earlier |= run.everything()
        return self.known | earlier

    def output(self, tracer: _Tracer) -> Calls:
        """What the task's writes depend on: its last calls, or its input where it made none."""
        inside = self.all_calls()
        if not inside:
            return self.known
        used = _NONE.union(*(tracer.parents.get(call, _NONE) for call in inside))
        output = frozenset(self.calls) - used
        for run in self.runs:
            end = run.last_moment(tracer)
            if not any(end < tracer.calls[call].begun for call in self.calls):
                output |= run.everything()
        return output

    def output_of(self, channel: str, tracer: _Tracer) -> Calls:
        """The same for one channel: a node that is a graph hands its channels over by name."""
        if self.runs and self.run.shape is not None and self.name in self.run.shape.subgraphs:
            return self.runs[-1].of_channel(channel)
        return self.output(tracer)

    def all_calls(self) -> list[int]:
        """The task's calls and those of the graphs that it ran."""
        nested = [call for run in self.runs for task in run.tasks for call in task.all_calls()]
        return self.calls + nested


@dataclass(slots=True)
class _Run:
    """One run of a graph: its channels' provenance, superstep by superstep."""

    parent: _Task | None
    shape: GraphShape | None
    """None for a graph that a node invokes by itself, whose shape is not known."""
    entry: Calls
    """What the run's input depends on."""
    provenance: dict[str, Calls] = field(default_factory=dict)
    current: list[_Task] = field(default_factory=list)
    previous: list[_Task] = field(default_factory=list)
    tasks: list[_Task] = field(default_factory=list)
    written: list[tuple[_Task, Mapping[str, Any]]] = field(default_factory=list)
    values: Mapping[str, Any] = field(default_factory=dict)

    def of_channel(self, channel: str) -> Calls:
        # A subgraph is given channels by name: one that was not among them holds nothing yet.
        is_named = self.parent is not None and self.shape is not None and self.parent.given
        return self.provenance.get(channel, _NONE if is_named else self.entry)

    def everything(self) -> Calls:
        """What the run's result depends on."""
        return _NONE.union(*self.provenance.values()) if self.provenance else self.entry

    def last_moment(self, tracer: _Tracer) -> int:
        """When the last call inside the run ended."""
        inside = [call for task in self.tasks for call in task.all_calls()]
        return max((tracer.calls[call].ended for call in inside), default=-1)

    def collects(self, channel: str, value: Any) -> bool:
        """Whether a channel keeps what it held when `value` was written."""
        if self.shape is not None:
            return channel in self.shape.reducers
        # A plain channel holds the very object that was written; a reducer makes a new one.
        return channel in self.values and self.values[channel] is not value


class _Tracer:
    """Replays an episode's events."""

    def __init__(self, calls: Sequence[CallMark], kept: Sequence[int], shape: GraphShape) -> None:
        self.calls = calls
        self.parents: dict[int, Calls] = {}
        self._shape = shape
        self._runs: dict[tuple[str, ...], _Run] = {}
        self._tasks: dict[str, _Task] = {}
        self._calls_of: dict[str, list[int]] = {}
        for index in sorted(kept, key=lambda index: calls[index].begun):
            self._calls_of.setdefault(_task_id(calls[index].namespace.split("|")), []).append(index)

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
                self.parents[index] = task.known_at(call.begun, self) if task else _NONE
        return self.parents

    def input_of(self, namespace: str) -> Calls:
        """What the input of a task depends on, or of the innermost task around it that is known."""
        task = self._around(namespace.split("|"))
        return _NONE if task is None else task.known

    def _run(self, namespace: tuple[str, ...]) -> _Run:
        if namespace not in self._runs:
            parent = self._around(namespace)
            if parent is None:
                run = _Run(None, None if namespace else self._shape, _NONE)
            else:
                outer = parent.run.shape
                shape = outer.subgraphs.get(parent.name) if outer is not None else None
                entry = parent.known_at(self._first_call_in(namespace), self)
                run = _Run(parent, shape, entry, {} if shape is None else dict(parent.given))
                parent.runs.append(run)
            self._runs[namespace] = run
        return self._runs[namespace]

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
        name = payload["name"]
        if _SEND_TRIGGER in payload["triggers"]:
            reads: dict[str, Calls] = {}
            known = self._sent_to(run, name)
            names = payload["input"] if isinstance(payload["input"], Mapping) else ()
            given = {str(channel): known for channel in names}
        else:
            reads = {channel: run.of_channel(channel) for channel in _read(run, payload)}
            known = _NONE.union(*reads.values())
            given = reads
        task = _Task(name, run, known, reads, given, self._calls_of.get(payload["id"], []))
        run.current.append(task)
        run.tasks.append(task)
        self._tasks[payload["id"]] = task

    def _sent_to(self, run: _Run, name: str) -> Calls:
        """What the senders of a `Send` task knew; the run's input where the entry sent it."""
        running = [task for task in run.current if not task.is_over and task.reads]
        if not run.previous and running:  # a task of the functional API, called by its entrypoint
            inner = [task.output(self) for task in run.current if task.is_over]
            return _NONE.union(*(task.known for task in running), *inner)
        if not run.previous:
            return run.entry | _NONE.union(*run.provenance.values())
        declared = run.shape.targets if run.shape is not None else {}
        senders = [t for t in run.previous if _may_send(declared.get(t.name, _NOBODY), name)]
        branches = run.shape.branches if run.shape is not None else {}
        return _NONE.union(
            *(
                t.seen_by_branches if t.name in branches else t.known | t.output(self)
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
        for call in task.calls:
            self.parents[call] = task.known_at(self.calls[call].begun, self)
        if run.shape is not None and task.name in run.shape.branches:
            written = result if isinstance(result, Mapping) else {}
            task.seen_by_branches = self._branch_view(task, run.shape, written)

    def _branch_view(self, task: _Task, shape: GraphShape, written: Mapping[str, Any]) -> Calls:
        """What a node's branches see: the channels they read, after what the node has written."""
        run = task.run
        seen = _NONE.union(*(task.output_of(channel, self) for channel in written))
        for channel in shape.branches[task.name]:
            if channel not in written or run.collects(channel, written[channel]):
                seen |= run.of_channel(channel)
        return seen

    def _apply_writes(self, run: _Run) -> None:
        """Give the channels of a finished superstep their new provenance."""
        fresh: dict[str, Calls] = {}
        for task, result in run.written:
            for channel, value in result.items():
                held = fresh.get(channel)
                if held is None:
                    held = run.of_channel(channel) if run.collects(channel, value) else _NONE
                fresh[channel] = held | task.output_of(channel, self)
        run.provenance.update(fresh)
        run.written = []


def _read(run: _Run, payload: Mapping[str, Any]) -> Iterable[str]:
    """Channels that a task was given."""
    given = payload["input"]
    if isinstance(given, Mapping):
        names = {str(name) for name in given}
    elif isinstance(given, BaseModel):
        names = set(type(given).model_fields)
    elif dataclasses.is_dataclass(given):
        names = {spec.name for spec in dataclasses.fields(given)}
    else:
        names = set(run.provenance)
    declared = run.shape.channels.get(payload["name"]) if run.shape is not None else None
    if declared is None:
        return names
    return (names & declared) or (declared if names else names)


def _may_send(targets: frozenset[str] | None, name: str) -> bool:
    return targets is None or name in targets


def _task_id(namespace: Sequence[str]) -> str:
    named = [part for part in namespace if not part.isdigit()]
    return named[-1].rpartition(":")[2] if named else ""
