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
from marft_graph.policy.beginning import SharedBeginning

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
    policy: Policy,
    ids_BT: Tensor,
    lengths: list[int],
    agents: list[str | None],
    beginning: SharedBeginning | None = None,
) -> Tensor:
    """States (B, H) of each row's last token, decoded on top of a cache of those before it."""
    prefilled = DynamicCache(config=policy.config)
    cache = RowCache(policy.config, policy.device, max_tokens=1000)
    last_B = torch.tensor([length - 1 for length in lengths])
    cache.reserve(len(lengths), max(lengths))
    with policy.using_rows(agents):
        policy.hidden(ids_BT, cache=prefilled, use_cache=True)
        cache.insert(0, prefilled, range(len(lengths)), [np.arange(n - 1) for n in lengths])
        cache.prepare(last_B, max(lengths) - 1)
        return policy.step(
            ids_BT[torch.arange(len(lengths)), last_B],
            position_B=last_B,
            is_seen_BL=torch.arange(max(lengths)) <= last_B.unsqueeze(-1),
            cache=cache,
            beginning=beginning,
        )


@pytest.mark.parametrize("folded", [step._FOLDED_PARAMETERS, 0])
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("agents", [["a", None, "b"], ["b"] * 3, [None] * 3], ids=str)
def test_a_step_gives_the_states_of_the_models_own_pass(
    kind: str,
    agents: list[str | None],
    folded: int,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, "_FOLDED_PARAMETERS", folded)
    policy = load(kind, tiny_model, tmp_path)
    assert (policy._step is not None) == (kind != "gemma")  # its norms add 1 to their weights
    lengths = [9, 5, 7]
    ids_BT = torch.randint(1, policy.vocabulary, (3, 9))
    with policy.using_rows(agents):
        own = policy.hidden(ids_BT)[torch.arange(3), [length - 1 for length in lengths]]
    ours = next_states(policy, ids_BT, lengths, agents)
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)


def test_adapters_that_are_published_again_are_folded_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    policy = load("qwen2", tiny_model, tmp_path)
    assert policy._step is not None
    assert policy._step._folds
    ids_BT = torch.randint(1, policy.vocabulary, (2, 6))
    before = next_states(policy, ids_BT, [6, 6], ["a", "b"])
    for parameter in policy.adapter_parameters["b"]:
        parameter.data += 0.1
    torch.testing.assert_close(next_states(policy, ids_BT, [6, 6], ["a", "b"]), before)
    policy.publish()
    with policy.using_rows(["a", "b"]):
        own = policy.hidden(ids_BT)[:, -1]
    after = next_states(policy, ids_BT, [6, 6], ["a", "b"])
    torch.testing.assert_close(after, own, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_rows_that_begin_alike_read_their_beginning_once(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    policy = load(kind, tiny_model, tmp_path)
    ids_BT = torch.randint(1, policy.vocabulary, (5, 12))
    groups, agents = [[0, 3, 4], [1], [2]], ["a", "b", None, "a", "a"]
    ids_BT[[3, 4], :6] = ids_BT[0, :6]
    lengths = [12, 7, 9, 8, 12]
    beginning = SharedBeginning(groups, 6, policy.device)
    with policy.using_rows(agents):
        own = policy.hidden(ids_BT)[torch.arange(5), [length - 1 for length in lengths]]
    ours = next_states(policy, ids_BT, lengths, agents, beginning)
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)
    assert set(beginning._read) == {0, 1}
    wrong = SharedBeginning([[0, 1, 2, 3, 4]], 6, policy.device)
    assert (next_states(policy, ids_BT, lengths, agents, wrong) - own).abs().max() > 0.01


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
