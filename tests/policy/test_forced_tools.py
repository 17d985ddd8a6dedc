"""A forced tool call is written by its form: whatever is sampled, it is read as that call."""

from __future__ import annotations

import json
import random

import pytest
import torch
from langchain_core.messages import ToolMessage

from marft_graph.policy.forms import choices_in, one_of
from marft_graph.policy.grammar import Grammars
from marft_graph.rollout.structure import misfits
from tests.policy.test_tool_formats import FAMILIES, TOOLS, every_family, make_codec, question

pytest.importorskip("xgrammar")

SUBTRACT = {
    "type": "function",
    "function": {
        "name": "subtract",
        "description": "",
        "parameters": {
            "$defs": {"Sign": {"enum": ["+", "-"], "type": "string"}},
            "type": "object",
            "properties": {
                "sign": {"$ref": "#/$defs/Sign"},
                "numbers": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
                "is_sure": {"type": "boolean"},
            },
            "required": ["sign", "numbers"],
        },
    },
}
BOTH = [*TOOLS, SUBTRACT]


def grammars_of(codec, name: str) -> tuple[Grammars, int]:
    tokenizer = codec._tokenizer
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    return Grammars(tokenizer, len(tokenizer), frozenset({end})), end


def sampled(codec, name: str, form: str, seed: int, limit: int = 400) -> list[int]:
    """A completion drawn evenly from what the form allows, which soon ends what it may end."""
    grammars, end = grammars_of(codec, name)
    following, drawn = grammars.follow(form), random.Random(seed)
    tokens = codec._tokenizer.convert_ids_to_tokens(range(len(codec._tokenizer)))
    closing = {token for token, text in enumerate(tokens) if text in ('"', "}", "]", "<", "</")}
    tags = {token for token, text in enumerate(tokens) if text.startswith(("</", "Ċ</"))}
    ids: list[int] = []
    while len(ids) < limit:
        bits = following.allowed()
        allowed = [
            token
            for token in range(len(codec._tokenizer))
            if bits[token // 32].item() >> (token % 32) & 1
        ]
        ends = [token for token in allowed if token in tags]
        ends = ends or [token for token in allowed if token in closing]
        token = drawn.choice(ends if ends and drawn.random() < 0.5 else allowed)
        following.accept(token)
        ids.append(token)
        if token == end:
            return ids
    raise AssertionError(f"not ended: {codec._tokenizer.decode(ids)!r}")


@every_family
def test_whatever_a_form_lets_a_model_write_is_read_as_the_forced_call(name):
    codec = make_codec(name)
    form = codec.tool_call_grammar(BOTH)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in BOTH}
    named = set()
    for seed in range(6):
        message = codec.parse(sampled(codec, name, form, seed), tools=BOTH)
        (call,) = message.tool_calls
        assert not message.invalid_tool_calls
        assert not message.content
        assert list(misfits(call["args"], schemas[call["name"]])) == []
        named.add(call["name"])
    assert named == {"add", "subtract"}


@every_family
def test_the_learner_masks_what_the_sampler_masked(name):
    codec = make_codec(name)
    form = codec.tool_call_grammar(TOOLS)
    ids = sampled(codec, name, form, seed=1)
    grammars, _ = grammars_of(codec, name)
    allowed_TW = grammars.allowed(form, ids)
    assert allowed_TW.dtype == torch.int32
    for token, allowed_W in zip(ids, allowed_TW, strict=True):
        assert allowed_W[token // 32].item() >> (token % 32) & 1


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_coder", "llama3_1"])
def test_a_forced_call_goes_on_with_the_ids_it_was_sampled_as(name):
    codec = make_codec(name)
    prompt = codec.render(question(name), TOOLS)
    ids = sampled(codec, name, codec.tool_call_grammar(TOOLS), seed=3)
    message = codec.parse(ids, tools=TOOLS)
    result = ToolMessage("3", tool_call_id=message.tool_calls[0]["id"])
    longer = codec.render([*question(name), message, result], TOOLS)
    assert list(longer[: len(prompt) + len(ids)]) == [*prompt, *ids]


def test_special_tokens_that_mark_a_call_are_no_text_of_its_arguments():
    codec = make_codec("mistral_nemo")
    grammars, _ = grammars_of(codec, "mistral_nemo")
    mark = codec._tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    form = codec.tool_call_grammar(TOOLS)
    following = grammars.follow(form)
    text = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2, "note": "so'
    places = []
    for token in codec._tokenizer.encode(text, add_special_tokens=False):
        places.append(bool(following.allowed()[mark // 32].item() >> (mark % 32) & 1))
        following.accept(token)
    assert places[0]
    assert not any(places[1:])
    assert not following.allowed()[mark // 32].item() >> (mark % 32) & 1


def test_a_template_whose_calls_would_not_be_read_leaves_them_free():
    codec = make_codec("qwen2_5")
    codec._format = make_codec("mistral_nemo")._format
    codec.parse = lambda ids, **more: make_codec("qwen2_5").parse(ids, **more)
    assert codec.tool_call_grammar(TOOLS) == ""


def test_a_form_is_told_from_a_schema_that_speaks_of_forms():
    schema = json.dumps({"type": "string", "description": "marft_graph_form"})
    assert choices_in(schema) is None
    assert choices_in(one_of([["a", {"type": "integer"}]])) == [["a", {"type": "integer"}]]


def test_an_answer_by_a_schema_may_end_the_thoughts_that_its_prompt_has_opened():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    codec = make_codec("qwen3_5_think")
    form = codec.answer_grammar(schema)
    for seed in range(3):
        message = codec.parse(sampled(codec, "qwen3_5_think", form, seed))
        assert json.loads(message.text).keys() == {"n"}
    assert codec.answer_grammar(schema) != make_codec("qwen3").answer_grammar(schema)
    assert json.loads(make_codec("qwen3").answer_grammar(schema)) == schema
