"""Where in the user's code a model call was made: for messages, after the fact.

Reads the interpreter's stack. An awaited call stands in a task of its own, whose waiter is found
through asyncio.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from langchain_core.runnables import RunnableBinding, RunnableLambda, RunnableSequence
from langgraph._internal._runnable import RunnableCallable, RunnableSeq

_LIBRARIES = frozenset(
    {"langchain", "langgraph", "asyncio", "concurrent", "threading", "contextlib", "tenacity"}
)
"""First words of modules that stand between a node's code and its model."""
_RUNS_NODES = "langgraph.pregel"


@dataclass(frozen=True, slots=True)
class CallSite:
    """A model call of a node, as it is shown to people."""

    node: str
    """Node path; empty outside every node."""
    model: str
    """What kind of model is asked, and its name where it has one."""
    function: str = ""
    """The node's function with file and line, where it has one."""
    line: str = ""
    """File and line of the user's code that asked the model, where that is on the stack."""

    def __str__(self) -> str:
        where = f"node {self.node!r}" if self.node else "code outside every node"
        text = f"{where} asks its own model ({self.model})"
        if self.function:
            text += f"; the node's function is {self.function}"
        return text + (f"; the call is in {self.line}" if self.line else "")


def users_line() -> str:
    """File and line of the innermost code on the stack that is no library's; empty: none."""
    for frame in frames():
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0].partition("_")[0] not in _LIBRARIES and not _is_ours(name):
            return f"{frame.f_code.co_filename}, line {frame.f_lineno}"
    return ""


def _is_ours(module: str) -> bool:
    return module == "marft_graph" or module.startswith("marft_graph.")


def frames() -> Iterator[FrameType]:
    """The stack from the calling code out to where its node began, across awaited tasks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_RUNS_NODES):
            return
        if module in ("asyncio.events", "asyncio.base_events"):
            break
        yield frame
        frame = frame.f_back
    yield from _awaiting_frames()


def _awaiting_frames() -> Iterator[FrameType]:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return
    for _ in range(8):  # gathered in gathered calls, of which there are not many
        task = next((t for t in asyncio.all_tasks() if _waits_for(t, task)), None)
        if task is None:
            return
        for frame in reversed(_coroutine_frames(task.get_coro())):
            if str(frame.f_globals.get("__name__", "")).startswith(_RUNS_NODES):
                return
            yield frame


def _waits_for(task: asyncio.Task[Any], other: asyncio.Task[Any] | None) -> bool:
    waiter = getattr(task, "_fut_waiter", None)
    return other is not None and (waiter is other or other in getattr(waiter, "_children", ()))


def _coroutine_frames(coroutine: Any) -> list[FrameType]:
    """Frames of a suspended coroutine and of those that it awaits, outermost first."""
    frames = []
    while inspect.iscoroutine(coroutine) and coroutine.cr_frame is not None:
        frames.append(coroutine.cr_frame)
        coroutine = coroutine.cr_await
    return frames


def function_of(runnable: Any) -> str:
    """The function behind a node, with file and line; empty where there is none."""
    for _ in range(8):  # a binding of a sequence of a wrapped method, and so on
        if isinstance(runnable, functools.partial):
            runnable = runnable.func
        elif isinstance(runnable, RunnableBinding):
            runnable = runnable.bound
        elif isinstance(runnable, RunnableSequence | RunnableSeq):
            runnable = runnable.steps[0]
        elif isinstance(runnable, RunnableCallable | RunnableLambda):
            runnable = getattr(runnable, "func", None) or runnable.afunc
        else:
            break
    if not inspect.isroutine(runnable) and callable(runnable):
        runnable = type(runnable).__call__
    function = inspect.unwrap(getattr(runnable, "__func__", runnable))
    if not inspect.isfunction(function):
        return ""
    code = function.__code__
    return f"{function.__qualname__} in {code.co_filename}, line {code.co_firstlineno}"
