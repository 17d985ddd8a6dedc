"""Agents from nodes: which adapter each node has, and with which settings.

An agent is what has an adapter: one node, or several that share it. Settings of single nodes
(`TrainConfig.per_node`) are joined here, and contradictions among nodes of one adapter refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marft_graph.config import NodeSettings, TrainConfig
from marft_graph.errors import ConfigError
from marft_graph.names import adapter_name


@dataclass(frozen=True, slots=True)
class Agent:
    """One adapter: the nodes that it answers and how it is made and trained."""

    name: str
    """As PEFT, file systems and vLLM know it."""
    nodes: tuple[str, ...]
    index: int
    """Position among all agents; with the run's seed it gives the adapter's first weights."""
    base_model: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    learning_rate: float
    start_from: Path | None
    """Folder of the adapter in PEFT format that is continued."""


def agents_of(nodes: Sequence[str], config: TrainConfig) -> tuple[Agent, ...]:
    """The agents behind some nodes, in the order of their first nodes.

    Raises:
        ConfigError: `per_node` names another node, nodes of one adapter contradict each other, or
            there is no adapter to continue.
    """
    for node in config.per_node:
        if node not in nodes:
            raise ConfigError(
                f"per_node names {node!r}, which is not trained; trained are {', '.join(nodes)}"
            )
    members: dict[str, list[str]] = {}
    for node in nodes:
        own = config.per_node.get(node)
        shared = own.adapter if own is not None else None
        members.setdefault(adapter_name(shared or node), []).append(node)
    return tuple(
        _agent(name, tuple(own), index, config) for index, (name, own) in enumerate(members.items())
    )


def adapters_of(agents: Sequence[Agent]) -> dict[str, str]:
    """Adapter name of every node."""
    return {node: agent.name for agent in agents for node in agent.nodes}


def base_model_of(nodes: Sequence[str], config: TrainConfig) -> str:
    """The base model under the adapter that some nodes share."""
    own = (config.per_node[node].base_model for node in nodes if node in config.per_node)
    return next((base for base in own if base is not None), config.base_model)


def _agent(name: str, nodes: tuple[str, ...], index: int, config: TrainConfig) -> Agent:
    own = _joined(name, nodes, config)
    start = _start_folder(name, own, config)
    rank, alpha, targets = own.lora_rank, own.lora_alpha, own.lora_targets
    if start is not None:
        saved = _saved_shape(name, start)
        for setting, given, had in zip(
            ("lora_rank", "lora_alpha", "lora_targets"), (rank, alpha, targets), saved, strict=True
        ):
            if given is not None and given != had:
                raise ConfigError(
                    f"{setting} of {name!r} is {given}, but the adapter in {start} has {had}; "
                    "leave it out to continue that adapter"
                )
        rank, alpha, targets = saved
    return Agent(
        name=name,
        nodes=nodes,
        index=index,
        base_model=base_model_of(nodes, config),
        rank=rank or config.lora_rank,
        alpha=alpha or config.lora_alpha,
        targets=targets or config.lora_targets,
        learning_rate=own.learning_rate or config.learning_rate,
        start_from=start,
    )


def _joined(name: str, nodes: tuple[str, ...], config: TrainConfig) -> NodeSettings:
    """What the nodes of one adapter ask for together."""
    joined: dict[str, tuple[str, object]] = {}
    for node in nodes:
        own = config.per_node.get(node, NodeSettings())
        for spec in dataclasses.fields(own):
            value = getattr(own, spec.name)
            if value is None or spec.name == "adapter":
                continue
            first, known = joined.setdefault(spec.name, (node, value))
            if known != value:
                raise ConfigError(
                    f"{first} and {node} share the adapter {name!r} but ask for {spec.name} "
                    f"{known} and {value}; give one of them"
                )
    return NodeSettings(**{field: value for field, (_, value) in joined.items()})  # type: ignore[arg-type]


def _start_folder(name: str, own: NodeSettings, config: TrainConfig) -> Path | None:
    if own.start_from is not None:
        folder = Path(os.path.expanduser(own.start_from))
    elif config.start_from is not None:
        folder = Path(os.path.expanduser(config.start_from)) / "adapters" / name
    else:
        return None
    if not os.path.isfile(folder / "adapter_config.json"):
        raise ConfigError(
            f"start_from: there is no adapter for {name!r} in {folder}; give an export folder "
            "(RUN/export), or for a node the folder that holds its adapter_config.json"
        )
    return folder.resolve()


def _saved_shape(name: str, folder: Path) -> tuple[int, float, tuple[str, ...]]:
    """Rank, alpha and targets of an adapter in PEFT format."""
    path = folder / "adapter_config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        targets = saved["target_modules"]
        names = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
        return int(saved["r"]), float(saved["lora_alpha"]), names
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"start_from of {name!r}: {path} is no LoRA adapter in PEFT format: {error!r}"
        ) from error
