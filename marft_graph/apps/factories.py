"""A graph from what a module's variable holds: the graph, a builder, or something that makes one.

Factories are called as `langgraph dev` calls them: with a config, with a `ServerRuntime`, with both
or with neither; they may be coroutines and context managers. What an asynchronous factory opens
stays open, on the process's event loop, until the process ends.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import typing
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack
from typing import Any

from langchain_core.runnables.config import ensure_config
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel
from langgraph.store.memory import InMemoryStore
from langgraph_sdk import runtime as server_runtime

from marft_graph.errors import WorkflowError
from marft_graph.graph.compile import as_compiled
from marft_graph.rollout.cancellation import Cancellation
from marft_graph.rollout.process_loop import Blocked, process_loop

_SECONDS = 120.0
"""Within which an asynchronous factory must have made its graph."""
_TOO_LONG = f"has made no graph within {_SECONDS:g} seconds"

_open = ExitStack()
atexit.register(_open.close)
_held: list[asyncio.Task[None]] = []
"""Tasks that keep asynchronous context managers open."""


def graph_from(value: Any) -> Any:
    """The compiled graph that a variable holds or makes.

    Anything else is returned as it is, for the caller to refuse.

    Raises:
        WorkflowError: the factory asks for what nobody gives it.
        GraphError: a builder does not compile.
        Exception: whatever the factory raises.
    """
    if isinstance(value, Pregel):
        return value
    if isinstance(value, StateGraph):
        return as_compiled(value)
    if not callable(value):
        return value
    return _opened(value(**_arguments(value)))


def _arguments(factory: Callable[..., Any]) -> dict[str, Any]:
    """What a factory is called with, by parameter; those with a default keep it."""
    hints = _hints(factory)
    arguments: dict[str, Any] = {}
    others: list[str] = []
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:
        raise WorkflowError(f"is no graph, and makes none: {error}") from error
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise WorkflowError(
                f"takes {parameter.name!r} by position only; a factory is given its config and "
                "runtime by name"
            )
        if _is_runtime(hints.get(parameter.name, parameter.annotation)) or (
            parameter.name == "runtime" and parameter.default is parameter.empty
        ):
            arguments[parameter.name] = _runtime()
        elif parameter.default is parameter.empty or parameter.name == "config":
            others.append(parameter.name)
    if len(others) > 1:
        raise WorkflowError(
            f"needs the arguments {others}; a factory may take a config and a ServerRuntime"
        )
    return arguments | {name: ensure_config({"configurable": {}}) for name in others}


def _hints(factory: Callable[..., Any]) -> Mapping[str, Any]:
    names = {"ServerRuntime": server_runtime.ServerRuntime}
    try:
        return typing.get_type_hints(factory, localns=names)
    except (NameError, TypeError, AttributeError):  # annotations that exist for type checkers only
        return {}


def _is_runtime(annotation: Any) -> bool:
    if annotation is server_runtime.ServerRuntime:
        return True
    if isinstance(annotation, type):
        return annotation.__module__ == server_runtime.__name__
    origin = typing.get_origin(annotation)
    return origin is server_runtime.ServerRuntime or (
        origin is not None and any(_is_runtime(part) for part in typing.get_args(annotation)[:1])
    )


def _runtime() -> Any:
    """What a server hands to a factory that makes the graph for a run."""
    return server_runtime._ExecutionRuntime(
        access_context="threads.create_run", user=None, store=InMemoryStore(), context=None
    )


def _opened(made: Any) -> Any:
    """The graph behind a coroutine or a context manager, which stays open."""
    if hasattr(made, "__aenter__") and hasattr(made, "__aexit__"):
        made = _on_the_loop(_entered(made))
    elif hasattr(made, "__enter__") and hasattr(made, "__exit__"):
        made = _open.enter_context(made)
    elif inspect.isawaitable(made):
        made = _on_the_loop(_awaited(made))
    return as_compiled(made) if isinstance(made, StateGraph) else made


async def _entered(context: AbstractAsyncContextManager[Any]) -> Any:
    """Enter a context manager; one task enters and leaves it, as anyio demands.

    It is left when the loop ends its tasks, at the end of the process.
    """
    entered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        try:
            async with context as value:
                entered.set_result(value)
                await asyncio.Event().wait()
        except BaseException as error:
            if entered.done():
                raise
            entered.set_exception(error)

    _held.append(asyncio.create_task(hold()))
    return await entered


async def _awaited(made: Awaitable[Any]) -> Any:
    return await made


def _on_the_loop(made: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine comes to, on the event loop that rollouts use later."""

    async def in_time() -> Any:
        try:
            return await asyncio.wait_for(made, _SECONDS)
        except TimeoutError as error:
            raise WorkflowError(_TOO_LONG) from error

    def blocked(block: Blocked) -> Exception | None:
        if block.seconds < _SECONDS:
            return None
        return WorkflowError(f"{_TOO_LONG}; it blocks at {block.where}")

    with process_loop() as loop:
        return loop.run(in_time, threads=8, cancellation=Cancellation(), on_blocked=blocked)
