"""One token per row in fewer operations: the same states as the model's own pass."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from marft_graph.agents import agents_of
from marft_graph.config import TrainConfig
from marft_graph.engine.cache import RowCache
from marft_graph.policy import step
from marft_graph.policy.adapters import Policy

AGENTS: dict[str, dict[str, object]] = {
    "a": {"lora_rank": 4},
    "b": {"lora_rank": 8, "lora_targets": ["k_proj", "up_proj", "o_proj"]},
}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 8},
    "qwen3": {},
    "gemma": {},
}


def load(kind: str, tiny_model: Path, folder: Path) -> Policy:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SHAPE | FAMILIES[kind])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = TrainConfig(base_model=str(folder), per_node=AGENTS)
    policy = Policy.load(str(folder), agents_of(AGENTS, settings), device="cpu")
    for module in policy.model.modules():
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            torch.nn.init.normal_(bias, std=0.1)
    for parameters in policy.adapter_parameters.values():
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.publish()
    return policy


def next_states(
    policy: Policy, ids_BT: Tensor, lengths: list[int], agents: list[str | None]
) -> Tensor:
    """States (B, H) of each row's last token, decoded on top of a cache of those before it."""
    prefilled = DynamicCache(config=policy.config)
    cache = RowCache(policy.config, policy.device, max_tokens=1000)
    last_B = torch.tensor([length - 1 for length in lengths])
    cache.reserve(len(lengths), max(lengths))
    with policy.using_rows(agents):
        policy.hidden(ids_BT, past_key_values=prefilled, use_cache=True)
        cache.insert(0, prefilled, range(len(lengths)), [np.arange(n - 1) for n in lengths])
        cache.prepare(last_B, max(lengths) - 1)
        return policy.step(
            ids_BT[torch.arange(len(lengths)), last_B],
            position_B=last_B,
            is_seen_BL=torch.arange(max(lengths)) <= last_B.unsqueeze(-1),
            cache=cache,
        )


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("agents", [["a", None, "b"], ["b"] * 3, [None] * 3], ids=str)
def test_a_step_gives_the_states_of_the_models_own_pass(
    kind: str, agents: list[str | None], tiny_model: Path, tmp_path: Path
) -> None:
    policy = load(kind, tiny_model, tmp_path)
    assert (policy._step is not None) == (kind != "gemma")  # its norms add 1 to their weights
    lengths = [9, 5, 7]
    ids_BT = torch.randint(1, policy.vocabulary, (3, 9))
    with policy.using_rows(agents):
        own = policy.hidden(ids_BT)[torch.arange(3), [length - 1 for length in lengths]]
    ours = next_states(policy, ids_BT, lengths, agents)
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)


def test_joined_weights_are_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    policy = load("qwen2", tiny_model, tmp_path)
    assert policy._step is not None
    joined = policy._step._layers[0]._qkv._weight
    attention = policy._decoder.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        weight = projection.get_base_layer().weight
        assert weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(
        attention.k_proj.get_base_layer().weight, saved["model.layers.0.self_attn.k_proj.weight"]
    )


def test_a_model_that_disagrees_decodes_by_its_own_pass(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(step, "_normed", lambda norm, x: x * norm.weight)
    with caplog.at_level(logging.WARNING):
        policy = load("llama", tiny_model, tmp_path)
    assert policy._step is None
    assert "LlamaModel decodes by its own forward pass" in caplog.text
    assert torch.isfinite(next_states(policy, torch.ones(1, 4).long(), [4], ["a"])).all()
