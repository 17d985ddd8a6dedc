"""Answering an app's chat-model calls without changing the app.

The only module that touches LangChain's private names. While a run is active, the lowest common
methods of `BaseChatModel` ask whether the call comes from a graph node that a run's `Responder`
answers for; of every other call the runs around it are told (`own_models`) before the original is
asked. Which node that is, `scopes` knows. It knows neither engines nor episodes.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    message_chunk_to_message,
)
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables.config import RunnableConfig, ensure_config

from marft_graph.errors import ConfigError, EpisodeTimeoutError
from marft_graph.rollout import overrides, own_models, scopes, streaming
from marft_graph.rollout.asked import REASON_KEYS, asked_for, what_is_asked
from marft_graph.rollout.isolation import without_cache
from marft_graph.rollout.own_models import pass_on, refuse_late
from marft_graph.rollout.responder import Delegate, InterceptedCall, Pending, Responder
from marft_graph.rollout.scopes import (
    RUN_KEY,
    Place,
    Run,
    active_runs,
    in_run,
    known_metadata,
    leftovers,
    places,
)
from marft_graph.rollout.token_limits import limit_of_app

PATCHED_NAMES = (
    "generate",
    "agenerate",
    "_generate_with_cache",
    "_agenerate_with_cache",
    "stream",
    "astream",
    "_iter_v2_events",
    "_aiter_v2_events",
)
"""What is replaced on `BaseChatModel` while a run is active."""


# Set while a delegate's model runs: what it calls on its way is no call of the app's.
_is_delegated: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "marft_delegate", default=False
)
# The app's own model that is answering: the same call is not passed on a second time.
_answers: contextvars.ContextVar[BaseChatModel | None] = contextvars.ContextVar(
    "marft_answers", default=None
)
_originals: dict[str, Any] = {}
_is_installed = False
_next_collection = 0.0
_lock = threading.Lock()


@contextmanager
def intercepting(responder: Responder, *, context: bool = True) -> Iterator[dict[str, str]]:
    """Let `responder` answer the model calls of graphs run inside the `with` block.

    Yields metadata for the graph's config: threads of the app that have lost the context but pass
    the config on are then found too. A generator, which shares its caller's context between two
    items, says `context=False` and is known by that metadata alone. LangChain is back as it was
    once the last run has ended, with the threads and tasks that episodes have left running: what
    these ask a model is refused.
    """
    run_id, run = uuid.uuid4().hex, Run(responder)
    if responder.is_strict:
        weakref.finalize(run, _restore_if_over).atexit = False
    with _lock:
        if not _is_installed:
            _install()
        scope = in_run(run_id, run, context=context)
        scope.__enter__()
    try:
        yield {RUN_KEY: run_id}
    finally:
        with _lock:
            scope.__exit__(None, None, None)
        del scope, run
        _restore_if_over()


def tidy() -> None:
    """After a rollout: what is kept by nothing but cycles, as failures are, is no leftover.

    A collection takes long in a process with large libraries; where something is left for good (a
    thread that hangs), collections take at most a twentieth of the time.
    """
    global _next_collection
    began = time.monotonic()
    if active_runs() or not leftovers() or began < _next_collection:
        return
    gc.collect()
    ended = time.monotonic()
    _next_collection = ended + 20 * (ended - began)


def _restore_if_over() -> None:
    """Put LangChain back where nothing runs any more that an episode has started."""
    if _lock.acquire(blocking=False):  # who has it looks again afterwards
        try:
            if _is_installed and not active_runs() and not leftovers():
                _restore()
        finally:
            _lock.release()


def _install() -> None:
    global _is_installed
    _is_installed = True
    replacements: dict[str, Callable[..., Any]] = {
        "generate": _ask,
        "agenerate": _aask,
        "_generate_with_cache": _generate,
        "_agenerate_with_cache": _agenerate,
        "stream": _stream,
        "astream": _astream,
        "_iter_v2_events": _iter_events,
        "_aiter_v2_events": _aiter_events,
    }
    for name in PATCHED_NAMES:
        _originals[name] = BaseChatModel.__dict__[name]
    for name, replacement in replacements.items():
        setattr(BaseChatModel, name, replacement)
    overrides.follow(_passes, _own_way)
    own_models.follow()
    scopes.follow()


def _restore() -> None:
    global _is_installed
    _is_installed = False
    # The originals stay known: a call that is inside a replacement now still needs them.
    for name in PATCHED_NAMES:
        setattr(BaseChatModel, name, _originals[name])
    overrides.leave()
    own_models.leave()
    scopes.leave()


# Who answers a call


def running_task() -> tuple[Responder, str] | None:
    """The run that the calling code is part of and its task's namespace; None outside a node.

    Of several runs around it the outermost one: episodes are rewarded, bound apps are not.

    Raises:
        EpisodeTimeoutError: the run has ended.
    """
    found = places(None)
    if not found:
        return None
    place = found[-1]
    if not place.run.is_active:
        raise EpisodeTimeoutError(f"node {place.node!r} emitted a reward after its run had ended")
    return place.run.responder, place.namespace


@contextmanager
def _answering(model: BaseChatModel) -> Iterator[None]:
    """While the app's own model answers a call that was passed on: it may stream it, as events."""
    token = _answers.set(model)
    try:
        yield
    finally:
        _answers.reset(token)


def _route(metadata: Mapping[str, Any] | None) -> tuple[Place, str] | None:
    """The place of a call and the adapter that answers it; None where its own model does.

    Of several runs around a call the innermost one with an adapter answers.
    """
    if _is_delegated.get():
        return None
    for place in places(metadata):
        agent = place.run.responder.agent_for(place.node)
        if agent is not None and (place.run.is_active or place.run.responder.is_strict):
            return place, agent
    return None


def _passes(model: BaseChatModel, metadata: Mapping[str, Any] | None) -> bool:
    """Whether a call is left to the model's own class; the runs around it are told."""
    if _is_delegated.get():
        return True
    routed = _route(metadata)
    if routed is None:
        pass_on(type(model).__name__, metadata)
    return routed is None


@contextmanager
def _own_way() -> Iterator[None]:
    token = _is_delegated.set(True)
    try:
        yield
    finally:
        _is_delegated.reset(token)


def _begin(
    model: BaseChatModel,
    messages: Sequence[BaseMessage],
    stop: Sequence[str] | None,
    metadata: Mapping[str, Any] | None,
    kwargs: Mapping[str, Any],
) -> tuple[Run, Pending | Delegate] | None:
    routed = _route(metadata)
    if routed is None:
        if not _is_delegated.get() and _answers.get() is not model:
            pass_on(type(model).__name__, metadata)
        return None
    place, agent = routed
    refuse_late(place)
    call = _read_call(model, messages, stop, place, known_metadata(metadata), agent, kwargs)
    return place.run, place.run.responder.respond(call)


def _read_call(
    model: BaseChatModel,
    messages: Sequence[BaseMessage],
    stop: Sequence[str] | None,
    place: Place,
    metadata: Mapping[str, Any],
    agent: str,
    kwargs: Mapping[str, Any],
) -> InterceptedCall:
    if (kwargs.get("n") or getattr(model, "n", None) or 1) > 1:
        raise ConfigError(
            f"node {place.node!r} asks its model for n > 1 answers; trained nodes sample "
            "one answer a call (use batch for several)"
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    own = model._get_ls_params(stop=list(stop) if stop else None, **given)
    stops = stop or given.get("stop") or own.get("ls_stop") or getattr(model, "stop", None) or ()
    limit = given.get("max_completion_tokens") or given.get("max_tokens")
    temperature = given.get("temperature", own.get("ls_temperature"))
    tools, choice, structure, asked = what_is_asked(model, given, place.node)
    return InterceptedCall(
        agent=agent,
        node=place.node,
        namespace=place.namespace,
        step=int(metadata.get("langgraph_step", 0)),
        path=tuple(metadata.get("langgraph_path", ())),
        messages=tuple(messages),
        tools=tools,
        tool_choice=choice,
        response_format=structure,
        asked=asked,
        stop=(stops,) if isinstance(stops, str) else tuple(stops),
        max_tokens=limit or limit_of_app(model, own.get("ls_max_tokens"), place.node),
        temperature=None if temperature is None else float(temperature),
        model_name=str(own.get("ls_model_name") or type(model).__name__),
    )


# Waiting for the answer


def _wait(run: Run, pending: Pending) -> AIMessage:
    try:
        with run.responder.blocked_on(pending.future):
            outcome = pending.future.result(run.responder.seconds_left())
    except CancelledError:
        raise EpisodeTimeoutError("the run ended before the model call was answered") from None
    except TimeoutError as error:
        if pending.future.done():  # the answer itself is a time-out
            raise
        pending.future.cancel()
        raise EpisodeTimeoutError("the model call was not answered before the deadline") from error
    return pending.finish(outcome)


async def _await(run: Run, pending: Pending) -> AIMessage:
    waiting = asyncio.wrap_future(pending.future)
    try:
        outcome = await asyncio.wait_for(waiting, run.responder.seconds_left())
    except TimeoutError as error:
        if pending.future.done() and not pending.future.cancelled():
            raise
        raise EpisodeTimeoutError("the model call was not answered before the deadline") from error
    return pending.finish(outcome)


# Calls that another chat model, or the app's own, makes


def _asked(
    delegate: Delegate, own: BaseChatModel, stop: Any, kwargs: Mapping[str, Any]
) -> Iterator[tuple[BaseChatModel, dict[str, Any]]]:
    """Who is asked and how: the delegate's model, and after it the app's own where it may be."""
    if delegate.model is None:
        yield own, {"stop": stop, **kwargs}
        return
    yield delegate.model, dict(delegate.kwargs)
    if delegate.replaces is not None:
        yield own, {"stop": stop, **kwargs}


def _prompt(delegate: Delegate, model: BaseChatModel, messages: Any) -> Any:
    """What a model is asked: the app's own gets the app's messages."""
    if delegate.messages is None or model is not delegate.model:
        return messages
    return list(delegate.messages)


def _may_go_on(delegate: Delegate, model: BaseChatModel, error: Exception) -> bool:
    return model is delegate.model and delegate.replaces is not None and delegate.replaces(error)


def _delegated(
    delegate: Delegate,
    own: BaseChatModel,
    messages: list[BaseMessage],
    stop: list[str] | None,
    run_manager: Any,
    kwargs: Mapping[str, Any],
) -> ChatResult:
    token = _is_delegated.set(True)
    try:
        for model, asked in _asked(delegate, own, stop, kwargs):
            try:
                result: ChatResult = _originals["_generate_with_cache"](
                    without_cache(model),
                    _prompt(delegate, model, messages),
                    run_manager=run_manager,
                    **asked,
                )
            except Exception as error:
                if not _may_go_on(delegate, model, error):
                    raise
                continue
            _tell(delegate, result.generations[0].message)
            return result
    finally:
        _is_delegated.reset(token)
    raise RuntimeError("no chat model was asked")


async def _adelegated(
    delegate: Delegate,
    own: BaseChatModel,
    messages: list[BaseMessage],
    stop: list[str] | None,
    run_manager: Any,
    kwargs: Mapping[str, Any],
) -> ChatResult:
    token = _is_delegated.set(True)
    try:
        for model, asked in _asked(delegate, own, stop, kwargs):
            try:
                result: ChatResult = await _originals["_agenerate_with_cache"](
                    without_cache(model),
                    _prompt(delegate, model, messages),
                    run_manager=run_manager,
                    **asked,
                )
            except Exception as error:
                if not _may_go_on(delegate, model, error):
                    raise
                continue
            _tell(delegate, result.generations[0].message)
            return result
    finally:
        _is_delegated.reset(token)
    raise RuntimeError("no chat model was asked")


def _tell(delegate: Delegate, message: BaseMessage) -> None:
    if delegate.answered is not None and isinstance(message, AIMessage):
        delegate.answered(_whole(message))


def _whole(message: BaseMessage) -> AIMessage:
    whole = message_chunk_to_message(message)
    assert isinstance(whole, AIMessage)
    return whole


def _delegated_stream(
    delegate: Delegate,
    own: BaseChatModel,
    input: Any,
    config: RunnableConfig | None,
    stop: list[str] | None,
    kwargs: Mapping[str, Any],
) -> Iterator[AIMessageChunk]:
    for model, asked in _asked(delegate, own, stop, kwargs):
        whole: AIMessageChunk | None = None
        try:
            for chunk in _originals["stream"](
                model, _prompt(delegate, model, input), config, **asked
            ):
                whole = chunk if whole is None else whole + chunk
                yield chunk
        except Exception as error:
            if whole is not None or not _may_go_on(delegate, model, error):
                raise  # what the app has been given cannot be taken back
            continue
        if whole is not None:
            _tell(delegate, whole)
        return


async def _adelegated_stream(
    delegate: Delegate,
    own: BaseChatModel,
    input: Any,
    config: RunnableConfig | None,
    stop: list[str] | None,
    kwargs: Mapping[str, Any],
) -> AsyncIterator[AIMessageChunk]:
    for model, asked in _asked(delegate, own, stop, kwargs):
        whole: AIMessageChunk | None = None
        try:
            async for chunk in _originals["astream"](
                model, _prompt(delegate, model, input), config, **asked
            ):
                whole = chunk if whole is None else whole + chunk
                yield chunk
        except Exception as error:
            if whole is not None or not _may_go_on(delegate, model, error):
                raise
            continue
        if whole is not None:
            _tell(delegate, whole)
        return


# What stands in for BaseChatModel's methods


def _ask(self: BaseChatModel, *args: Any, **kwargs: Any) -> Any:
    """`generate`, which drops what `with_structured_output` says of itself before it asks."""
    with asked_for(kwargs):
        return _originals["generate"](self, *args, **kwargs)


async def _aask(self: BaseChatModel, *args: Any, **kwargs: Any) -> Any:
    with asked_for(kwargs):
        return await _originals["agenerate"](self, *args, **kwargs)


def _generate(
    self: BaseChatModel,
    messages: list[BaseMessage],
    stop: list[str] | None = None,
    run_manager: Any = None,
    **kwargs: Any,
) -> ChatResult:
    begun = _begin(self, messages, stop, run_manager and run_manager.metadata, kwargs)
    if begun is None:
        own = without_cache(self)
        with _answering(own):
            result: ChatResult = _originals["_generate_with_cache"](
                own, messages, stop=stop, run_manager=run_manager, **kwargs
            )
        return result
    run, answer = begun
    if isinstance(answer, Delegate):
        return _delegated(answer, self, messages, stop, run_manager, kwargs)
    message = _wait(run, answer)
    streaming.tell(self, message, run_manager, kwargs)
    return _result(self, message)


async def _agenerate(
    self: BaseChatModel,
    messages: list[BaseMessage],
    stop: list[str] | None = None,
    run_manager: Any = None,
    **kwargs: Any,
) -> ChatResult:
    begun = _begin(self, messages, stop, run_manager and run_manager.metadata, kwargs)
    if begun is None:
        own = without_cache(self)
        with _answering(own):
            result: ChatResult = await _originals["_agenerate_with_cache"](
                own, messages, stop=stop, run_manager=run_manager, **kwargs
            )
        return result
    run, answer = begun
    if isinstance(answer, Delegate):
        return await _adelegated(answer, self, messages, stop, run_manager, kwargs)
    message = await _await(run, answer)
    await streaming.atell(self, message, run_manager, kwargs)
    return _result(self, message)


def _result(model: BaseChatModel, message: AIMessage) -> ChatResult:
    if model.output_version == "v1":
        message = message.model_copy(update={"content": message.content_blocks})
    known = message.response_metadata
    info = {name: known[name] for name in REASON_KEYS if name in known}
    output = {name: known[name] for name in ("token_usage", "model_name") if name in known}
    generation = ChatGeneration(message=message, generation_info=info)
    return ChatResult(generations=[generation], llm_output=output)


def _streams(
    model: BaseChatModel, metadata: Mapping[str, Any] | None, called_with: Mapping[str, Any]
) -> streaming.Answering:
    """The model as one that streams what the run answers, to a call with these arguments."""

    def begin(messages: Any, stop: Any, kwargs: Mapping[str, Any]) -> tuple[Run, Pending]:
        with asked_for(called_with):
            begun = _begin(model, messages, stop, metadata, kwargs)
        if begun is None or isinstance(begun[1], Delegate):
            raise RuntimeError("the run that was to answer a streamed call does so no more")
        return begun[0], begun[1]

    def ask(messages: Any, stop: Any, kwargs: Mapping[str, Any]) -> AIMessage:
        return _wait(*begin(messages, stop, kwargs))

    async def aask(messages: Any, stop: Any, kwargs: Mapping[str, Any]) -> AIMessage:
        return await _await(*begin(messages, stop, kwargs))

    return streaming.Answering(model, ask=ask, aask=aask)


def _stream(
    self: BaseChatModel,
    input: Any,
    config: RunnableConfig | None = None,
    *,
    stop: list[str] | None = None,
    **kwargs: Any,
) -> Iterator[AIMessageChunk]:
    metadata = ensure_config(config).get("metadata")
    routed = _route(metadata)
    if (
        routed is None
        or not routed[0].run.responder.delegates
        or not self._should_stream(async_api=False, **{**kwargs, "stream": True})
    ):  # a model that cannot stream is invoked, and found again there
        if routed is None and self._should_stream(async_api=False, **{**kwargs, "stream": True}):
            pass_on(type(self).__name__, metadata)
        model = self if routed is None else _streams(self, metadata, kwargs)
        yield from _originals["stream"](model, input, config, stop=stop, **kwargs)
        return
    begun = _begin(self, self._convert_input(input).to_messages(), stop, metadata, kwargs)
    if begun is not None and isinstance(begun[1], Delegate):
        yield from _delegated_stream(begun[1], self, input, config, stop, kwargs)


async def _astream(
    self: BaseChatModel,
    input: Any,
    config: RunnableConfig | None = None,
    *,
    stop: list[str] | None = None,
    **kwargs: Any,
) -> AsyncIterator[AIMessageChunk]:
    metadata = ensure_config(config).get("metadata")
    routed = _route(metadata)
    if (
        routed is None
        or not routed[0].run.responder.delegates
        or not self._should_stream(async_api=True, **{**kwargs, "stream": True})
    ):
        if routed is None and self._should_stream(async_api=True, **{**kwargs, "stream": True}):
            pass_on(type(self).__name__, metadata)
        model = self if routed is None else _streams(self, metadata, kwargs)
        async for chunk in _originals["astream"](model, input, config, stop=stop, **kwargs):
            yield chunk
        return
    begun = _begin(self, self._convert_input(input).to_messages(), stop, metadata, kwargs)
    if begun is not None and isinstance(begun[1], Delegate):
        stream = _adelegated_stream(begun[1], self, input, config, stop, kwargs)
        async for chunk in stream:
            yield chunk


def _iter_events(
    self: BaseChatModel,
    messages: list[BaseMessage],
    *,
    run_manager: Any,
    stream: Any,
    stop: list[str] | None = None,
    **kwargs: Any,
) -> Iterator[Any]:
    begun = _begin(self, messages, stop, run_manager and run_manager.metadata, kwargs)
    if begun is None:
        yield from _originals["_iter_v2_events"](
            self, messages, run_manager=run_manager, stream=stream, stop=stop, **kwargs
        )
        return
    run, answer = begun
    if isinstance(answer, Delegate):
        # The callbacks of the run get the events below, so the model is asked without them.
        result = _delegated(answer, self, messages, stop, None, kwargs)
        message = _whole(result.generations[0].message)
    else:
        message = _wait(run, answer)
    for event in streaming.events_of(message, stream.message_id):
        stream.dispatch(event)
        run_manager.on_stream_event(event)
        yield event


async def _aiter_events(
    self: BaseChatModel,
    messages: list[BaseMessage],
    *,
    run_manager: Any,
    stream: Any,
    stop: list[str] | None = None,
    **kwargs: Any,
) -> AsyncIterator[Any]:
    begun = _begin(self, messages, stop, run_manager and run_manager.metadata, kwargs)
    if begun is None:
        async for event in _originals["_aiter_v2_events"](
            self, messages, run_manager=run_manager, stream=stream, stop=stop, **kwargs
        ):
            yield event
        return
    run, answer = begun
    if isinstance(answer, Delegate):
        result = await _adelegated(answer, self, messages, stop, None, kwargs)
        message = _whole(result.generations[0].message)
    else:
        message = await _await(run, answer)
    for event in streaming.events_of(message, stream.message_id):
        stream.dispatch(event)
        await run_manager.on_stream_event(event)
        yield event
