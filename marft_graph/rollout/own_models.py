"""Calls that the app's own models are about to answer: nobody's adapter does.

The rule: whoever runs the app is told of such a call before anything leaves for the model, and may
refuse it. That holds for plain language models (`BaseLLM`) too, which no adapter can answer. Code
that asks models beside the app (rewards, judges, callbacks) says so with `scopes.outside_runs`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from langchain_core.language_models import BaseLLM
from langchain_core.runnables.config import ensure_config

from marft_graph.errors import EpisodeTimeoutError, UndecidedCallError
from marft_graph.rollout import callsite, scopes
from marft_graph.rollout.callsite import CallSite
from marft_graph.rollout.scopes import Place


def pass_on(model: str, metadata: Mapping[str, Any] | None) -> None:
    """Tell every run around a call that its own model is about to answer.

    Args:
        model: what kind of model it is.
        metadata: of the call's config.

    Raises:
        UndecidedCallError: a run refuses it, or an episode runs and the call belongs to no run.
        EpisodeTimeoutError: the run has ended.
    """
    calling = scopes.places(metadata)
    for place in calling:
        refuse_late(place)
        if place.run.is_active:
            place.run.responder.passed(site_of(place, model))
    if calling or scopes.is_outside():
        return
    run = scopes.current_run()
    if run is not None:
        if run.is_active and run.responder.is_strict:
            run.responder.passed(site_of(None, model))
    elif any(run.responder.is_strict for run in scopes.active_runs()):
        raise UndecidedCallError(
            f"{site_of(None, model)}, in a thread that was started before any episode: which node "
            "it works for cannot be told, so neither an adapter nor the own model answers. Start "
            "the thread, or submit the work to its pool, from the node (both bring the node's "
            "context), or pass the node's `config` to the model",
            "",
        )


def site_of(place: Place | None, model: str) -> CallSite:
    """Where a call is made, for people."""
    function = ""
    if place is not None and place.graph is not None and place.task in place.graph.nodes:
        function = callsite.function_of(place.graph.nodes[place.task].bound)
    return CallSite("" if place is None else place.node, model, function, callsite.users_line())


def refuse_late(place: Place) -> None:
    """Refuse what a task of an episode asks after its end, or in a process of its own.

    Raises:
        EpisodeTimeoutError: the episode has ended.
        UndecidedCallError: nobody in this process can answer.
    """
    if place.run.responder.is_strict and place.run.process != os.getpid():
        raise UndecidedCallError(
            f"node {place.node!r} asks its model in a process that it has started: neither an "
            "adapter nor its own model answers there. Use threads (ThreadPoolExecutor, "
            "asyncio.to_thread) instead",
            place.node,
        )
    if place.run.responder.is_strict and not place.run.is_active:
        raise EpisodeTimeoutError(f"node {place.node!r} called its model after its run had ended")


# Plain language models


def _generate(self: BaseLLM, *args: Any, **kwargs: Any) -> Any:
    pass_on(_kind(self), _metadata_of(kwargs))
    return _originals["_generate_helper"](self, *args, **kwargs)


async def _agenerate(self: BaseLLM, *args: Any, **kwargs: Any) -> Any:
    pass_on(_kind(self), _metadata_of(kwargs))
    return await _originals["_agenerate_helper"](self, *args, **kwargs)


def _stream(self: BaseLLM, input: Any, config: Any = None, **kwargs: Any) -> Iterator[str]:
    if type(self)._stream is not BaseLLM._stream:  # else it is invoked, and met there
        pass_on(_kind(self), ensure_config(config).get("metadata"))
    yield from _originals["stream"](self, input, config, **kwargs)


async def _astream(
    self: BaseLLM, input: Any, config: Any = None, **kwargs: Any
) -> AsyncIterator[str]:
    kind = type(self)
    if kind._stream is not BaseLLM._stream or kind._astream is not BaseLLM._astream:
        pass_on(_kind(self), ensure_config(config).get("metadata"))
    async for chunk in _originals["astream"](self, input, config, **kwargs):
        yield chunk


def _kind(model: BaseLLM) -> str:
    return f"{type(model).__name__}, a plain language model, which no adapter can answer for"


def _metadata_of(kwargs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    managers = kwargs.get("run_managers") or ()
    return next((manager.metadata for manager in managers if manager is not None), None)


PATCHED_NAMES: Mapping[str, Callable[..., Any]] = {
    "_generate_helper": _generate,
    "_agenerate_helper": _agenerate,
    "stream": _stream,
    "astream": _astream,
}
"""What is replaced on `BaseLLM` while a run is active."""
_originals: dict[str, Any] = {}


def follow() -> None:
    """Begin to meet the calls of plain language models; `leave` puts all back."""
    for name, replacement in PATCHED_NAMES.items():
        _originals[name] = BaseLLM.__dict__[name]
        setattr(BaseLLM, name, replacement)


def leave() -> None:
    """Plain language models are as they were."""
    for name, original in _originals.items():
        setattr(BaseLLM, name, original)
