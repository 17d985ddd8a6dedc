"""The app's own task runs, followed by LangChain's callbacks while they happen.

From here a call knows the tasks around it, their order and their attempts, a failure its node, and
an episode that takes too long what it was waiting for.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler

from marft_graph.names import node_path
from marft_graph.rollout.scopes import whole_namespace

Attempts = tuple[tuple[str, int], ...]
"""Namespaces of tasks, from the outermost to the innermost, each with the number of an attempt."""


class TaskWatch(BaseCallbackHandler):
    """Follows the runs of graph tasks and of tools."""

    run_inline = True  # before the node's own code, on the event loop
    # Chains and tools are all it follows; LangChain prepares the others' events for nobody.
    ignore_llm = ignore_chat_model = ignore_retriever = True
    ignore_retry = ignore_custom_event = True

    def __init__(self) -> None:
        self.failures: list[tuple[BaseException, str]] = []
        """Exceptions with the namespace of the task that they left, innermost first."""
        self.sync_only: BaseException | None = None
        """Why something can only be called synchronously, even where the app went on."""
        self._lock = threading.Lock()
        self._namespaces: dict[UUID, str] = {}
        self._task_runs: dict[UUID, str] = {}
        self._attempts: Counter[str] = Counter()
        self._begun: list[Attempts] = []
        self._places: dict[str, tuple[Any, ...]] = {}
        self._running: dict[UUID, tuple[str, float]] = {}

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Count a task's attempt when its outermost run begins."""
        known = metadata or {}
        namespace = whole_namespace(known)
        with self._lock:
            above = self._namespaces.get(parent_run_id, "") if parent_run_id else ""
            self._namespaces[run_id] = namespace
            if not namespace or namespace == above:
                return
            self._task_runs[run_id] = namespace
            self._running[run_id] = f"node {node_path(namespace)!r}", time.monotonic()
            self._attempts[namespace] += 1
            self._begun.append(self._attempts_of(_prefixes(namespace)))
            path = plain_path(known.get("langgraph_path", ()))
            name = known.get("langgraph_node", "")
            self._places[namespace] = (name, int(known.get("langgraph_step", 0)), path)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A task is over."""
        with self._lock:
            self._running.pop(run_id, None)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Note the node that an exception left."""
        with self._lock:
            self._running.pop(run_id, None)
            namespace = self._task_runs.get(run_id)
            if namespace is not None:
                self.failures.append((error, namespace))
        self._note_sync_only(error)

    def on_tool_start(
        self, serialized: dict[str, Any] | None, input_str: str, *, run_id: UUID, **kwargs: Any
    ) -> None:
        """A tool begins."""
        name = (serialized or {}).get("name") or kwargs.get("name") or "a tool"
        with self._lock:
            self._running[run_id] = f"tool {name!r}", time.monotonic()

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A tool is over."""
        with self._lock:
            self._running.pop(run_id, None)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A tool raised, which the app may well turn into a message."""
        with self._lock:
            self._running.pop(run_id, None)
        self._note_sync_only(error)

    def _note_sync_only(self, error: BaseException) -> None:
        if self.sync_only is None and is_sync_only(error):
            self.sync_only = error

    def running(self) -> list[str]:
        """The innermost nodes and tools that run now, in words, the longest first."""
        now = time.monotonic()
        with self._lock:
            entries = sorted(self._running.items(), key=lambda entry: entry[1][1])
            around = {
                namespace.rpartition("|")[0]
                for run_id, _ in entries
                if (namespace := self._task_runs.get(run_id))
            }
        return [
            f"{what} (for {now - began:.1f} seconds)"
            for run_id, (what, began) in entries
            if self._task_runs.get(run_id, "") not in around or run_id not in self._task_runs
        ]

    def lineage(self, namespace: str) -> tuple[Any, ...]:
        """Places of the tasks around a call, without task ids."""
        with self._lock:
            return tuple(
                self._places.get(prefix, (prefix.rpartition("|")[2].partition(":")[0], 0, ""))
                for prefix in _prefixes(namespace)
            )

    def attempts(self, namespace: str | None = None) -> Attempts:
        """How often each task has begun by now: those around a call, or all."""
        with self._lock:
            return self._attempts_of(
                list(self._attempts) if namespace is None else _prefixes(namespace)
            )

    def _attempts_of(self, names: Iterable[str]) -> Attempts:
        return tuple((name, self._attempts.get(name, 1)) for name in names)

    def standing(self, attempts: Attempts, *, is_saved: bool) -> Attempts:
        """The attempts that a call's standing depends on, when the run has ended.

        A task that is begun again after an interrupt runs its code again, but a graph that it runs
        goes on where it stood: what the graph's finished tasks did still counts, whichever attempt
        of the task around it they belong to.

        Args:
            attempts: of the tasks around the call, when it was made.
            is_saved: whether graphs inside others had a checkpointer.
        """
        if not is_saved:
            return attempts
        with self._lock:
            return tuple(
                (name, number)
                for place, (name, number) in enumerate(attempts)
                if place == len(attempts) - 1
                or self._began_anew(name, number, attempts[place + 1][0])
            )

    def _began_anew(self, task: str, number: int, inner: str) -> bool:
        """Whether the graph run around `inner` was begun again in a later attempt of `task`.

        It then begins with its first step again, under new ids. One that goes on from a checkpoint
        begins a task that it had, or one of a later step.
        """
        run = inner.rpartition("|")[0]
        steps: tuple[dict[str, int], dict[str, int]] = {}, {}
        for attempts in self._begun:
            names = dict(attempts)
            child = next((name for name in names if name.rpartition("|")[0] == run), None)
            if child is not None and task in names:
                steps[names[task] > number][child] = self._places[child][1]
        earlier, later = steps
        if not later or later.keys() & earlier.keys():
            return False
        return min(later.values()) <= min(earlier.values(), default=0)

    def task_of(self, error: BaseException) -> str:
        """Namespace of the innermost task that an exception left; empty: of none."""
        with self._lock:
            for seen, namespace in self.failures:
                if seen is error:
                    return namespace
        return ""

    def node_of(self, error: BaseException) -> str:
        """The innermost node that an exception left; empty: none."""
        task = self.task_of(error)
        return node_path(task) if task else ""


def is_sync_only(error: BaseException) -> bool:
    """Whether an asynchronous method says that it is not implemented: a synchronous one may be.

    >>> async def _arun(): raise NotImplementedError("no async")
    >>> try: _arun().send(None)
    ... except NotImplementedError as error: is_sync_only(error)
    True
    """
    if not isinstance(error, NotImplementedError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    flags = 0 if trace is None else trace.tb_frame.f_code.co_flags
    return bool(flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR))


def _prefixes(namespace: str) -> list[str]:
    """The namespace and those around it, outermost first."""
    return list(itertools.accumulate(namespace.split("|"), lambda left, right: f"{left}|{right}"))


def plain_path(path: Any) -> str:
    """A LangGraph task path as text, without task ids."""
    if isinstance(path, tuple | list):
        return "(" + ",".join(plain_path(part) for part in path) + ")"
    text = str(path)
    return "" if isinstance(path, str) and text.count("-") == 4 else text
