"""What an episode may not share: its app's stores, checkpointers and caches.

While an episode runs, every LangGraph graph that it starts, wherever its code starts one, is given
the episode's own: instead of each store a copy of what it holds in memory, else an empty one;
instead of each checkpointer an empty one in memory; instead of caches of nodes and of model
answers none. The user's objects are not written to, and only stores in memory are read.

Graphs find their episode as model calls do, by the run's id in the config or by the context. What a
node keeps outside of LangGraph (a global dict, a database of its own) is not known here.
"""

from __future__ import annotations

import contextvars
import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from langchain_core.caches import BaseCache as AnswerCache
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import chat_models, llms
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.cache.base import BaseCache
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.pregel import Pregel
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore

from marft_graph.rollout.limits import limit_of_steps
from marft_graph.rollout.scopes import RUN_KEY

logger = logging.getLogger(__name__)

StoreContents = Mapping[Any, Mapping[str, Any]]
"""By namespace (a tuple of names, or one name): values by key, each a dict."""

PATCHED_NAMES = (
    "_defaults",
    "get_state",
    "aget_state",
    "get_state_history",
    "aget_state_history",
    "bulk_update_state",
    "abulk_update_state",
    "clear_cache",
    "aclear_cache",
)
"""What is replaced on `Pregel` while an episode runs: whatever reads its stores and savers."""


class _EpisodeSaver(InMemorySaver):
    """A checkpointer of one episode."""


class Isolation:
    """An episode's own stores and checkpointers.

    Args:
        contents: what its store begins with, a store or contents by namespace; None: what the app's
            own store holds, where that is one in memory.
        recursion_limit: steps of a graph for which the app sets no limit.
    """

    def __init__(
        self, contents: BaseStore | StoreContents | None = None, *, recursion_limit: int
    ) -> None:
        self._recursion_limit = recursion_limit
        self._contents = None if contents is None else store_with(contents)
        self._lock = threading.Lock()
        self._views: dict[int, tuple[Any, Any]] = {}
        self._stores: dict[int, tuple[BaseStore, BaseStore]] = {}
        self._savers: dict[int, tuple[Any, _EpisodeSaver]] = {}
        self.has_static_interrupts = False
        """Whether a graph that ran stops before or after some of its nodes."""

    def view(self, graph: Any) -> Any:
        """The graph as the episode runs it; the same in every run of it within the episode."""
        with self._lock:
            known = self._views.get(id(graph))
            if known is not None:
                return known[1]
            view = copy.copy(graph)
            if isinstance(view.checkpointer, BaseCheckpointSaver):
                view.checkpointer = self._saver_for(view.checkpointer)
            view.store = self._store_for(view.store)
            view.cache = None
            self._views[id(graph)] = self._views[id(view)] = graph, view
            if view.interrupt_before_nodes or view.interrupt_after_nodes:
                self.has_static_interrupts = True
            return view

    def with_saver(self, graph: Any) -> Any:
        """The graph with a checkpointer, which it needs to go on after an interrupt."""
        if graph.checkpointer:
            return graph
        serde = JsonPlusSerializer(pickle_fallback=True)
        return graph.copy(update={"checkpointer": _EpisodeSaver(serde=serde)})

    def config(self, config: Any) -> None:
        """Bound the steps of a run, and keep a parent's cache from it."""
        config["recursion_limit"] = limit_of_steps(config, self._recursion_limit)

    def _saver_for(self, saver: BaseCheckpointSaver[Any]) -> _EpisodeSaver:
        if isinstance(saver, _EpisodeSaver):
            return saver
        known = self._savers.get(id(saver))
        if known is None:
            known = self._savers[id(saver)] = saver, _EpisodeSaver(serde=saver.serde)
        return known[1]

    def _store_for(self, store: BaseStore | None) -> BaseStore | None:
        if self._contents is not None:
            return self._contents
        if store is None:
            return None
        known = self._stores.get(id(store))
        if known is None:
            known = self._stores[id(store)] = store, _copy_of(store)
            self._stores[id(known[1])] = known[1], known[1]
        return known[1]


def store_with(contents: BaseStore | StoreContents) -> BaseStore:
    """A store of its own with some contents; they are copied."""
    if isinstance(contents, BaseStore):
        return _copy_of(contents)
    store = InMemoryStore()
    for namespace, values in contents.items():
        names = (namespace,) if isinstance(namespace, str) else tuple(namespace)
        for key, value in values.items():
            store.put(names, key, copy.deepcopy(value))
    return store


_named: set[type] = set()


def _copy_of(store: BaseStore) -> BaseStore:
    """What a store in memory holds, in a new one with the same index; else an empty one."""
    if not isinstance(store, InMemoryStore):
        if type(store) not in _named:
            _named.add(type(store))
            logger.warning(
                "the app's store is a %s: episodes neither read nor write it, each begins with an "
                "empty one in memory; `store=` says what it begins with",
                type(store).__name__,
            )
        return InMemoryStore()
    new = copy.copy(store)
    # As they are: putting the items in again would ask the embedding model for each.
    new._data = copy.deepcopy(store._data)
    new._vectors = copy.deepcopy(store._vectors)
    return new


class _NoAnswers(AnswerCache):
    """Stands in for LangChain's global cache: knows no answer and keeps none."""

    def lookup(self, prompt: str, llm_string: str) -> None:
        return None

    def update(self, prompt: str, llm_string: str, return_val: Any) -> None:
        return None

    def clear(self, **kwargs: Any) -> None:
        return None


_current: contextvars.ContextVar[Isolation | None] = contextvars.ContextVar(
    "marft_isolation", default=None
)
_isolations: dict[str, Isolation] = {}
_originals: dict[str, Any] = {}
_get_llm_cache = get_llm_cache
_no_answers = _NoAnswers()
_lock = threading.Lock()


@contextmanager
def isolated(isolation: Isolation, run_id: str) -> Iterator[None]:
    """Let graphs run inside the `with` block, or with the run's id, use what is the episode's."""
    with _lock:
        if not _isolations:
            _install()
        _isolations[run_id] = isolation
    token = _current.set(isolation)
    try:
        yield
    finally:
        _current.reset(token)
        with _lock:
            del _isolations[run_id]
            if not _isolations:
                _restore()


def _active(config: Any = None) -> Isolation | None:
    """The isolation of the episode that the calling code belongs to."""
    for known in (config, var_child_runnable_config.get()):
        metadata = known.get("metadata") if isinstance(known, Mapping) else None
        isolation = _isolations.get((metadata or {}).get(RUN_KEY, ""))
        if isolation is not None:
            return isolation
    return _current.get()


def without_cache(model: BaseChatModel) -> BaseChatModel:
    """The app's own model as an episode asks it: without a cache that was given to it alone."""
    if _active() is None or not isinstance(model.cache, AnswerCache):
        return model
    return model.model_copy(update={"cache": False})


def _install() -> None:
    for name in PATCHED_NAMES:
        _originals[name] = Pregel.__dict__[name]
        setattr(Pregel, name, _seen_from_episode(name))
    for module in (chat_models, llms):
        module.get_llm_cache = _answer_cache  # type: ignore[attr-defined]


def _restore() -> None:
    for name in PATCHED_NAMES:
        setattr(Pregel, name, _originals[name])
    for module in (chat_models, llms):
        module.get_llm_cache = _get_llm_cache  # type: ignore[attr-defined]


def _answer_cache() -> AnswerCache | None:
    return _get_llm_cache() if _active() is None else _no_answers


def _seen_from_episode(name: str) -> Callable[..., Any]:
    """A method of `Pregel` that works on the episode's view of the graph."""
    original = _originals[name]

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = args[0] if args else kwargs.get("config")
        isolation = _active(config)
        if isolation is None:
            return original(self, *args, **kwargs)
        if name != "_defaults":
            return original(isolation.view(self), *args, **kwargs)
        isolation.config(config)
        # A graph inside another one would be handed that one's cache.
        return tuple(
            None if isinstance(value, BaseCache) else value
            for value in original(isolation.view(self), *args, **kwargs)
        )

    return method
