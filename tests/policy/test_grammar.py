"""Constrained output: what a schema allows, and what becomes of the distribution."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import marft_graph.policy.logprobs
from marft_graph.errors import ConfigError, ModelError
from marft_graph.policy.grammar import Grammars, require_grammar_library
from marft_graph.policy.logprobs import constrained, scaled_logprobs, token_logprobs
from tests.apps import Move

pytest.importorskip("xgrammar")

SCHEMA = json.dumps(Move.model_json_schema())
EXTRA_LOGITS = 9  # models pad their heads; such logits stand for no token


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> int:
    return len(tokenizer) + EXTRA_LOGITS


@pytest.fixture(scope="module")
def grammars(tokenizer, vocabulary: int) -> Grammars:
    return Grammars(tokenizer, vocabulary, frozenset({tokenizer.eos_token_id}))


def ids(tokenizer, text: str) -> list[int]:
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def tokens_in(allowed_W: torch.Tensor) -> set[int]:
    words = enumerate(allowed_W.tolist())
    return {32 * word + bit for word, bits in words for bit in range(32) if bits >> bit & 1}


def text_of(tokenizer, allowed_W: torch.Tensor) -> str:
    return "".join(sorted(tokenizer.decode([token]) for token in tokens_in(allowed_W)))


def test_each_step_allows_what_the_schema_does(grammars, tokenizer):
    schema = json.dumps({"type": "integer", "minimum": 7, "maximum": 12})
    allowed_TW = grammars.allowed(schema, ids(tokenizer, "12"))
    steps = [text_of(tokenizer, allowed_W) for allowed_W in allowed_TW]
    assert steps == ["1789", "012", "<|end|>"]


def test_an_answer_ends_only_where_it_is_whole(grammars, tokenizer):
    answer = '{"kind": "go", "steps": 12, "place": {"row": 3, "side": "left"}}'
    allowed_TW = grammars.allowed(SCHEMA, ids(tokenizer, answer))
    may_end = [tokenizer.eos_token_id in tokens_in(allowed_W) for allowed_W in allowed_TW]
    assert may_end == [False] * len(answer) + [True]
    assert tokens_in(allowed_TW[-1]) == {tokenizer.eos_token_id}


def test_special_tokens_and_padded_logits_are_no_text(grammars, tokenizer):
    allowed_TW = grammars.allowed('{"type": "string"}', ids(tokenizer, '"x"'))
    inside = tokens_in(allowed_TW[1])
    assert len(inside) > 100
    assert not inside & set(tokenizer.added_tokens_decoder)
    assert max(inside) < len(tokenizer)


def test_allowed_tokens_share_all_probability_in_their_old_proportions(
    grammars, tokenizer, vocabulary
):
    schema = json.dumps({"type": "integer", "minimum": 7, "maximum": 12})
    allowed_W = grammars.follow(schema).allowed()
    allowed = sorted(tokens_in(allowed_W))
    logits = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 1.0, 2.0):
        free = torch.softmax(logits / temperature, -1)[:, allowed]
        logp = scaled_logprobs(
            constrained(logits, allowed_W.repeat(2, 1)), torch.full((2,), temperature)
        )
        held = logp.exp()
        assert torch.allclose(held.sum(-1), torch.ones(2))
        assert held.count_nonzero() == 2 * len(allowed)
        assert torch.allclose(held[:, allowed], free / free.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entropy_and_gradient_of_a_constrained_token_are_numbers(
    grammars, tokenizer, vocabulary, dtype
):
    digits = grammars.allowed(
        '{"type": "integer", "minimum": 1, "maximum": 4}', ids(tokenizer, "2")
    )
    logits = torch.zeros(2, vocabulary, dtype=dtype, requires_grad=True)
    logp, entropy = token_logprobs(
        logits,
        torch.tensor(ids(tokenizer, "2")),
        torch.tensor([0.5, 1.0]),
        lambda rows: rows,
        vocabulary,
        digits,
    )
    # one of the four digits, then nothing but the end
    assert torch.allclose(logp, torch.tensor([-math.log(4), 0.0]))
    assert torch.allclose(entropy, torch.tensor([math.log(4), 0.0]))
    torch.autograd.backward((logp + entropy).sum())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1].count_nonzero() == 0  # a forced token teaches nothing


def test_chunks_of_the_vocabulary_are_masked_alike(grammars, tokenizer, vocabulary, monkeypatch):
    targets = ids(tokenizer, '{"kind": "go", "steps": 12')[:-1]
    allowed_TW = grammars.allowed(SCHEMA, targets)
    allowed_TW[3:9] = -1  # tokens of a call that is free
    hidden = torch.randn(len(targets), 16, generator=torch.Generator().manual_seed(0))
    head = torch.nn.Linear(16, vocabulary)
    results = []
    for elements in (2**26, 5 * vocabulary):
        monkeypatch.setattr(marft_graph.policy.logprobs, "_CHUNK_ELEMENTS", elements)
        own = hidden.clone().requires_grad_()
        logp, entropy = token_logprobs(
            own, torch.tensor(targets), torch.ones(len(targets)), head, vocabulary, allowed_TW
        )
        torch.autograd.backward((logp + entropy).sum())
        results.append((logp, entropy, own.grad))
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(whole, chunked, atol=1e-5)


def test_a_completion_that_breaks_its_schema_is_refused(grammars, tokenizer):
    with pytest.raises(ModelError, match="does not follow the JSON schema 'Move'"):
        grammars.allowed(SCHEMA, ids(tokenizer, '{"sort": 1}'))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"type": "integer", "minimum": 5, "maximum": 2}', "minimum greater than maximum"),
        ('{"title": "Odd", "$ref": "#/nope"}', "schema 'Odd': Cannot find field nope"),
        ('{"type": "wat"}', 'Unsupported type "wat"'),
        ('{"type": "string", "pattern": "(?<=a)b"}', "Lookbehind is not supported"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_named(grammars, schema, reason):
    with pytest.raises(ConfigError, match="xgrammar cannot compile the JSON schema") as caught:
        grammars.follow(schema)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    for refused in (require_grammar_library, lambda: Grammars(tokenizer, 300, frozenset({256}))):
        with pytest.raises(ConfigError, match=r"needs xgrammar: pip install 'marft-graph\[grammar"):
            refused()


def test_a_model_without_an_end_is_refused(tokenizer):
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        Grammars(tokenizer, 300, frozenset())
