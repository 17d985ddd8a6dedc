"""Driving the app from its input to its end: its events, its last state, and where it stands.

It calls the app as the user would, by `astream`, or by `stream` in a worker thread for an app that
has parts which only work synchronously. Where the app is interrupted, the reviewer's answers let it
go on in the same thread of the same checkpointer.
"""

from __future__ import annotations

import asyncio
import contextvars
import uuid
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any, cast

from langgraph.pregel import Pregel
from langgraph.types import StateSnapshot

from marft_graph.rollout.inputs import AppCall
from marft_graph.rollout.isolation import Isolation
from marft_graph.rollout.review import Review
from marft_graph.rollout.trace import Event

App = Pregel[Any, Any, Any, Any]


class AppRun:
    """One run of the app.

    Args:
        graph: the app.
        call: what it is called with.
        isolation: of the episode.
        review: who answers its interrupts.
        is_sync: whether to call it synchronously.
        workers: where synchronous apps run.
    """

    def __init__(
        self,
        graph: App,
        call: AppCall,
        isolation: Isolation,
        review: Review,
        *,
        is_sync: bool,
        workers: Executor,
    ) -> None:
        self.events: list[Event] = []
        self.state: Any = None
        """What the app's state was last."""
        self.is_waiting = False
        """Whether the app has stopped and waits for a person."""
        self.waiting: StateSnapshot | None = None
        """Where it stands then, if it has a checkpointer."""
        self.resumed = 0
        """How often it has gone on after an interrupt."""
        stops = bool(graph.interrupt_before_nodes or graph.interrupt_after_nodes)
        if review.reviewer is not None or stops or _stops_inside(graph):
            graph = isolation.with_saver(graph)
        self.is_saved = bool(graph.checkpointer)
        """Whether the app has a checkpointer."""
        self._graph = graph
        self._call = call
        self._isolation = isolation
        self._review = review
        self._is_sync = is_sync
        self._workers = workers

    async def play(self, *, metadata: Mapping[str, str], callbacks: list[Any], steps: int) -> None:
        """Run the app until it ends, or waits for somebody who is not there.

        Args:
            metadata: of the run, by which its calls are found.
            callbacks: follow its tasks.
            steps: its recursion limit.
        """
        config: Any = {
            "configurable": {"thread_id": str(uuid.uuid4()), **self._call.configurable},
            "metadata": dict(metadata),
            "callbacks": callbacks,
            "recursion_limit": steps,
        }
        value = self._call.value
        while True:
            self.is_waiting = False
            await self._stream(value, config)
            self.waiting = self._standing(config)
            if self.waiting is None or self._review.reviewer is None:
                return
            if self.resumed >= self._review.limit:
                return
            value = await self._review.resume(self.waiting)
            self.resumed += 1

    async def _stream(self, value: Any, config: Any) -> None:
        how: dict[str, Any] = {"stream_mode": ["tasks", "values"], "subgraphs": True}
        if self._call.context is not None:
            how["context"] = self._call.context
        if not self._is_sync:
            async for item in self._graph.astream(value, config, **how):
                self._see(item)
            return

        def stream() -> None:
            for item in self._graph.stream(value, config, **how):
                self._see(item)

        context = contextvars.copy_context()
        await asyncio.wrap_future(self._workers.submit(context.run, stream))

    def _see(self, item: Any) -> None:
        namespace, mode, payload = cast("tuple[tuple[str, ...], str, Any]", item)
        self.events.append(Event(namespace, mode, payload))
        if mode == "values" and not namespace:
            self.state = payload
        elif mode == "tasks" and payload.get("interrupts"):
            self.is_waiting = True

    def _standing(self, config: Any) -> StateSnapshot | None:
        """Where the app stands, if it has not ended."""
        if not self.is_saved or not (self.is_waiting or self._isolation.has_static_interrupts):
            return None
        snapshot = self._graph.get_state(config)
        self.is_waiting = bool(snapshot.next)
        return snapshot if self.is_waiting else None


def _stops_inside(graph: App, above: frozenset[int] = frozenset()) -> bool:
    """Whether a graph that is a node, or one inside it, is compiled to stop."""
    inner = [node.bound for node in graph.nodes.values() if isinstance(node.bound, Pregel)]
    return any(
        bool(one.interrupt_before_nodes or one.interrupt_after_nodes)
        or _stops_inside(one, above | {id(graph)})
        for one in inner
        if id(one) not in above
    )
