"""Who depends on whom: an episode's `parents`, found afterwards from what the run itself reported.

Each graph run (a namespace of LangGraph's `tasks` stream) keeps for every channel its *provenance*:
the calls whose output the channel holds. A plain channel's provenance is replaced by its last
writer's, a reducer's collects all writers'. A call depends on the channels that its task had read
before it (`reads`; where that could not be seen, on all that the task was given; of lists on the
items that its prompt quotes, if it quotes any) and on the task's earlier calls. What a task writes
comes from its last calls, or, where it made none, from what it read; a value that it passes on as
it is keeps its own. What was sent depends on what its sender read; where the sender is not known,
on all tasks of the superstep that may have sent it. Pure functions of recorded events: nothing here
runs anything.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from marft_graph.names import handles
from marft_graph.rollout.read_log import ReadLog, Start, TaskReads
from marft_graph.rollout.shape import GraphShape
from marft_graph.rollout.task_runs import CallMark, Ledger, Run, Task
from marft_graph.rollout.verbatim import as_text
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
class Trace:
    """What an episode's events tell of its calls."""

    order: list[tuple[int, tuple[int, ...]]]
    """As `trace_parents` returns it."""
    inputs: Mapping[str, tuple[int, ...]]
    """Positions in `order` of the calls that a task's input depends on, by the task's namespace."""


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


class _Tracer:
    """Replays an episode's events."""

    def __init__(self, calls: Sequence[CallMark], shape: GraphShape, reads: ReadLog) -> None:
        self.ledger = Ledger(calls)
        self._reads = reads
        self._shape = shape
        self._runs: dict[tuple[str, ...], Run] = {}
        self._tasks: dict[str, Task] = {}
        self._calls_of: dict[str, list[int]] = {}

    def assign(self, kept: Sequence[int], reported: Collection[str]) -> None:
        """Give the calls that count to the tasks that made them."""
        for index in sorted(kept, key=lambda index: self.ledger.calls[index].begun):
            task = _task_id(self.ledger.calls[index].namespace.split("|"), reported)
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
            if index not in self.ledger.parents:
                call = self.ledger.calls[index]
                task = self._around(call.namespace.split("|"))
                prompt = as_text(list(call.prompt))
                self.ledger.parents[index] = (
                    task.known_at(call.begun, self.ledger, prompt) if task else _NONE
                )
        return self.ledger.parents

    def input_of(self, namespace: str) -> Calls:
        """What a task has read, or the innermost one around it that is known.

        One that has read nothing that a call made is about what it was given.
        """
        task = self._around(namespace.split("|"))
        return _NONE if task is None else task.input_at(math.inf, self.ledger) or task.known

    def _run(self, namespace: tuple[str, ...]) -> Run:
        if namespace not in self._runs:
            self._runs[namespace] = self._new_run(namespace)
        return self._runs[namespace]

    def _new_run(self, namespace: tuple[str, ...]) -> Run:
        reducers = self._reads.reducers.get("|".join(namespace))
        parent = self._around(namespace)
        if parent is None:
            shape = None if namespace else self._shape
            return self.ledger.enter(
                Run(None, shape, _NONE, reducers if shape is None else shape.reducers)
            )
        outer = parent.run.shape
        shape = outer.subgraphs.get(parent.name) if outer is not None else None
        start = self._reads.starts.get("|".join(namespace))
        entry = parent.known_at(
            start.moment if start else self._first_call_in(namespace),
            self.ledger,
            start.text if start and not parent.seen.copied else None,
        )
        run = Run(parent, shape, entry, reducers if shape is None else shape.reducers)
        if parent.is_graph:
            run.initial = parent.reads or None
        elif start is not None:
            run.initial = _filled(start, parent, entry)
        parent.runs.append(run)
        return self.ledger.enter(run)

    def _around(self, namespace: Sequence[str]) -> Task | None:
        """The innermost reported task of a namespace."""
        around: Task | None = None
        for part in namespace:
            name, _, task_id = part.rpartition(":")
            task = self._tasks.get(task_id)
            if task is None and around is not None:
                task = self._handler(name, task_id, around.run)
            around = task or around
        return around

    def _first_call_in(self, namespace: tuple[str, ...]) -> float:
        prefix = "|".join(namespace) + "|"
        inside = [call.begun for call in self.ledger.calls if call.namespace.startswith(prefix)]
        return min(inside, default=math.inf)

    def _start_task(self, run: Run, payload: Mapping[str, Any]) -> None:
        if any(task is self._tasks.get(payload["id"]) for task in run.current):
            return  # the superstep goes on after an interrupt
        if run.current and all(task.is_over for task in run.current):
            self._apply_writes(run)
            run.previous, run.current = run.current, []
        name, seen = payload["name"], self._reads.tasks.get(payload["id"], TaskReads())
        caller = self._caller(run, payload)
        reads: dict[str, Calls] = {}
        if caller is not None:
            known = caller.known_at(self._first_call_of(payload["id"]), self.ledger)
        elif _SEND_TRIGGER in payload["triggers"]:
            known, reads = self._sent_by(run, name, payload["input"])
        else:
            reads = {channel: run.of_channel(channel) for channel in _read(run, payload)}
            known = _NONE.union(*reads.values())
        held = {channel: run.of_channel(channel) for channel in seen.fetched}
        calls = self._calls_of.get(payload["id"], [])
        given, is_sent = payload["input"], _SEND_TRIGGER in payload["triggers"]
        task = Task(name, run, known, reads, held, given, is_sent, seen, calls)
        if caller is None:
            run.current.append(task)
            run.tasks.append(task)
        else:
            caller.subtasks.append(task)
        self._tasks[payload["id"]] = task

    def _caller(self, run: Run, payload: Mapping[str, Any]) -> Task | None:
        """The task whose code called a task of the functional API; None for other tasks."""
        match payload["input"]:
            case (tuple(), dict()) if _SEND_TRIGGER in payload["triggers"]:
                pass
            case _:
                return None
        for call in self.ledger.calls:  # the namespaces of its calls name it
            ids = [part.rpartition(":")[2] for part in call.namespace.split("|")]
            if payload["id"] in ids[1:]:
                return self._tasks.get(ids[ids.index(payload["id"]) - 1])
        return next((task for task in run.current if not task.is_over), None)

    def _first_call_of(self, task: str) -> float:
        inside = [call.begun for call in self.ledger.calls if f":{task}" in call.namespace]
        return min(inside, default=math.inf)

    def _sent_by(self, run: Run, name: str, arg: Any) -> tuple[Calls, dict[str, Calls]]:
        """What a `Send` depends on, as a whole and by what it names."""
        sender = self._reads.sender(arg)
        task = self._tasks.get(sender.task) if sender is not None else None
        if sender is None or task is None:
            known = self._sent_to(run, name)
        elif sender.by_branch and task.seen_by_branches is not None:
            known = task.seen_by_branches
        else:
            known = task.input_at(math.inf, self.ledger) | task.output(self.ledger)
        names = arg if isinstance(arg, Mapping) else {n: getattr(arg, n) for n in fields_of(arg)}
        reads: dict[str, Calls] = {}
        for channel, value in names.items():
            made_of = None if task is None else self.ledger.made_of(task, value, is_sent=True)
            reads[str(channel)] = known if made_of is None else made_of
        if names:
            return _NONE.union(*reads.values()), reads
        made_of = None if task is None else self.ledger.made_of(task, arg, is_sent=True)
        return (known if made_of is None else made_of), {}

    def _sent_to(self, run: Run, name: str) -> Calls:
        """What the senders of a `Send` task knew; the run's input where the entry sent it."""
        if not run.previous:
            return run.entry | _NONE.union(*run.provenance.values())
        declared = run.shape.targets if run.shape is not None else {}
        senders = [t for t in run.previous if _may_send(declared.get(t.name, _NOBODY), name)]
        return _NONE.union(
            *(
                t.input_at(math.inf, self.ledger) | t.output(self.ledger)
                if t.seen_by_branches is None
                else t.seen_by_branches
                for t in senders or run.previous
            )
        )

    def _end_task(self, run: Run, payload: Mapping[str, Any]) -> None:
        if payload.get("interrupts"):  # an interrupted task begins again
            return
        task = self._tasks.get(payload["id"])
        task = task or self._handler(payload["name"], payload["id"], run)
        if task is None:
            return
        task.is_over = True
        result = payload.get("result")
        if isinstance(result, Mapping) and not payload.get("error"):
            run.written.append((task, result))
        written = result if isinstance(result, Mapping) else {}
        for call in task.calls:
            begun = self.ledger.calls[call].begun
            prompt = as_text(list(self.ledger.calls[call].prompt))
            self.ledger.parents[call] = task.known_at(begun, self.ledger, prompt)
            if task.is_router(call, self.ledger):
                self.ledger.parents[call] |= self._routed_at(task, written, begun, prompt)
        has_branches = run.shape is not None and task.name in run.shape.branches
        if has_branches or task.seen.routed_at is not None:
            routers = {call for call in task.calls if task.is_router(call, self.ledger)}
            task.seen_by_branches = self._routed_at(task, written, math.inf) | routers

    def _handler(self, name: str, task_id: str, run: Run) -> Task | None:
        """An error handler, whose beginning is not reported: it is given what the node was."""
        failed = next((task for task in run.current if handles(name, task.name)), None)
        if failed is None:
            return None
        seen = self._reads.tasks.get(task_id, TaskReads())
        calls = self._calls_of.get(task_id, [])
        task = replace(
            failed,
            name=name,
            seen=seen,
            calls=calls,
            runs=[],
            subtasks=[],
            is_over=False,
            failed=failed,
        )
        run.current.append(task)
        run.tasks.append(task)
        self._tasks[task_id] = task
        return task

    def _routed_at(
        self, task: Task, written: Mapping[str, Any], moment: float, text: str | None = None
    ) -> Calls:
        """What a node's branches had read by a moment, after what the node has written.

        With a text, of lists the items that it quotes.
        """
        run, seen, shape = task.run, task.seen, task.run.shape
        if seen.routed_at is not None and not seen.is_routed_unseen:
            read = [channel for channel, at in seen.routed.items() if at < moment]
        else:
            given = shape.branches.get(task.name, _NOBODY) if shape is not None else task.reads
            read = [*given, *written]
        found = _NONE
        for channel in read:
            known, held = _NONE, []
            if channel in written:
                known |= task.output_of(channel, self.ledger, written[channel])
                held.append(written[channel])
            if channel not in written or run.collects(channel, written[channel]):
                known |= run.of_channel(channel)
                held.append(run.values.get(channel))
            are_lists = all(isinstance(value, list) for value in held)
            items = [*itertools.chain.from_iterable(held)] if are_lists else None
            found |= self.ledger.quoted(known, items, text)
        return found

    def _apply_writes(self, run: Run) -> None:
        """Give the channels of a finished superstep their new provenance."""
        fresh: dict[str, Calls] = {}
        for task, result in run.written:
            for channel, value in result.items():
                held = fresh.get(channel)
                if held is None:
                    held = run.of_channel(channel) if run.collects(channel, value) else _NONE
                made = task.output_of(channel, self.ledger, value)
                fresh[channel] = held | made
                self.ledger.note_write(task, channel, value, made)
        run.provenance.update(fresh)
        run.written = []


def _read(run: Run, payload: Mapping[str, Any]) -> Iterable[str]:
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


def _filled(start: Start, parent: Task, entry: Calls) -> dict[str, Calls]:
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
