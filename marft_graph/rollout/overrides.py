"""Chat-model classes of their own ways: those that override what `intercept` replaces.

A subclass with a `_generate_with_cache` of its own would answer past the replacement on
`BaseChatModel`. While a run is active the class's method first asks whether a run answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from langchain_core.language_models.chat_models import BaseChatModel

SYNC, ASYNC = "_generate_with_cache", "_agenerate_with_cache"
_originals: dict[tuple[type, str], Any] = {}


def follow(
    passes: Callable[[BaseChatModel, Any], bool],
    own_way: Callable[[], AbstractContextManager[None]],
) -> None:
    """Meet the calls of overriding classes; `leave` puts them back.

    Args:
        passes: whether a call, with these metadata, is left to the model; it is told of it.
        own_way: entered while the class's own method runs.
    """
    for kind in _classes(BaseChatModel):
        for name in (SYNC, ASYNC):
            method = kind.__dict__.get(name)
            if method is not None and (kind, name) not in _originals:
                _originals[kind, name] = method
                make = _asynchronous if name == ASYNC else _synchronous
                setattr(kind, name, make(method, passes, own_way))


def leave() -> None:
    """The classes are as they were."""
    for (kind, name), method in _originals.items():
        setattr(kind, name, method)
    _originals.clear()


def _classes(kind: type) -> Iterator[type]:
    inner: type
    for inner in kind.__subclasses__():
        yield inner
        yield from _classes(inner)


def _metadata(kwargs: dict[str, Any]) -> Any:
    manager = kwargs.get("run_manager")
    return manager and manager.metadata


def _synchronous(method: Any, passes: Any, own_way: Any) -> Any:
    @functools.wraps(method)
    def generate(self: BaseChatModel, *args: Any, **kwargs: Any) -> Any:
        if not passes(self, _metadata(kwargs)):
            return BaseChatModel._generate_with_cache(self, *args, **kwargs)
        with own_way():
            return method(self, *args, **kwargs)

    return generate


def _asynchronous(method: Any, passes: Any, own_way: Any) -> Any:
    @functools.wraps(method)
    async def generate(self: BaseChatModel, *args: Any, **kwargs: Any) -> Any:
        if not passes(self, _metadata(kwargs)):
            return await BaseChatModel._agenerate_with_cache(self, *args, **kwargs)
        with own_way():
            return await method(self, *args, **kwargs)

    return generate
