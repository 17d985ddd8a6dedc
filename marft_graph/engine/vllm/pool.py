"""Several vLLM servers behind one face: calls go to a server that is up, and on to another.

An event loop in a thread of its own. Knows nothing of policies or versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from marft_graph.engine.vllm.endpoint import Adapter, Answer, Probe, Prompt, ServerFailure
from marft_graph.engine.vllm.fleet import Fleet, Server, ServerAddress
from marft_graph.errors import (
    CallTimeoutError,
    ConfigError,
    EngineError,
    MarftError,
    PromptTooLongError,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_ATTEMPTS = 4


class ServerPool:
    """Spreads calls over servers; its public methods are thread-safe.

    Args:
        servers: in any state.
        in_flight: most calls at one server at once; others wait here.
        patience: seconds that a server may take to start, and that all may be away, before calls
            fail.
        probe_seconds: between two looks at a server that is up.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        in_flight: int = 256,
        patience: float = 300.0,
        probe_seconds: float = 5.0,
    ) -> None:
        self._fleet = Fleet(
            servers, patience=patience, probe_seconds=probe_seconds, changed=self._wake_all
        )
        self._in_flight = in_flight
        self._retries = 0
        self._probe = Probe((), ())
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="marft-vllm", daemon=True)
        self._is_closed = False

    def start(self, probe: Probe) -> None:
        """Begin to look after the servers; those of ours are started, those that do not serve the
        base that `probe` was made with are not used.
        """
        self._probe = probe
        self._thread.start()

    def submit(
        self, adapter: Adapter, prompt: Prompt, timeout: float | None = None
    ) -> Future[Answer]:
        """Queue a call to an adapter, which is loaded where it was not yet.

        The future fails with an `EngineError` that has each server's reason where none gave a
        usable answer, with `PromptTooLongError` or `ConfigError` where none could, and with
        `CallTimeoutError` where there is none after `timeout` seconds, other tries and the time in
        the queue included. Cancelled or too late, it takes its request back from the server.
        """
        return self._schedule(self._complete_within(adapter, prompt, timeout))

    def load(self, adapters: Sequence[Adapter]) -> None:
        """Give every server these adapters; returns once one server or more has them.

        Raises:
            EngineError: none could load them.
        """
        self._schedule(self._load(adapters)).result()

    def unload(self, adapters: Sequence[Adapter]) -> Future[None]:
        """Take adapters that nobody asks for from all servers; done when that was tried."""
        return self._schedule(self._fleet.unload(adapters))

    def stats(self) -> dict[str, int]:
        """Servers, those that are up, and how often so far calls were tried again, servers lost
        and servers of ours started again.
        """
        servers = self._fleet.servers
        return {
            "servers": len(servers),
            "servers_up": sum(server.is_up for server in servers),
            "servers_lost": self._fleet.lost,
            "servers_restarted": sum(s.process.restarts for s in servers if s.process is not None),
            "calls_retried": self._retries,
        }

    def addresses(self) -> tuple[ServerAddress, ...]:
        """Where another process finds the servers."""
        return tuple(server.address for server in self._fleet.servers)

    def close(self) -> None:
        """Fail what waits, close connections and stop servers of ours."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._thread.ident is None:
            self._loop.close()
        else:
            self._loop.call_soon_threadsafe(self._loop.stop)
            if threading.current_thread() is not self._thread:
                self._thread.join(timeout=60)
        for server in self._fleet.servers:
            if server.process is not None:
                server.process.stop()

    # The thread

    def _run(self) -> None:
        try:
            self._spawn(self._fleet.watch(self._probe))
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._end())
            self._loop.close()

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._fleet.servers:
            await server.endpoint.close()

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself keeps none alive
        task.add_done_callback(self._tasks.discard)
        return task

    def _schedule(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run work in the loop; its future ends with a `MarftError` whatever goes wrong."""
        future: Future[_T] = Future()

        def begin() -> None:
            task = self._spawn(_deliver(work, future))

            def end(done: Future[_T]) -> None:
                if done.cancelled():
                    with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                        self._loop.call_soon_threadsafe(task.cancel)

            future.add_done_callback(end)

        try:
            if self._is_closed:
                raise RuntimeError
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError:
            work.close()
            raise EngineError("the engine is closed") from None
        return future

    # Calls

    async def _load(self, adapters: Sequence[Adapter]) -> None:
        await self._fleet.load(adapters)
        await self._place(set())
        self._wake_one()  # the place was only looked at

    async def _complete_within(
        self, adapter: Adapter, prompt: Prompt, timeout: float | None
    ) -> Answer:
        try:
            async with asyncio.timeout(timeout):
                return await self._complete(adapter, prompt)
        except TimeoutError as error:
            raise CallTimeoutError(
                f"a call of {adapter.name} was not answered within {timeout:g} seconds "
                "(call_timeout)"
            ) from error

    async def _complete(self, adapter: Adapter, prompt: Prompt) -> Answer:
        if not self._fleet.wants(adapter):
            await self._load([adapter])
        failures: list[str] = []
        failed: set[Server] = set()
        for _ in range(_ATTEMPTS):
            server = await self._place(failed)
            try:
                return await self._ask(server, adapter, prompt)
            except ServerFailure as failure:
                failures.append(str(failure))
                failed.add(server)
                self._retries += 1
                self._fleet.note_failure(server, failure)
        told = "; ".join(dict.fromkeys(failures))
        raise EngineError(f"no usable answer of {adapter.name} in {_ATTEMPTS} tries: {told}")

    async def _ask(self, server: Server, adapter: Adapter, prompt: Prompt) -> Answer:
        task = self._spawn(server.endpoint.complete(adapter.name, _fitted(server, prompt)))
        server.running.add(task)
        try:
            answer = await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():  # the caller's wish, or our end
                raise
            raise ServerFailure(server.reason, is_lost=True) from None
        finally:
            server.running.discard(task)
            self._wake_one()
        self._fleet.note_success(server)
        return answer

    async def _place(self, avoid: set[Server]) -> Server:
        """A server that is up and has room, rather one that is not to be avoided.

        Raises:
            MarftError: the fleet's verdict that there will be none.
        """
        is_next = not self._waiters
        while True:
            if self._fleet.verdict is not None:
                raise self._fleet.verdict
            ready = [s for s in self._fleet.servers if s.is_up and len(s.running) < self._in_flight]
            if is_next and ready:
                return min(ready, key=lambda s: (s in avoid, len(s.running)))
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake_one()  # the place that this call was given goes to another
                raise
            is_next = True

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        for _ in range(len(self._waiters)):
            self._wake_one()


async def _deliver(work: Coroutine[Any, Any, _T], future: Future[_T]) -> None:
    """Put the outcome of work into a future that somebody in another thread waits for."""
    try:
        result = await work
    except asyncio.CancelledError:
        error: BaseException = EngineError("the engine was closed")
    except MarftError as known:
        error = known
    except Exception as unknown:  # nobody may wait for ever
        logger.exception("the vLLM engine failed")
        error = EngineError(f"the vLLM engine failed: {type(unknown).__name__}: {unknown}")
        error.__cause__ = unknown
    else:
        if future.set_running_or_notify_cancel():
            future.set_result(result)
        return
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def _fitted(server: Server, prompt: Prompt) -> Prompt:
    """The prompt with a token limit that the server accepts.

    Raises:
        PromptTooLongError: the server has no room for an answer.
        ConfigError: the server does not give the log-probs that the call is sampled from.
    """
    sampling = prompt.sampling
    if not server.scales_logprobs and sampling.temperature not in (0.0, 1.0):
        raise ConfigError(
            f"{server.endpoint.url} gives log-probs at temperature 1, and a call is sampled at "
            f"temperature {sampling.temperature:g}: start the server with --logprobs-mode "
            "processed_logprobs, or set temperature to 1"
        )
    if server.context is None:
        return prompt
    room = server.context - len(prompt.ids)
    if room < 1:
        raise PromptTooLongError(
            f"a prompt has {len(prompt.ids)} tokens; the context of {server.context} at "
            f"{server.endpoint.url} (its --max-model-len) needs room for an answer"
        )
    return replace(prompt, sampling=replace(sampling, max_tokens=min(sampling.max_tokens, room)))
