"""A graph from what a module's variable holds: the graph, a builder, or something that makes one.

Factories are called as `langgraph dev` calls them: with a config, with a `ServerRuntime`, with both
or with neither; they may be coroutines and context managers. What an asynchronous factory opens
stays open, on the process's event loop, until the process ends.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import threading
import typing
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, ExitStack
from typing import Any

from langgraph.graph import StateGraph
from langgraph.pregel import Pregel
from langgraph.store.memory import InMemoryStore
from langgraph_sdk import runtime as server_runtime

from marft_graph.errors import WorkflowError
from marft_graph.graph.compile import as_compiled

_OPEN_SECONDS = 120.0
"""Within which an asynchronous factory must have made its graph."""

_open = ExitStack()
atexit.register(_open.close)


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
    return arguments | {name: {"configurable": {}} for name in others}


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
        made = _kept_open(made)
    elif hasattr(made, "__enter__") and hasattr(made, "__exit__"):
        made = _open.enter_context(made)
    elif inspect.isawaitable(made):
        made = _on_the_loop(made)
    return as_compiled(made) if isinstance(made, StateGraph) else made


def _kept_open(context: AbstractAsyncContextManager[Any]) -> Any:
    """Enter an asynchronous context manager; one task enters and leaves it, as anyio demands."""
    entered: Future[Any] = Future()

    async def hold() -> None:
        closing = asyncio.Event()
        try:
            async with context as value:
                entered.set_result((value, closing))
                await closing.wait()
        except BaseException as error:
            if entered.done():
                raise
            entered.set_exception(error)

    loop = process_loop()
    held = asyncio.run_coroutine_threadsafe(hold(), loop)
    value, closing = _result_of(entered)

    def close() -> None:
        loop.call_soon_threadsafe(closing.set)
        held.result(_OPEN_SECONDS)

    _open.callback(close)
    return value


def _on_the_loop(made: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await made

    return _result_of(asyncio.run_coroutine_threadsafe(wait(), process_loop()))


@functools.cache
def process_loop() -> asyncio.AbstractEventLoop:
    """An event loop that runs, in a thread of its own, as long as the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="marft-factories", daemon=True).start()
    return loop


def _result_of(future: Future[Any]) -> Any:
    try:
        return future.result(_OPEN_SECONDS)
    except TimeoutError as error:
        if future.done():
            raise
        future.cancel()
        raise WorkflowError(
            f"has made no graph within {_OPEN_SECONDS:g} seconds; what is it waiting for?"
        ) from error
