"""A sharded base gives what a whole one gives; here its one part is in one process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from marft_graph import ranks as ranks_module
from marft_graph.config import TrainConfig
from marft_graph.errors import ConfigError, ModelError
from marft_graph.learn.update import Learner
from marft_graph.policy.adapters import Policy
from marft_graph.policy.sharding import ShardedLayers
from marft_graph.policy.team import Team
from marft_graph.ranks import Ranks, Sharding, check_ranks
from tests.learn.test_sizing import long_episodes
from tests.learn.test_update import AGENTS, learner, same, sampled_episodes, weights
from tests.support import make_agents

ALONE = Sharding(torch.device("cpu"), 1, is_resharded=True, is_offloaded=False)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group with this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded_learner(model: Path, ranks: Ranks | None = None, **more: Any) -> tuple[Policy, Learner]:
    config = TrainConfig(base_model=str(model), learning_rate=1e-2, **more)
    team = Team.load(make_agents(AGENTS, model, **more), config, ALONE)
    return team.policies[0], Learner(team, config, ranks=ranks)


def are_parts(policy: Policy) -> set[bool]:
    """Whether weights of the decoder's layers are parts, adapters left out."""
    named = policy._decoder.layers.named_parameters()
    return {isinstance(weight, DTensor) for name, weight in named if "lora_" not in name}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_on_a_sharded_base_is_the_one_on_a_whole_base(
    tiny_model: Path, checkpointing: bool
) -> None:
    settings = {"gradient_checkpointing": checkpointing}
    policy, own = sharded_learner(tiny_model, **settings)
    other, plain = learner(tiny_model, **settings)
    episodes = sampled_episodes(other, 4)
    assert own.update(episodes, 1) == plain.update(episodes, 1)
    assert are_parts(policy) == {True}
    for agent in AGENTS:
        assert same(weights(policy, agent), weights(other, agent))
        assert not any(isinstance(weight, DTensor) for weight in policy.adapter_parameters[agent])
    assert own.state().keys() == plain.state().keys()


@pytest.mark.usefixtures("group")
def test_layers_are_whole_while_they_are_sampled_from(tiny_model: Path) -> None:
    policy, _ = sharded_learner(tiny_model)
    with policy.whole():
        assert are_parts(policy) == {False}
        sampled_episodes(policy, 1)
        assert are_parts(policy) == {False}  # many passes later
    assert are_parts(policy) == {True}


@pytest.mark.usefixtures("group")
def test_an_idle_pass_adds_nothing(tiny_model: Path) -> None:
    policy, _ = sharded_learner(tiny_model)
    with policy.using("actor"):
        policy.hidden(torch.tensor([[1, 2, 3]])).sum().backward()
    before = [weight.grad.clone() for weight in policy.adapter_parameters["actor"]]
    policy.idle_pass("actor")
    assert same(before, [weight.grad for weight in policy.adapter_parameters["actor"]])


class OneOfTwo(Ranks):
    """One of two processes, of which nothing comes and to which nothing goes."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.count = index, 2

    def together(self, work: Callable[[], Sequence[Any]]) -> list[Any]:
        return list(work())

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def add_gradients(self, parameters: object) -> None:
        pass


@pytest.mark.usefixtures("group")
def test_processes_make_equally_many_passes(tiny_model: Path, monkeypatch: Any) -> None:
    forward, own = Learner._forward, 0

    def counted(*args: Any, **how: Any) -> Any:
        nonlocal own
        own += 1
        return forward(*args, **how)

    monkeypatch.setattr(Learner, "_forward", counted)
    episodes = long_episodes(3)  # three micro-batches, to score and to learn from
    passes: list[list[bool]] = []
    owns = []
    for index in (0, 1):
        policy, learning = sharded_learner(tiny_model, OneOfTwo(index), microbatch_tokens=64)
        seen: list[bool] = []
        policy._decoder.register_forward_pre_hook(
            lambda *_, seen=seen: seen.append(torch.is_grad_enabled())  # type: ignore[misc]
        )
        own = 0
        learning.update(episodes, 1)
        owns.append(own)
        passes.append(seen)
    assert owns == [4, 2]
    assert passes == [[False, False, True, True]] * 2


def test_a_decoder_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no `layers`"):
        ShardedLayers(torch.nn.Linear(2, 2), [], ALONE)


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config"),
    ],
)
def test_what_is_not_used_is_refused_with_what_to_use(
    monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        ConfigError, match=rf"ask for .*{name}.*FSDP with fsdp_version 2 or DeepSpeed"
    ):
        Ranks()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version 1; it must be 2"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "use the setting gradient_checkpointing"),
    ],
)
def test_settings_of_fsdp_that_are_not_supported_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    for name, given in {"FSDP_VERSION": "2", variable: value}.items():
        monkeypatch.setenv(name, given)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ConfigError, match=message):
        ranks_module._sharding(torch.device("cpu"), 2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ZERO_STAGE": "1"}, None),
        ({}, None),  # accelerate's default is stage 2
        ({"ZERO_STAGE": "3"}, (True, False)),
        ({"ZERO_STAGE": "3", "OFFLOAD_PARAM_DEVICE": "cpu"}, (True, True)),
    ],
)
def test_only_stage_3_of_deepspeed_divides_the_base(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: tuple[bool, bool] | None
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in given.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    found = ranks_module._sharding(torch.device("cpu"), 2)
    assert (found and (found.is_resharded, found.is_offloaded)) == expected
    alone = Ranks()  # DeepSpeed's package is not needed
    assert (alone.count, alone.sharding) == (1, None)


def test_a_deepspeed_configuration_of_its_own_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}
    own = tmp_path / "zero3.json"
    own.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(own))
    with pytest.raises(ConfigError, match="offload_param_device 'nvme'; it must be none or cpu"):
        ranks_module._sharding(torch.device("cpu"), 2)
    own.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="settings of DeepSpeed: "):
        ranks_module._sharding(torch.device("cpu"), 2)


def test_the_settings_of_fsdp_are_accelerates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert ranks_module._sharding(torch.device("cpu"), 2) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    found = ranks_module._sharding(torch.device("cpu"), 2)
    assert found == dataclasses.replace(ALONE, count=2, is_resharded=False)


def test_a_quantized_base_is_not_sharded() -> None:
    ranks = OneOfTwo(0)
    config = TrainConfig(base_model="m", quantization="4bit")
    check_ranks(ranks, config)
    ranks.sharding = ALONE
    with pytest.raises(ConfigError, match="quantization is 4bit, and the base is divided"):
        check_ranks(ranks, config)


def test_several_processes_use_servers_that_run_already() -> None:
    config = TrainConfig(base_model="m", engine="vllm", engine_urls=("http://gpu-1:8000",))
    check_ranks(OneOfTwo(1), config)
    with pytest.raises(ConfigError, match="no engine_urls"):
        check_ranks(OneOfTwo(1), config.replace(engine_urls=()))
