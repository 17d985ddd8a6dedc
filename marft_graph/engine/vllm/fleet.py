"""The state of several vLLM servers: which of them may be asked, and which adapters they have.

A server is *up* while it answers and has every adapter that may be asked for. One that fails gets
no more calls until it has been found well and given its adapters again. Lives in one event loop;
who is asked what is the pool's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from marft_graph.engine.vllm.endpoint import (
    Adapter,
    Answer,
    Endpoint,
    Probe,
    ServerFailure,
    UnknownModel,
)
from marft_graph.engine.vllm.server import ServerProcess
from marft_graph.errors import EngineError, MarftError

logger = logging.getLogger(__name__)

_STRIKES = 3
"""Unusable answers in a row after which a server is left alone for a while."""
_LEAST_DELAY, _LEAST_REST, _MOST_REST = 0.1, 1.0, 60.0


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a process that neither starts nor stops a server finds it."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    """Of a server that a run started; None: the environment has it."""


@dataclass(eq=False, slots=True)
class Server:
    """One server and what is known of it."""

    endpoint: Endpoint
    process: ServerProcess | None = None
    """Where the server is ours."""
    is_up: bool = False
    has_served: bool = False
    is_missed: bool = False
    """Whether its absence was told."""
    reason: str = "it has not answered yet"
    """Why it is not up."""
    refusal: MarftError | None = None
    """Why it will never be up again."""
    base: str = ""
    """Name under which it serves the base model."""
    context: int | None = None
    """Most tokens that prompt and completion may have together, where it says so."""
    scales_logprobs: bool = True
    """Whether its log-probs are those at the call's temperature."""
    adapters: set[str] = field(default_factory=set)
    running: set[asyncio.Task[Answer]] = field(default_factory=set)
    strikes: int = 0
    delay: float = 0.0
    """Seconds until it is looked at again."""
    doubt: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is to be looked at now."""

    @property
    def address(self) -> ServerAddress:
        """Where others find it."""
        key = None if self.process is None else self.process.api_key
        return ServerAddress(self.endpoint.url, key)


class Fleet:
    """Looks after servers, from `watch` on.

    Args:
        servers: in any state; processes of ours are started.
        patience: seconds that a server may take to load an adapter, and that all may be away.
        probe_seconds: between two looks at a server that is up.
        changed: called when a server comes up, and when there is a verdict.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        patience: float,
        probe_seconds: float,
        changed: Callable[[], None],
    ) -> None:
        self.servers = tuple(servers)
        self.verdict: MarftError | None = None
        """Why no server can be asked, once all were away for too long."""
        self.lost = 0
        """How often a server was lost."""
        self._patience = patience
        self._probe_seconds = probe_seconds
        self._probe_timeout = 2 * probe_seconds
        self._changed = changed
        self._adapters: dict[str, Adapter] = {}
        self._deadline: asyncio.TimerHandle | None = None
        self._probe = Probe((), ())

    async def watch(self, probe: Probe) -> None:
        """Keep the servers' states true, for ever; `probe` tells whether they serve the base."""
        self._probe = probe
        self._start_deadline()
        await asyncio.gather(*(self._watch_one(server) for server in self.servers))

    def note_success(self, server: Server) -> None:
        """A server gave a usable answer."""
        server.strikes, server.delay = 0, 0.0

    def note_failure(self, server: Server, failure: ServerFailure) -> None:
        """Draw conclusions on a server from a call that failed."""
        if isinstance(failure, UnknownModel):
            server.adapters.clear()
        if failure.is_lost or isinstance(failure, UnknownModel):
            if server.is_up:
                server.delay = 0.0
                self._doubt(server, str(failure))
            return
        server.strikes += 1
        if server.strikes >= _STRIKES:
            server.strikes = 0
            server.delay = min(_MOST_REST, max(_LEAST_REST, 2 * server.delay))
            self._lose(server, str(failure))

    # Adapters

    def wants(self, adapter: Adapter) -> bool:
        """Whether every server that is up is to have an adapter."""
        return adapter.name in self._adapters

    async def load(self, adapters: Sequence[Adapter]) -> None:
        """Give adapters to the servers that are up; the others get them before they are."""
        self._adapters |= {adapter.name: adapter for adapter in adapters}

        async def give(server: Server) -> None:
            try:
                await self._give_adapters(server)
            except ServerFailure as failure:
                self._doubt(server, str(failure))
            except MarftError as refusal:
                self._refuse(server, refusal)

        await asyncio.gather(*(give(server) for server in self.servers if server.is_up))

    async def unload(self, adapters: Sequence[Adapter]) -> None:
        """Take adapters that nobody asks for from all servers."""
        for adapter in adapters:
            self._adapters.pop(adapter.name, None)

        async def take(server: Server, adapter: Adapter) -> None:
            server.adapters.discard(adapter.name)
            with contextlib.suppress(ServerFailure):  # whoever watches it will find out
                await server.endpoint.unload(adapter.name, self._probe_timeout)

        await asyncio.gather(*(take(s, a) for s in self.servers if s.is_up for a in adapters))

    async def _give_adapters(self, server: Server) -> None:
        while missing := [a for name, a in self._adapters.items() if name not in server.adapters]:
            await server.endpoint.load(missing[0], self._patience)
            server.adapters.add(missing[0].name)

    # One server

    async def _watch_one(self, server: Server) -> None:
        """Keep a server's state true, until it refuses for good."""
        while server.refusal is None:
            if server.is_up:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._probe_seconds):
                        await server.doubt.wait()
            server.doubt.clear()
            try:
                if server.is_up:
                    await server.endpoint.check_health(self._probe_timeout)
                else:
                    await asyncio.sleep(server.delay)
                    await self._admit(server)
            except ServerFailure as failure:
                if server.is_up:  # looked at once more before its calls are given up
                    self._doubt(server, str(failure))
                else:
                    self._lose(server, str(failure))
                    server.delay = min(self._probe_seconds, max(_LEAST_DELAY, 2 * server.delay))
            except MarftError as refusal:
                self._refuse(server, refusal)
            except Exception as error:  # calls must not wait for a server that nobody watches
                logger.exception("looking after %s failed", server.endpoint.url)
                self._refuse(server, EngineError(f"{server.endpoint.url}: {error!r}"))

    async def _admit(self, server: Server) -> None:
        """Let a server take calls, once it is well and has its adapters."""
        if server.process is not None:
            server.process.ensure_running()
        await server.endpoint.check_health(self._probe_timeout)
        models = await server.endpoint.models(self._probe_timeout)
        server.base, server.context = models.base, models.context
        for name in (server.adapters & models.adapters) - self._adapters.keys():
            await server.endpoint.unload(name, self._probe_timeout)  # it was away when they ended
        server.adapters = set(models.adapters)
        if not server.has_served:
            server.scales_logprobs = await server.endpoint.probe(server.base, self._probe)
        await self._give_adapters(server)
        server.has_served = True
        if server.process is not None:
            server.process.has_served = True
        if server.is_missed:
            logger.warning("the vLLM server %s is back", server.endpoint.url)
        server.is_missed, server.is_up, self.verdict = False, True, None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._changed()

    def _doubt(self, server: Server, reason: str) -> None:
        """Give a server no more calls until it has been looked at."""
        server.reason, server.is_up = reason, False
        server.doubt.set()

    def _lose(self, server: Server, reason: str) -> None:
        """Take a server out, say so once, and let its calls go elsewhere."""
        self._doubt(server, reason)
        is_starting = server.process is not None and not server.has_served
        if not server.is_missed and not is_starting:
            server.is_missed = True
            self.lost += 1
            up = sum(other.is_up for other in self.servers)
            logger.warning(
                "a vLLM server cannot be used (%d of %d can): %s", up, len(self.servers), reason
            )
        for task in server.running:
            task.cancel()
        if not any(other.is_up for other in self.servers):
            self._start_deadline()

    def _refuse(self, server: Server, refusal: MarftError) -> None:
        """Use a server never again."""
        server.refusal = refusal
        self._lose(server, str(refusal))
        if all(other.refusal is not None for other in self.servers):
            self._give_up()

    def _start_deadline(self) -> None:
        if self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self._patience, self._give_up)

    def _give_up(self) -> None:
        """Say why no server can be asked; a server that comes back takes it back."""
        reasons = "; ".join(
            server.reason + ("" if server.process is None else f" (see {server.process.log})")
            for server in self.servers
        )
        if all(server.refusal is not None for server in self.servers):
            first = self.servers[0].refusal
            single = len(self.servers) == 1
            self.verdict = (
                first if single and first else EngineError(f"no vLLM server can be used: {reasons}")
            )
        else:
            self.verdict = EngineError(
                f"no vLLM server has answered for {self._patience:g} seconds (engine_patience): "
                f"{reasons}"
            )
        self._changed()
