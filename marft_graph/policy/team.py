"""All agents' policies: one `Policy` for each base model, however many agents stand on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from marft_graph.agents import Agent
from marft_graph.config import TrainConfig
from marft_graph.policy.adapters import Policy
from marft_graph.policy.lora import AdapterValues
from marft_graph.ranks import Sharding


@dataclass(frozen=True, eq=False, slots=True)
class Weights:
    """One version of all adapters, to sample from; two are the same only if they are one object."""

    version: int
    """Updates that made them."""
    values: AdapterValues | None = None
    """Copies of them; None: they are those in the team until its next update."""


class Team:
    """The agents of a run and the policies that hold their adapters.

    Args:
        policies: one for each base model, no agent in two of them.
        agents: names of all agents, in the order in which they are listed everywhere.
    """

    def __init__(self, policies: Sequence[Policy], agents: Sequence[str]) -> None:
        self.policies = tuple(policies)
        self.agents = tuple(agents)
        self._policy_of = {agent: policy for policy in policies for agent in policy.agents}

    @classmethod
    def load(
        cls, agents: Sequence[Agent], config: TrainConfig, sharding: Sharding | None = None
    ) -> Team:
        """Load each base model once, with the adapters of its agents.

        With `sharding` the bases are divided among all processes; each loads them into host memory.

        Raises:
            ModelError, ConfigError: as in `Policy.load`.
        """
        by_base: dict[str, list[Agent]] = {}
        for agent in agents:
            by_base.setdefault(agent.base_model, []).append(agent)
        policies = [
            Policy.load(
                base,
                own,
                device=config.device if sharding is None else "cpu",
                dtype=config.dtype,
                quantization=config.quantization,
                trust_remote_code=config.trust_remote_code,
                special_tokens_in_text=config.special_tokens_in_text,
                seed=config.seed,
            )
            for base, own in by_base.items()
        ]
        if config.gradient_checkpointing:
            for policy in policies:
                policy.checkpoint_gradients()
        if sharding is not None:
            for policy in policies:
                policy.shard(sharding)
        return cls(policies, [agent.name for agent in agents])

    @classmethod
    def from_folders(
        cls,
        folders: Mapping[str, tuple[str, Path]],
        *,
        device: str = "auto",
        dtype: str,
        special_tokens_in_text: bool = False,
    ) -> Team:
        """Adapters in PEFT format (agent -> base model and folder), for inference.

        Raises:
            ModelError: a base or an adapter cannot be loaded.
        """
        by_base: dict[str, dict[str, Path]] = {}
        for agent, (base, folder) in folders.items():
            by_base.setdefault(base, {})[agent] = folder
        policies = [
            Policy.from_folders(
                base,
                own,
                device=device,
                dtype=dtype,
                special_tokens_in_text=special_tokens_in_text,
            )
            for base, own in by_base.items()
        ]
        return cls(policies, list(folders))

    @property
    def decode_threads(self) -> int | None:
        """As in `Policy`, for all of them."""
        return min(filter(None, (policy.decode_threads for policy in self.policies)), default=None)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Let this process make passes of its own through all bases, see `Policy.whole`."""
        with contextlib.ExitStack() as stack:
            for policy in self.policies:
                stack.enter_context(policy.whole())
            yield

    def of(self, agent: str) -> Policy:
        """The policy that holds an agent's adapter."""
        return self._policy_of[agent]

    def copy_weights(self) -> AdapterValues:
        """All adapters as they are now."""
        return {
            parameter: parameter.detach().clone()
            for agent in self.agents
            for parameter in self.parameters(agent)
        }

    def parameters(self, agent: str) -> list[nn.Parameter]:
        """An agent's adapter weights."""
        return self.of(agent).adapter_parameters[agent]
