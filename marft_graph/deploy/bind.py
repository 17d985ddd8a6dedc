"""Adapters back into the app: the same graph, its trained nodes answered by their adapters.

The app's code does not change; nodes without an adapter keep their own model.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs
from langgraph.pregel import Pregel

from marft_graph.deploy.export import read_manifest
from marft_graph.engine.base import Engine
from marft_graph.engine.routing import local_engine
from marft_graph.errors import ExportError
from marft_graph.graph.compile import as_compiled, compile_graph
from marft_graph.graph.flex_mg import resolve_nodes
from marft_graph.names import agent_path
from marft_graph.policy.grammar import require_grammar_library
from marft_graph.policy.team import Team
from marft_graph.rollout.answers import message_for, request_for
from marft_graph.rollout.intercept import InterceptedCall, Pending, Responder, intercepting


def bind(
    graph: Any,
    export_dir: str | Path,
    *,
    temperature: float = 0.0,
    base_model: str | None = None,
    device: str = "auto",
) -> BoundGraph:
    """The app, its trained nodes answered by the exported adapters in this process.

    Args:
        graph: the app that was trained, or a builder of it.
        export_dir: what `Trainer.export` or `marft-graph export` wrote.
        temperature: used where the app sets none; 0 takes the most likely token.
        base_model: where the base model is now, if not where the manifest says.
        device: torch device of the base model.

    Returns:
        A Runnable with the graph's input and output: `invoke`, `ainvoke`, `stream`, `batch`, ...

    Raises:
        ExportError: the folder is damaged, or holds adapters for nodes that the graph lacks.
        ModelError: the base model cannot be loaded.
        ConfigError: training constrained structured output, and the extra `grammar` is missing.
    """
    app = as_compiled(graph)
    folder = Path(export_dir)
    manifest = read_manifest(folder)
    try:
        resolve_nodes(compile_graph(app), tuple(manifest.nodes), found_before=True)
    except LookupError as error:
        raise ExportError(f"{folder} was exported from another graph: {error}") from error
    if manifest.constrain_output:
        require_grammar_library()
    folders = manifest.folders(folder, base_model)
    responder = _Adapters(
        local_engine(
            Team.from_folders(
                folders,
                device=device,
                dtype=manifest.dtype,
                special_tokens_in_text=manifest.special_tokens_in_text,
            )
        ),
        adapters=manifest.nodes,
        temperature=temperature,
        max_new_tokens=manifest.max_new_tokens,
        constrain_output=manifest.constrain_output,
    )
    return BoundGraph(app, responder)


class _Adapters(Responder):
    """Answers each trained node's calls from its adapter."""

    def __init__(
        self,
        engine: Engine,
        *,
        adapters: Mapping[str, str],
        temperature: float,
        max_new_tokens: int,
        constrain_output: bool,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        self._constrain_output = constrain_output

    def agent_for(self, node: str) -> str | None:
        """The node's adapter, where one was exported."""
        return self._adapters.get(agent_path(node))

    def respond(self, call: InterceptedCall) -> Pending:
        """Submit the call; sampled answers differ from call to call, greedy ones do not."""
        codec = self._engine.codec(call.agent)
        request = request_for(
            call,
            codec,
            seed=int.from_bytes(hashlib.sha256(call.namespace.encode()).digest()[:8]),
            temperature=self._temperature if call.temperature is None else None,
            max_new_tokens=self._max_new_tokens,
            constrain_output=self._constrain_output,
        )
        future = self._engine.submit(request)
        return Pending(future, lambda completion: message_for(call, codec, request, completion))


class BoundGraph(Runnable[Any, Any]):
    """A LangGraph app whose trained nodes are answered by their adapters."""

    def __init__(self, graph: Pregel[Any, Any, Any, Any], responder: Responder) -> None:
        self.graph = graph
        """The app itself, unchanged; run directly it uses its own models."""
        self._responder = responder

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the app once; the final state."""
        with intercepting(self._responder) as metadata:
            return self.graph.invoke(input, _with_metadata(config, metadata), **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the app once; the final state."""
        with intercepting(self._responder) as metadata:
            return await self.graph.ainvoke(input, _with_metadata(config, metadata), **kwargs)

    def stream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        """Stream the run, as the app's own `stream` does."""
        # The generator's caller shares our context between two chunks, so the run is known by its
        # config alone.
        with intercepting(self._responder, context=False) as metadata:
            yield from self.graph.stream(input, _with_metadata(config, metadata), **kwargs)

    async def astream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Stream the run, as the app's own `astream` does."""
        with intercepting(self._responder, context=False) as metadata:
            stream = self.graph.astream(input, _with_metadata(config, metadata), **kwargs)
            async for chunk in stream:
                yield chunk


def _with_metadata(config: RunnableConfig | None, metadata: dict[str, str]) -> RunnableConfig:
    return merge_configs(ensure_config(config), {"metadata": metadata})
