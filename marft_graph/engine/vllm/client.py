"""Sampling at vLLM servers that another process looks after: versions are asked for, never made.

The learner loads and unloads adapters. A worker's client finds out that a server has the version
that it is to sample from, and takes no completion of another one.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import dataclass, replace

from marft_graph.engine.base import ChatCodec, Completion, GenerationRequest
from marft_graph.engine.vllm.calls import Publication, ServedModel, VersionedCalls
from marft_graph.engine.vllm.endpoint import Adapter, Endpoint, Probe, ServerFailure
from marft_graph.engine.vllm.fleet import Server, ServerAddress
from marft_graph.engine.vllm.pool import ServerPool
from marft_graph.errors import EngineError


@dataclass(frozen=True, slots=True)
class ServersForWorkers:
    """What a process needs to know to sample at servers that another one looks after."""

    model: ServedModel
    addresses: tuple[ServerAddress, ...]
    probe: Probe


class _LookingEndpoint(Endpoint):
    """An endpoint that changes nothing at its server: adapters are there, or they are not."""

    async def load(self, adapter: Adapter, timeout: float) -> None:
        """Return if the server has the adapter.

        Raises:
            ServerFailure: it does not have it now.
        """
        models = await self.models(timeout)
        if adapter.name not in models.adapters:
            raise ServerFailure(
                f"{self.url} does not have {adapter.name}, which this run's learner loads; it has "
                f"{', '.join(sorted(models.adapters)) or 'no adapter'}"
            )

    async def unload(self, name: str, timeout: float) -> None:
        """Leave the server as it is."""


class VersionClient:
    """An `Engine` at servers that another process publishes to; thread-safe.

    Args:
        servers: what that process says of them.
        in_flight, patience: as in `ServerPool`.
        timeout: seconds that a completion may take.
    """

    def __init__(
        self, servers: ServersForWorkers, *, in_flight: int, patience: float, timeout: float
    ) -> None:
        self._model = servers.model
        self._pool = ServerPool(
            [_looked_at(address, timeout) for address in servers.addresses],
            in_flight=in_flight,
            patience=patience,
        )
        self._calls = VersionedCalls(servers.model, self._pool, lambda publication: None)
        self._pool.start(servers.probe)

    def use(self, publication: Publication) -> None:
        """Ask for these adapters from now on.

        Raises:
            EngineError: no server has them, or came to have them in time.
        """
        old = self._calls.published
        adapters = publication.own_adapters()
        self._pool.load(adapters)
        self._calls.use(replace(publication, users=0))
        if old is not None:
            self._pool.unload(old.own_adapters())

    def codec(self, agent: str | None) -> ChatCodec:
        """The codec of the base model behind all agents."""
        return self._model.codec

    def submit(self, request: GenerationRequest) -> Future[Completion]:
        """Queue a request for the version in use.

        Raises:
            EngineError: as in `VersionedCalls.submit`; also where the base itself is asked for,
                which only the learner's process loads.
            PromptTooLongError, ConfigError: as in `VersionedCalls.submit`.
        """
        if request.agent is None:
            raise EngineError("a rollout worker asks for agents, and this request is for the base")
        return self._calls.submit(request)

    def close(self) -> None:
        """Fail what waits and close connections."""
        self._pool.close()


def _looked_at(address: ServerAddress, timeout: float) -> Server:
    """A server of ours is asked directly, others as the environment says (its key, its proxy)."""
    found = address.api_key is None
    key = os.environ.get("VLLM_API_KEY", "") if address.api_key is None else address.api_key
    return Server(_LookingEndpoint(address.url, api_key=key, timeout=timeout, trust_env=found))
