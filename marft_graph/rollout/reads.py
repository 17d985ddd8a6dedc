"""What the tasks of a run really read, noted while they run.

While a log is active, LangGraph's runner hands each task of the run a view of its state (`views`)
instead of the state, and each conditional edge one of what it is given. The app sees no
difference: what a node returns, sends or hands on is plain again. A task whose state cannot be
given a view (a Runnable that is no function, a state that is neither dict nor model nor dataclass)
is not `is_seen`: for it the whole of what it was given counts.

The only module that touches LangGraph's private names for running tasks.
"""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, RunnableSequence
from langgraph._internal._constants import CONF, CONFIG_KEY_CHECKPOINT_NS, CONFIG_KEY_READ, TASKS
from langgraph._internal._runnable import RunnableCallable, RunnableSeq
from langgraph.graph._branch import BranchSpec
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel, _runner
from langgraph.types import Command, PregelExecutableTask, Send

from marft_graph.graph.channels import collects
from marft_graph.rollout.read_log import ReadLog, Start, TaskReads
from marft_graph.rollout.scopes import RUN_KEY
from marft_graph.rollout.verbatim import as_text
from marft_graph.rollout.views import (
    Note,
    StateView,
    changed_in,
    fields_of,
    is_view,
    plain_of,
    release,
    view_of,
)

PATCHED_NAMES = ("run_with_retry", "arun_with_retry")
"""What is replaced in `langgraph.pregel._runner` while a log is active."""
_DEPTH = 4
_PROMPTS = (ChatPromptTemplate, PromptTemplate)


_logs: dict[str, ReadLog] = {}
# Found by a graph that is started without the config of the task around it.
_current: contextvars.ContextVar[ReadLog | None] = contextvars.ContextVar(
    "marft_reads", default=None
)
_originals: dict[str, Any] = {}
_validate_input = BasePromptTemplate._validate_input
_lock = threading.Lock()


@contextmanager
def recording_reads(run_id: str, log: ReadLog) -> Iterator[None]:
    """Note in `log` what the tasks read whose config carries the run's id in its metadata."""
    with _lock:
        if not _logs:
            for name in PATCHED_NAMES:
                _originals[name] = getattr(_runner, name)
            for name, replacement in _REPLACEMENTS.items():
                setattr(_runner, name, replacement)
            BasePromptTemplate._validate_input = _only_variables  # type: ignore[method-assign]
        _logs[run_id] = log
    token = _current.set(log)
    try:
        yield
    finally:
        _current.reset(token)
        with _lock:
            del _logs[run_id]
            if not _logs:
                for name in PATCHED_NAMES:
                    setattr(_runner, name, _originals[name])
                BasePromptTemplate._validate_input = _validate_input  # type: ignore[method-assign]


def _only_variables(self: BasePromptTemplate[Any], inner_input: Any) -> Any:
    """A prompt template that is handed a whole state uses, and so reads, its own variables."""
    if type(inner_input) is StateView and type(self) in _PROMPTS:
        wanted = {*self.input_variables, *self.optional_variables}
        if inner_input.keys() >= {*self.input_variables}:
            inner_input = {name: inner_input[name] for name in inner_input if name in wanted}
    return _validate_input(self, inner_input)


def _run_task(task: PregelExecutableTask, *args: Any, **kwargs: Any) -> Any:
    log = _log_of(task)
    if log is None:
        return _originals["run_with_retry"](task, *args, **kwargs)
    with _Watch(log, task) as watch:
        return _originals["run_with_retry"](watch.task, *args, **kwargs)


async def _arun_task(task: PregelExecutableTask, *args: Any, **kwargs: Any) -> Any:
    log = _log_of(task)
    if log is None:
        return await _originals["arun_with_retry"](task, *args, **kwargs)
    with _Watch(log, task) as watch:
        return await _originals["arun_with_retry"](watch.task, *args, **kwargs)


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "run_with_retry": _run_task,
    "arun_with_retry": _arun_task,
}


def _log_of(task: PregelExecutableTask) -> ReadLog | None:
    metadata = task.config.get("metadata") or {}
    return _logs.get(metadata.get(RUN_KEY, "")) or _current.get()


class _Watch:
    """One task that is watched while it runs; `task` is what LangGraph is to run instead."""

    def __init__(self, log: ReadLog, task: PregelExecutableTask) -> None:
        self._log = log
        self._id = task.id
        self._views: list[Any] = []
        self.reads = log.tasks[task.id] = TaskReads()
        namespace = task.config[CONF].get(CONFIG_KEY_CHECKPOINT_NS, "")
        self._graph_run = namespace.rpartition("|")[0]
        self._note_graph(task)
        self.task = self._started(task) if task.name == "__start__" else self._watched(task)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        """The task is over: whatever it sent that is not known yet came from its own code."""
        sends = [value for channel, value in self.task.writes if channel == TASKS]
        self._log.sent(self._id, sends, by_branch=False)
        for view in self._views:
            release(view)

    def _view(self, value: Any, note: Note) -> Any:
        view = view_of(value, note)
        if view is not None:
            self._views.append(view)
        return view

    def _note_graph(self, task: PregelExecutableTask) -> None:
        if self._graph_run in self._log.reducers:
            return
        read = task.config[CONF].get(CONFIG_KEY_READ)
        channels = read.args[1] if isinstance(read, functools.partial) else {}
        self._log.reducers[self._graph_run] = frozenset(
            name for name, channel in channels.items() if collects(channel)
        )

    def _started(self, task: PregelExecutableTask) -> PregelExecutableTask:
        """The input of a graph: one that is the state of a task around it is read by name."""
        value, is_state = task.input, False
        if is_view(value):
            is_state = not changed_in(value)
            read = task.config[CONF].get(CONFIG_KEY_READ)
            channels = read.args[1] if isinstance(read, functools.partial) else {}
            names = dict.keys(value) if type(value) is StateView else fields_of(value)
            keys = frozenset(name for name in names if name in channels)
            for name in keys:
                value[name] if type(value) is StateView else getattr(value, name)
            if type(value) is StateView:
                task = dataclasses.replace(task, input=plain_of(value))
        else:
            keys = frozenset(value) if isinstance(value, dict) else fields_of(value)
        if keys:
            text = as_text(task.input)
            self._log.starts[self._graph_run] = Start(keys, is_state, self._log.tick(), text)
        return task

    def _watched(self, task: PregelExecutableTask) -> PregelExecutableTask:
        sequence = task.proc
        steps = list(sequence.steps) if isinstance(sequence, RunnableSeq) else [sequence]
        bound = steps[0]
        self.reads.is_graph = isinstance(bound, Pregel)
        note = self._log.noting(self.reads.channels, self.reads.copied)
        if isinstance(bound, ToolNode):
            task = self._fetching(task, bound)
        if not self.reads.is_graph and not _hands_state_to_tools(bound):
            view = self._view(task.input, note)
            watched = None
            if view is not None:
                ways = _Ways(lambda _: view, self._returned, self._handed_on, note)
                watched = _viewing(bound, ways)
            if watched is not None:
                steps[0], self.reads.is_seen = watched, True
        steps[1:] = [self._branch(writer) for writer in steps[1:]]
        if not isinstance(sequence, RunnableSeq):
            return dataclasses.replace(task, proc=steps[0])
        changed = copy.copy(sequence)
        changed.steps = steps
        return dataclasses.replace(task, proc=changed)

    def _fetching(self, task: PregelExecutableTask, node: ToolNode) -> PregelExecutableTask:
        """A prebuilt tool node that is sent tool calls asks the channels for the state."""
        read = task.config[CONF].get(CONFIG_KEY_READ)
        if not isinstance(read, functools.partial) or isinstance(task.input, dict):
            return task
        note = self._log.noting(self.reads.fetched)

        def fetch(*args: Any, **kwargs: Any) -> Any:
            values = read.func(*args, **kwargs)
            if type(values) is not dict:
                return values
            if _hands_state_to_tools(node):
                for name in values:
                    note(name, False)
                return values
            return self._view(values, note)

        fetching = functools.partial(fetch, *read.args, **read.keywords)
        config: Any = {**task.config, CONF: {**task.config[CONF], CONFIG_KEY_READ: fetching}}
        return dataclasses.replace(task, config=config)

    def _branch(self, writer: Any) -> Any:
        """A conditional edge, which is one of the writers of its node."""
        spec = getattr(getattr(writer, "func", None), "__self__", None)
        if not isinstance(spec, BranchSpec):
            return writer
        note = self._log.noting(self.reads.routed)

        def view(value: Any) -> Any:
            if self.reads.routed_at is None:
                self.reads.routed_at = self._log.tick()
            shown = self._view(value, note)
            if shown is None:
                self.reads.is_routed_unseen = True
            return value if shown is None else shown

        path = _viewing(spec.path, _Ways(view, self._routed, self._handed_on, note))
        if path is None:
            self.reads.is_routed_unseen = True
            return writer
        changed = copy.copy(writer)
        spec = spec._replace(path=path)
        changed.func, changed.afunc = spec._route, spec._aroute
        return changed

    def _returned(self, view: Any, result: Any) -> Any:
        """What a node's function returned, plain."""
        if isinstance(result, Runnable):  # LangGraph runs it with the state itself
            self._read_all(view)
            return result
        result = self._plain(result)
        self._log.sent(self._id, result, by_branch=False)
        return result

    def _routed(self, view: Any, result: Any) -> Any:
        if isinstance(result, Runnable):
            self.reads.is_routed_unseen = True
            return result
        result = self._plain(result, is_update=False)
        self._log.sent(self._id, result, by_branch=True)
        return result

    def _handed_on(self, view: Any, result: Any) -> Any:
        """What a step of a chain hands to the next one."""
        if isinstance(result, Runnable):
            self._read_all(view)
            return result
        return self._plain(result, is_update=False)

    def _read_all(self, view: Any) -> None:
        for name in dict.keys(view) if type(view) is StateView else fields_of(view):
            view[name] if type(view) is StateView else getattr(view, name)

    def _plain(self, value: Any, depth: int = _DEPTH, *, is_update: bool = True) -> Any:
        """A value without views; one that is inside another value hands on all that it shows."""
        if is_view(value):
            if not is_update:
                self._read_all(value)
            return release(value) if type(value) is not StateView else plain_of(value)
        if depth == 0:
            return value
        if isinstance(value, Command):
            update = self._plain(value.update, depth - 1)
            self._plain(value.goto, depth - 1, is_update=False)
            return value if update is value.update else dataclasses.replace(value, update=update)
        if isinstance(value, Send):
            value.arg = self._plain(value.arg, depth - 1, is_update=False)
        elif type(value) is dict:
            for key, item in value.items():
                plain = self._plain(item, depth - 1, is_update=False)
                if plain is not item:
                    value[key] = plain
        elif type(value) is list:
            for place, item in enumerate(value):
                plain = self._plain(item, depth - 1, is_update=is_update and _is_command(item))
                if plain is not item:
                    value[place] = plain
        elif type(value) is tuple:
            items = [self._plain(item, depth - 1, is_update=False) for item in value]
            if any(a is not b for a, b in zip(items, value, strict=True)):
                return tuple(items)
        return value


def _is_command(value: Any) -> bool:
    return isinstance(value, Command)


def _hands_state_to_tools(bound: Any) -> bool:
    """Whether a prebuilt tool node gives tools the whole state, which pydantic then copies."""
    if not isinstance(bound, ToolNode):
        return False
    injected = bound._injected_args.values()
    return any(None in arguments.state.values() for arguments in injected)


@dataclasses.dataclass(frozen=True, slots=True)
class _Ways:
    """How a Runnable gets its view, and what becomes of what it returns."""

    view: Callable[[Any], Any]
    returned: Callable[[Any, Any], Any]
    handed_on: Callable[[Any, Any], Any]
    note: Note


def _viewing(runnable: Any, ways: _Ways) -> Any:
    """A Runnable that hands its function a view; None where that is not possible."""
    inner = dataclasses.replace(ways, returned=ways.handed_on)
    if isinstance(runnable, RunnableSequence):
        first = _viewing(runnable.first, inner)
        return None if first is None else runnable.model_copy(update={"first": first})
    if type(runnable) is RunnableParallel:
        steps = {name: _viewing(step, inner) for name, step in runnable.steps__.items()}
        if any(step is None for step in steps.values()):
            return None
        return runnable.model_copy(update={"steps__": steps})
    if type(runnable) in _PROMPTS:
        for name in runnable.input_variables:
            ways.note(name, False)
        return runnable
    is_function = isinstance(runnable, RunnableCallable) and not runnable.explode_args
    if not is_function and not (type(runnable) is RunnableLambda and _is_plain(runnable)):
        return None
    changed = copy.copy(runnable)
    for name in ("func", "afunc"):
        function = getattr(runnable, name, None)
        if function is not None:
            wrap = _wrapped_async if name == "afunc" else _wrapped
            setattr(changed, name, wrap(function, ways))
    return changed


def _is_plain(runnable: Any) -> bool:
    functions = [getattr(runnable, name, None) for name in ("func", "afunc")]
    return not any(
        inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f) for f in functions if f
    )


def _wrapped(function: Callable[..., Any], ways: _Ways) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(state: Any, /, *args: Any, **kwargs: Any) -> Any:
        shown = ways.view(state)
        return ways.returned(shown, function(shown, *args, **kwargs))

    return call


def _wrapped_async(function: Callable[..., Any], ways: _Ways) -> Callable[..., Any]:
    @functools.wraps(function)
    async def call(state: Any, /, *args: Any, **kwargs: Any) -> Any:
        shown = ways.view(state)
        return ways.returned(shown, await function(shown, *args, **kwargs))

    return call
