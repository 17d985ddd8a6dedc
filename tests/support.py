"""Small models that tests make for themselves, so that none is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from marft_graph import Trainer
from marft_graph.agents import Agent, agents_of
from marft_graph.config import TrainConfig

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_random_model(
    folder: Path,
    *,
    seed: int = 0,
    context: int = 256,
    template: str | None = TEMPLATE,
    without: str = "",
) -> Path:
    """A two-layer Qwen2 with random weights and a byte-level tokenizer, saved to `folder`.

    Its tokens are all bytes but those in `without`.
    """
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*without})
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", extra_special_tokens=roles
    )
    if template is not None:
        tokenizer.chat_template = template
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.2,  # sharp enough that tokens differ in probability
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_agents(names: Sequence[str], model: Path, **settings: object) -> tuple[Agent, ...]:
    """Agents on one base model with the default settings, or others."""
    return agents_of(names, TrainConfig(base_model=str(model), **settings))


def weights(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """A copy of every adapter's weights."""
    return {
        agent: [parameter.detach().clone() for parameter in trainer.team.parameters(agent)]
        for agent in trainer.team.agents
    }
