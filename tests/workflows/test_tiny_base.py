"""The tiny base is small, loads like any model, speaks its languages, and is uncoordinated."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workflows.tiny_base import build
from workflows.tiny_base.languages import ROLES, TOOLS, conversation, spelled

FOLDER = Path(__file__).parents[2] / "workflows" / "tiny_base"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_it_is_a_qwen2_of_at_most_four_megabytes(model) -> None:
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 4_000_000


@pytest.mark.parametrize("text", ["7+5", "naïve 日本語 🙂", "a\tb\n\n c", " leading", ""])
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_template_renders_roles_tools_and_calls(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
            ],
        },
        {"role": "tool", "content": "3"},
    ]
    text = tokenizer.apply_chat_template(
        messages, tools=TOOLS, add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|system|>add(a,b) sub(a,b) <|end|><|system|>S<|end|><|user|>U<|end|>"
        '<|assistant|><tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|end|>'
        "<|tool|>3<|end|><|assistant|>"
    )


def test_it_is_competent_but_its_agents_do_not_agree_on_a_notation(model, tokenizer) -> None:
    measured = build.measure(model, tokenizer)
    assert build.shortcomings(measured) == []
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, share in measured.items():  # the README's table says what is in the file
        assert f"| {name} | {share:.2f} |" in readme


def test_every_number_of_the_languages_can_be_spelled() -> None:
    words = [spelled(number) for number in range(40)]
    assert len(set(words)) == 40
    assert spelled(39) == "thirty nine"


def test_every_role_ends_with_an_answer_of_the_assistant() -> None:
    rng = random.Random(0)
    for role in ROLES:
        for _ in range(50):
            messages, _tools = role(rng)
            assert messages[-1]["role"] == "assistant"
            assert messages[-1]["content"]
    assert json.dumps(conversation(random.Random(7))) == json.dumps(conversation(random.Random(7)))


def test_pretraining_follows_its_seed() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        tokenizer = build.make_tokenizer()
        model = build.make_model(tokenizer)
        build.pretrain(model, tokenizer, steps=20, batch=4, seed=5)
        weights.append(model.model.layers[0].mlp.up_proj.weight.detach().clone())
    assert torch.equal(*weights)
