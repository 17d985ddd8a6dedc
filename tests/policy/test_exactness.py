"""Bases that cannot be computed exactly are refused when they are loaded, with the reason."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from marft_graph.errors import ModelError
from marft_graph.policy import exactness
from marft_graph.policy.adapters import Policy, _with_fresh_adapter
from marft_graph.policy.exactness import refuse_by_config, refuse_by_copy
from tests.support import make_agents, save_random_model

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def saved(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model of a family, with the byte-level tokenizer."""
    save_random_model(folder)
    rows = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"vocab_size": rows, **SHAPE, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> Policy:
    return Policy.load(str(folder), make_agents(["a"], folder, **settings), device="cpu")


@pytest.mark.parametrize("kind", ["mistral", "phi3", "starcoder2"])
def test_a_window_shorter_than_the_context_is_refused_without_layer_types(
    tmp_path: Path, kind: str
) -> None:
    folder = saved(tmp_path, kind, sliding_window=64)
    with pytest.raises(ModelError, match=r"is refused: .*sliding window of 64 .* context of 128"):
        load(folder)


def test_a_window_as_long_as_the_context_is_computed_as_transformers_does(tmp_path: Path) -> None:
    folder = saved(tmp_path, "mistral", sliding_window=128)
    policy = load(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 200, (1, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), policy.using("a"):
        torch.testing.assert_close(
            policy.logits(policy.hidden(ids)), whole(ids).logits, atol=1e-4, rtol=1e-4
        )


REFUSED = [
    ("mixtral", {"sliding_window": 4096, "max_position_embeddings": 8192}, "sliding window"),
    ("llama4_text", {}, "chunk"),
    ("mamba", {}, "linear_attention"),
    ("qwen3_next", {}, "linear_attention"),
    ("jamba", {}, "linear_attention"),
    ("gpt_oss", {}, "sliding window"),
    ("gemma2", {"sliding_window": 8192}, "caps attention scores"),
    ("falcon", {"alibi": True}, "ALiBi"),
    ("bart", {}, "encoder"),
]


@pytest.mark.parametrize(("kind", "changes", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_a_config_says_is_enough(kind: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        refuse_by_config(AutoConfig.for_model(kind, **changes), kind)


@pytest.mark.parametrize("kind", ["bloom", "gptj"])
def test_a_family_without_fused_attention_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match="no fused attention"):
        refuse_by_copy(AutoConfig.for_model(kind), kind, _with_fresh_adapter)


def test_the_small_copy_shows_a_window_that_no_rule_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("mistral", sliding_window=4096)
    monkeypatch.setattr(exactness, "_reasons", lambda config: iter(()))
    refuse_by_config(config, "base")
    with pytest.raises(ModelError, match="logits differ"):
        refuse_by_copy(config, "base", _with_fresh_adapter)


SOME = ["llama", "qwen3", "olmo2", "gpt2"]
MORE = [
    *("qwen2", "gemma", "phi", "phi3", "granite", "cohere", "gpt_neox", "falcon", "opt", "biogpt"),
    *("stablelm", "smollm3", "glm", "persimmon", "ernie4_5", "helium", "arcee", "seed_oss"),
    *("qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "exaone4", "starcoder2"),
]


@pytest.mark.parametrize("kind", [*SOME, *(pytest.param(k, marks=pytest.mark.slow) for k in MORE)])
def test_families_are_computed_as_transformers_does(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    if getattr(config, "sliding_window", None):
        config.sliding_window = None
    exactness._checked.clear()
    refuse_by_copy(config, kind, _with_fresh_adapter)


def test_longrope_ends_the_context_where_it_would_change_cached_keys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = AutoConfig.for_model(
        "phi3", **SHAPE, original_max_position_embeddings=64, rope_parameters=rope
    )
    assert exactness.context_of(config) == 64
    assert "the context ends at 64 tokens" in caplog.text


def test_a_template_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.chat_template = "<|new|>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"template writes '<\|new\|>', token 263.* has 262 rows"):
        load(folder)


def test_experts_as_parameters_are_refused_and_experts_without_lora_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, "mixtral", num_local_experts=2, sliding_window=None)
    with pytest.raises(ModelError, match=r"fused experts .*give lora_targets"):
        load(folder)
    with caplog.at_level(logging.WARNING):
        load(folder, lora_targets=("q_proj", "v_proj"))
    assert "2 groups of experts of this mixture get no LoRA" in caplog.text
