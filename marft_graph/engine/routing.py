"""Agents on different base models: one local engine for each base, behind one face."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

from marft_graph.config import TrainConfig
from marft_graph.engine.base import ChatCodec, Completion, Gate, GenerationRequest
from marft_graph.engine.local import LocalEngine
from marft_graph.errors import EngineError
from marft_graph.policy.lora import AdapterValues
from marft_graph.policy.team import Team


class RoutingEngine:
    """Hands each request to the engine of its agent."""

    def __init__(self, engines: Mapping[str, LocalEngine]) -> None:
        self._engine_of = dict(engines)
        self._engines = tuple(dict.fromkeys(engines.values()))

    def codec(self, agent: str | None) -> ChatCodec:
        """The codec of the agent's base model."""
        return self._of(agent).codec(agent)

    def submit(self, request: GenerationRequest) -> Future[Completion]:
        """Queue a request at its agent's engine."""
        return self._of(request.agent).submit(request)

    def publish(self, version: int, values: AdapterValues | None = None) -> None:
        """Sample from the weights of all agents as they are, or as they were when copied."""
        for engine in self._engines:
            engine.publish(version, values)

    def use_gate(self, gate: Gate | None) -> None:
        """Let every engine wait for the gate."""
        for engine in self._engines:
            engine.use_gate(gate)

    def close(self) -> None:
        """Stop every engine's thread."""
        for engine in self._engines:
            engine.close()

    def _of(self, agent: str | None) -> LocalEngine:
        if agent not in self._engine_of:
            raise EngineError(f"no agent {agent!r}; there are {', '.join(self._engine_of)}")
        return self._engine_of[agent]


def local_engine(team: Team, config: TrainConfig | None = None) -> LocalEngine | RoutingEngine:
    """The engine in this process for all agents of a team, as the settings have it."""
    config = config or TrainConfig()
    engines = [
        LocalEngine(
            policy,
            max_batch_size=config.max_batch_size,
            cache_gib=config.cache_gib,
            cpu_threads=config.cpu_threads,
        )
        for policy in team.policies
    ]
    if len(engines) == 1:
        return engines[0]
    by_policy = dict(zip(team.policies, engines, strict=True))
    return RoutingEngine({agent: by_policy[team.of(agent)] for agent in team.agents})
