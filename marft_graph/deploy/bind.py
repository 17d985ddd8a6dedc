"""Adapters back into the app: the same graph, its trained nodes answered by their adapters.

In this process, or on a server (`deploy.server`). The app's code does not change; nodes without an
adapter keep their own model.
"""

from __future__ import annotations

import copy
import hashlib
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs
from langgraph.pregel import Pregel

from marft_graph.deploy.exported import exported_team
from marft_graph.deploy.manifest import Manifest, read_manifest
from marft_graph.deploy.untrained import Untrained
from marft_graph.engine.base import Completion, Engine
from marft_graph.engine.routing import local_engine
from marft_graph.errors import ConfigError, ExportError
from marft_graph.graph.compile import as_compiled, compile_graph
from marft_graph.graph.flex_mg import resolve_nodes
from marft_graph.names import agent_path
from marft_graph.policy.devices import check_device
from marft_graph.policy.grammar import require_grammar_library
from marft_graph.rollout.answers import message_for, prompt_of, request_for
from marft_graph.rollout.callsite import CallSite
from marft_graph.rollout.intercept import intercepting
from marft_graph.rollout.recorder import stable_seed
from marft_graph.rollout.responder import InterceptedCall, Pending, Responder
from marft_graph.rollout.settings import check_at_least
from marft_graph.rollout.structure import raise_as_own_model

ANSWERED_BY = "marft_answered_by"
"""Key in a run's metadata: `adapters`, or `own models`."""


def bind(
    graph: Any,
    export_dir: str | Path,
    *,
    temperature: float = 0.0,
    base_model: str | None = None,
    device: str = "auto",
    base_url: str | None = None,
    api_key: str = "none",
    timeout: float = 60.0,
    fallback: bool = True,
    share: float = 1.0,
) -> BoundGraph:
    """The app, its trained nodes answered by the exported adapters: in this process or on a server.

    Each run's metadata say who answers it (`marft_answered_by`: `adapters` or `own models`), which
    LangSmith and other callbacks show.

    Args:
        graph: the app that was trained, or a builder of it.
        export_dir: what `Trainer.export` or `marft-graph export` wrote.
        temperature: used where the app sets none; 0 takes the most likely token.
        base_model: where the base model is now, if not where the manifest says.
        device: torch device of the base model.
        base_url: of an OpenAI-compatible server that has the adapters under their names, such as
            `http://localhost:8000/v1`; nothing is then loaded here. Tools, structured output and
            streaming pass through. Needs the extra `openai`.
        api_key: of the server.
        timeout: seconds that the server may take for an answer.
        fallback: let the app's own model answer a call that the server fails on; it is logged.
        share: part of the runs that the adapters answer, the others being answered by the app's own
            models. All runs of one `thread_id` are answered alike.

    Returns:
        A Runnable with the graph's input and output: `invoke`, `ainvoke`, `stream`, `batch`, ...

    Raises:
        ExportError: the folder is damaged, or holds adapters for nodes that the graph lacks.
        ModelError: the base model cannot be loaded.
        ConfigError: a number is out of range, or an extra is missing: `openai` for `base_url`, or
            `grammar` where training constrained structured output.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}; it must be between 0 and 1")
    check_at_least("temperature", temperature, 0)
    if not timeout > 0:
        raise ConfigError(f"timeout is {timeout}; it must be above 0")
    if base_url is None:
        check_device(device)
    app = as_compiled(graph)
    folder = Path(export_dir)
    manifest = read_manifest(folder)
    try:
        resolve_nodes(compile_graph(app), tuple(manifest.nodes), found_before=True)
    except LookupError as error:
        raise ExportError(f"{folder} was exported from another graph: {error}") from error
    if base_url is not None:
        from marft_graph.deploy.server import ServerResponder

        server = ServerResponder(
            manifest,
            base_url=base_url,
            api_key=api_key,
            timeout=timeout,
            temperature=temperature,
            fallback=fallback,
        )
        return BoundGraph(app, server, share)
    if manifest.constrain_output:
        require_grammar_library()
    responder = _Adapters(
        local_engine(exported_team(manifest, folder, device=device, base_model=base_model)),
        manifest,
        temperature=temperature,
    )
    return BoundGraph(app, responder, share)


class _Adapters(Responder):
    """Answers each trained node's calls from its adapter."""

    def __init__(self, engine: Engine, manifest: Manifest, *, temperature: float) -> None:
        self._engine = engine
        self._adapters = manifest.nodes
        self._temperature = temperature
        self._max_new_tokens = manifest.max_new_tokens
        self._constrain_output = manifest.constrain_output
        self._schema_in_prompt = manifest.schema_in_prompt
        self._untrained = Untrained(manifest)
        self._lock = threading.Lock()
        self._repeats: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def for_run(self) -> Self:
        """The same for one run, which begins to count how often a task asks the same anew.

        So a task that asks one thing several times gets several samples, and a run that is gone on
        with asks what it asked before with the seeds that it had.
        """
        own = copy.copy(self)
        own._lock, own._repeats = threading.Lock(), Counter()
        return own

    def agent_for(self, node: str) -> str | None:
        """The node's adapter, where one was exported."""
        return self._adapters.get(agent_path(node))

    def passed(self, site: CallSite) -> None:
        """Tell of a node whose own model answers, once."""
        self._untrained.passed(site)

    def respond(self, call: InterceptedCall) -> Pending:
        """Submit the call; sampled answers differ from call to call, greedy ones do not."""
        codec = self._engine.codec(call.agent)
        prompt = prompt_of(
            call,
            codec,
            max_new_tokens=self._max_new_tokens,
            schema_in_prompt=self._schema_in_prompt,
        )
        asked = (call.namespace, prompt[1])
        with self._lock:
            repeat = self._repeats[asked]
            self._repeats[asked] += 1
        request = request_for(
            call,
            codec,
            prompt=prompt,
            seed=stable_seed(*asked, repeat),
            temperature=self._temperature if call.temperature is None else None,
            max_new_tokens=self._max_new_tokens,
            constrain_output=self._constrain_output,
        )

        def finish(completion: Completion) -> AIMessage:
            message = message_for(call, codec, request, completion)
            raise_as_own_model(call, message, is_cut_off=completion.finish_reason == "length")
            return message

        return Pending(self._engine.submit(request), finish)


class BoundGraph(Runnable[Any, Any]):
    """A LangGraph app whose trained nodes are answered by their adapters."""

    def __init__(
        self, graph: Pregel[Any, Any, Any, Any], responder: Responder, share: float = 1.0
    ) -> None:
        self.graph = graph
        """The app itself, unchanged; run directly it uses its own models."""
        self._responder = responder
        self._share = share

    @property
    def compiled(self) -> Pregel[Any, Any, Any, Any]:
        """The bound app as a compiled graph, for LangGraph's servers (`langgraph dev`)."""
        return bound_copy(self)

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the app once; the final state."""
        with self.answering(config) as given:
            return self.graph.invoke(input, given, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the app once; the final state."""
        with self.answering(config) as given:
            return await self.graph.ainvoke(input, given, **kwargs)

    def stream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        """Stream the run, as the app's own `stream` does."""
        # The generator's caller shares our context between two chunks, so the run is known by its
        # config alone.
        with self.answering(config, context=False) as given:
            yield from self.graph.stream(input, given, **kwargs)

    async def astream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Stream the run, as the app's own `astream` does."""
        with self.answering(config, context=False) as given:
            async for chunk in self.graph.astream(input, given, **kwargs):
                yield chunk

    @contextmanager
    def answering(
        self, config: RunnableConfig | None, *, context: bool = True
    ) -> Iterator[RunnableConfig]:
        """Let the adapters answer the run that gets the yielded config, if it is to be theirs."""
        if not self._is_for_adapters(config):
            yield _with_metadata(config, {ANSWERED_BY: "own models"})
            return
        responder = self._responder
        if isinstance(responder, _Adapters):
            responder = responder.for_run()
        with intercepting(responder, context=context) as metadata:
            yield _with_metadata(config, metadata | {ANSWERED_BY: "adapters"})

    def _is_for_adapters(self, config: RunnableConfig | None) -> bool:
        """Whether a run is among the share; a conversation is one way or the other throughout."""
        if self._share in (0.0, 1.0):
            return self._share == 1.0
        thread = (ensure_config(config).get("configurable") or {}).get("thread_id")
        if thread is None:
            return random.random() < self._share
        digest = hashlib.sha256(str(thread).encode()).digest()
        return int.from_bytes(digest[:8]) < self._share * 2**64


def bound_copy(bound: BoundGraph) -> Pregel[Any, Any, Any, Any]:
    """A copy of the app whose runs are answered as those of `bound` are.

    Everything that runs a compiled graph goes through its `stream` or `astream`, so a class of its
    own that replaces these two is enough, and stays in use when a server copies the graph.
    """
    kind = type(bound.graph)

    class Bound(kind):  # type: ignore[misc, valid-type]
        def stream(self, input: Any, config: Any = None, **kwargs: Any) -> Iterator[Any]:
            with bound.answering(config, context=False) as given:
                yield from super().stream(input, given, **kwargs)

        async def astream(
            self, input: Any, config: Any = None, **kwargs: Any
        ) -> AsyncIterator[Any]:
            with bound.answering(config, context=False) as given:
                async for chunk in super().astream(input, given, **kwargs):
                    yield chunk

    copied = bound.graph.copy()
    copied.__class__ = Bound
    return copied


def _with_metadata(config: RunnableConfig | None, metadata: dict[str, str]) -> RunnableConfig:
    return merge_configs(ensure_config(config), {"metadata": metadata})
