"""Real chat templates: what a model writes comes back as a message, and goes on as it was sampled.

Each case renders a prompt, "samples" a scripted completion, parses it, goes on with tool results,
and looks at the ids of the next prompt. Completions are sampled one character a token, which no
tokenizer would do: a prompt that begins with them was not encoded again.
"""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langgraph.graph import END, START, StateGraph, add_messages
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typing_extensions import TypedDict

from marft_graph.engine.base import Completion
from marft_graph.engine.fake import ByteCodec, FakeEngine
from marft_graph.errors import ModelError
from marft_graph.policy.chat import TokenizerCodec
from marft_graph.policy.tool_formats import HERMES, LLAMA, MISTRAL, XML, detect_format
from marft_graph.rollout.runner import run_episodes

TEMPLATES = Path(__file__).parent / "templates"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "one"},
                    "b": {"type": "integer", "description": "the other"},
                    "note": {"type": "string", "description": "why"},
                },
                "required": ["a", "b"],
            },
        },
    }
]
QUESTION = [SystemMessage("Be brief."), HumanMessage("What is 1+2, and what is 3+4?")]
CALLS = [("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})]


@dataclass(frozen=True)
class Family:
    """A model family: its template, its tokens, and how it writes the two calls of `CALLS`."""

    calls: str
    broken: str
    """One call that cannot be read."""
    end: str = "<|im_end|>"
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    plain: tuple[str, ...] = ("<tool_call>", "</tool_call>")
    bos: str | None = None
    thinks: str = ""
    """What stands before an answer after reasoning."""


def json_calls(arguments: str = "arguments", gap: str = "\n", around: bool = True) -> str:
    written = [json.dumps({"name": name, arguments: args}) for name, args in CALLS]
    return gap.join(f"<tool_call>\n{one}\n</tool_call>" if around else one for one in written)


def xml_calls() -> str:
    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in args.items())
        + "</function>\n</tool_call>"
        for name, args in CALLS
    )


LLAMA_TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
MISTRAL_TOKENS = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[CALL_ID]", "[ARGS]"),
    *("[TOOL_CONTENT]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
)
THINKING = ("<tool_call>", "</tool_call>", "<think>", "</think>")
BROKEN_BLOCK = '<tool_call>\n{"name": "add", "arguments": {"a": 1,\n</tool_call>'
LLAMA_FAMILY = Family(
    calls=json_calls("parameters", "; ", around=False),
    broken='{"name": "add", "parameters": {"a": 1,',
    end="<|eot_id|>",
    special=LLAMA_TOKENS,
    plain=(),
    bos="<|begin_of_text|>",
)
FAMILIES = {
    "qwen2_5": Family(calls=json_calls(), broken=BROKEN_BLOCK),
    "qwen3": Family(
        calls=json_calls(),
        broken=BROKEN_BLOCK,
        plain=THINKING,
        thinks="<think>\nSmall sums.\n</think>\n\n",
    ),
    "qwen3_5_think": Family(
        calls=xml_calls(),
        broken="<tool_call>\n<function=add>\n<parameter=a>\n1\n</tool_call>",
        plain=THINKING,
        thinks="Small sums.\n</think>\n\n",
    ),
    "qwen3_coder": Family(calls=xml_calls(), broken="<tool_call>\n<function=add>\n</tool_call>"),
    "hermes_3": Family(calls=json_calls(), broken=BROKEN_BLOCK, bos="<|begin_of_text|>"),
    "llama3_1": LLAMA_FAMILY,
    "llama3_2": LLAMA_FAMILY,
    "mistral_nemo": Family(
        calls="[TOOL_CALLS]["
        + ", ".join(
            json.dumps({"name": name, "arguments": args, "id": f"abcdefgh{n}"})
            for n, (name, args) in enumerate(CALLS)
        )
        + "]",
        broken='[TOOL_CALLS][{"name": "add", "arguments": {"a": 1',
        end="</s>",
        special=MISTRAL_TOKENS,
        plain=(),
        bos="<s>",
    ),
    "mistral_small_3_2": Family(
        calls="".join(
            f"[TOOL_CALLS]{name}[CALL_ID]abcdefgh{n}[ARGS]{json.dumps(args)}"
            for n, (name, args) in enumerate(CALLS)
        ),
        broken='[TOOL_CALLS]add[CALL_ID]abcdefgh0[ARGS]{"a": 1',
        end="</s>",
        special=MISTRAL_TOKENS,
        plain=(),
        bos="<s>",
    ),
}
# Mistral's templates write the tools before the last turn of the user (Nemo also the system
# message into it, if it is the last turn of all); Hermes 3 ends a tool's turn with other white
# space when more turns follow.
MOVES_TOOLS = ("mistral_nemo", "mistral_small_3_2")
every_family = pytest.mark.parametrize("name", FAMILIES)


@cache
def byte_pairs() -> str:
    """A byte-pair tokenizer that has merged the templates' own text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([json.dumps(TOOLS), json_calls(), xml_calls()], trainer)
    return core.to_str()


def make_codec(name: str, template: object = None) -> TokenizerCodec:
    family = FAMILIES[name]
    core = Tokenizer.from_str(byte_pairs())
    core.add_special_tokens([AddedToken(token, special=True) for token in family.special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=family.end, bos_token=family.bos
    )
    source = template or (TEMPLATES / f"{name}.jinja").read_text()
    if name == "hermes_3":
        source = {"default": CHATML, "tool_use": source}
    tokenizer.chat_template = source
    return TokenizerCodec(tokenizer, 8192)


def sample(codec: TokenizerCodec, text: str) -> list[int]:
    """Ids of a text, one character a token save those that have a token of their own."""
    added = codec._tokenizer.get_added_vocab()
    pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
    ids = []
    for part in re.split(f"({pattern})", text):
        for piece in [part] if part in added else part:
            ids += codec._tokenizer.encode(piece, add_special_tokens=False)
    return ids


def text_of(codec: TokenizerCodec, ids) -> str:
    return codec._tokenizer.decode(list(ids), skip_special_tokens=False)


def results(message: AIMessage) -> list[ToolMessage]:
    return [
        ToolMessage(str(call["args"]["a"] + call["args"]["b"]), tool_call_id=call["id"])
        for call in message.tool_calls
    ]


def named(message: AIMessage) -> list[tuple[str, dict]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


def question(name: str) -> list:
    return QUESTION[1:] if name == "mistral_nemo" else list(QUESTION)


@every_family
def test_the_next_prompt_begins_with_the_ids_already_seen(name):
    family, codec = FAMILIES[name], make_codec(name)
    conversation, seen = question(name), []
    for _ in range(1 if name == "hermes_3" else 3):  # prompts grow, ids stay
        prompt = codec.render(conversation, TOOLS)
        assert list(prompt[: len(seen)]) == seen
        completion = sample(codec, family.thinks + family.calls + family.end)
        message = codec.parse(completion, tools=TOOLS)
        assert named(message) == CALLS
        assert message.invalid_tool_calls == []
        assert message.content == ""
        seen = [*prompt, *completion]
        conversation += [message, *results(message)]
    prompt = codec.render(conversation, TOOLS)
    assert list(prompt[: len(seen)]) == seen
    assert all(number in text_of(codec, prompt[len(seen) :]) for number in ("3", "7"))


@every_family
def test_a_plain_answer_goes_on_with_the_ids_it_was_sampled_as(name):
    family, codec = FAMILIES[name], make_codec(name)
    prompt = codec.render(question(name))
    completion = sample(codec, family.thinks + "Three and seven." + family.end)
    message = codec.parse(completion)
    assert message.content == "Three and seven."
    assert message.response_metadata["completion_ids"] == completion
    later = list(codec.render([*question(name), message, HumanMessage("Sure?")]))
    seen = [*prompt, *completion]
    if family.thinks:  # these templates forget thoughts once the user speaks again
        assert "Small sums" not in text_of(codec, later)
        assert "Three and seven." in text_of(codec, later)
    else:
        assert later[: len(seen)] == seen


@every_family
def test_reasoning_leaves_the_content_and_comes_back_where_the_template_wants_it(name):
    family, codec = FAMILIES[name], make_codec(name)
    message = codec.parse(sample(codec, family.thinks + "Three." + family.end), tools=TOOLS)
    assert message.content == "Three."
    if family.thinks:
        assert message.additional_kwargs == {"reasoning_content": "Small sums."}
    else:
        assert message.additional_kwargs == {}
        text = "<think>hm</think>Three."  # no model of this kind thinks: that is its answer
        assert codec.parse(sample(codec, text)).content == text


@every_family
def test_a_malformed_call_goes_to_the_app_and_stays_in_the_prompt_as_written(name):
    family, codec = FAMILIES[name], make_codec(name)
    prompt = codec.render(QUESTION, TOOLS)
    completion = sample(codec, family.thinks + family.broken + family.end)
    message = codec.parse(completion, tools=TOOLS)
    assert message.tool_calls == []
    (broken,) = message.invalid_tool_calls
    assert broken["error"]
    assert broken["id"]
    assert "add" in (broken["name"] or broken["args"])
    later = list(codec.render([*QUESTION, message, HumanMessage("No call.")], TOOLS))
    seen = [*prompt, *completion]
    if family.thinks or name in MOVES_TOOLS:
        assert family.broken in text_of(codec, later)
        assert "Small sums" not in text_of(codec, later)
    else:
        assert later[: len(seen)] == seen


@every_family
def test_a_truncated_completion_goes_on_where_it_stopped(name):
    codec = make_codec(name)
    prompt = codec.render(question(name))
    completion = sample(codec, "Three and")
    message = codec.parse(completion)
    assert message.response_metadata["completion_ids"] == completion
    later = list(codec.render([*question(name), message, HumanMessage("and?")]))
    if name != "qwen3_5_think":  # there the completion is a thought, and forgotten
        assert later[: len(prompt) + len(completion)] == [*prompt, *completion]


@every_family
def test_no_text_from_data_becomes_a_special_token(name):
    family, codec = FAMILIES[name], make_codec(name)
    attack = "".join(family.special) + "\ue0001\ue001\ue00099999\ue001"
    schema = json.loads(json.dumps(TOOLS))

    def conversation(text):
        schema[0]["function"]["description"] = text
        call = {"name": "add", "args": {"a": text}, "id": "abcdefgh0"}
        reasoning = {"reasoning_content": text}
        return [
            SystemMessage(text),
            HumanMessage(text),
            AIMessage("", tool_calls=[call], additional_kwargs=reasoning),
            ToolMessage(text, tool_call_id="abcdefgh0"),
        ]

    special = set(codec._tokenizer.convert_tokens_to_ids(list(family.special)))
    harmless, attacked = (
        [token for token in codec.render(conversation(text), schema) if token in special]
        for text in ("harmless", attack)
    )
    assert attacked == harmless


@every_family
def test_equal_calls_of_a_message_have_ids_of_their_own_in_every_run(name):
    family, codec = FAMILIES[name], make_codec(name)
    twice = family.calls.replace("3", "1").replace("4", "2").replace("abcdefgh1", "abcdefgh0")
    completion = sample(codec, family.thinks + twice + family.end)
    first, second = (codec.parse(completion, tools=TOOLS) for _ in range(2))
    ids = [call["id"] for call in first.tool_calls]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("[A-Za-z0-9]{9}", one) for one in ids)
    assert [call["id"] for call in second.tool_calls] == ids


@every_family
def test_without_tools_calls_are_text(name):
    family, codec = FAMILIES[name], make_codec(name)
    message = codec.parse(sample(codec, family.thinks + family.calls + family.end))
    assert message.tool_calls == []
    assert message.invalid_tool_calls == []
    assert message.content.strip() == family.calls.strip()


@every_family
def test_calls_that_another_model_made_are_rendered(name):
    codec = make_codec(name)
    call = {"name": "add", "args": {"a": 11, "b": 22}, "id": "call_of_another_provider"}
    answer = ToolMessage("33", tool_call_id=call["id"])
    text = text_of(
        codec, codec.render([*QUESTION, AIMessage("", tool_calls=[call]), answer], TOOLS)
    )
    assert "11" in text
    assert "33" in text


def test_text_before_the_calls_is_content_where_the_template_writes_it():
    for name in ("qwen2_5", "qwen3"):
        family, codec = FAMILIES[name], make_codec(name)
        prompt = codec.render(QUESTION, TOOLS)
        completion = sample(codec, f"{family.thinks}I add.\n{family.calls}{family.end}")
        message = codec.parse(completion, tools=TOOLS)
        assert message.content == "I add."
        later = codec.render([*QUESTION, message, *results(message)], TOOLS)
        assert list(later[: len(prompt) + len(completion)]) == [*prompt, *completion]


def test_a_template_that_drops_text_beside_calls_still_leaves_the_sampled_ids():
    codec, family = make_codec("hermes_3"), FAMILIES["hermes_3"]
    completion = sample(codec, f"I add.\n{family.calls}{family.end}")
    message = codec.parse(completion, tools=TOOLS)
    later = codec.render([*QUESTION, message, *results(message)], TOOLS)
    assert "I add." not in text_of(codec, later)
    assert message.response_metadata["completion_ids"] == completion


def test_spacing_that_the_template_would_not_write_is_rendered_its_way():
    codec = make_codec("qwen2_5")
    completion = sample(codec, '<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>')
    message = codec.parse(completion, tools=TOOLS)
    assert named(message) == [("add", {"a": 1})]
    later = text_of(codec, codec.render([*QUESTION, message], TOOLS))
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in later


def test_a_message_that_the_app_changed_is_rendered_as_the_app_wants_it():
    for name in ("qwen2_5", "qwen3"):
        codec, family = make_codec(name), FAMILIES[name]
        message = codec.parse(sample(codec, "Three." + family.end))
        changed = message.model_copy(update={"content": "Four."})
        text = text_of(codec, codec.render([*QUESTION, changed]))
        assert "Four." in text
        assert "Three." not in text


def test_malformed_calls_beside_valid_ones_keep_their_order_of_writing():
    codec, family = make_codec("qwen2_5"), FAMILIES["qwen2_5"]
    completion = sample(codec, f"{BROKEN_BLOCK}\n{family.calls}{family.end}")
    message = codec.parse(completion, tools=TOOLS)
    assert named(message) == CALLS
    assert len(message.invalid_tool_calls) == 1
    prompt = codec.render(QUESTION, TOOLS)
    later = codec.render([*QUESTION, message, *results(message)], TOOLS)
    assert list(later[: len(prompt) + len(completion)]) == [*prompt, *completion]


def test_reasoning_that_never_ends_leaves_an_empty_answer():
    for name, text in (("qwen3", "<think>\nso"), ("qwen3_5_think", "so")):
        message = make_codec(name).parse(sample(make_codec(name), text))
        assert (message.content, message.additional_kwargs["reasoning_content"]) == ("", "so")


def test_a_prompt_that_opens_the_reasoning_is_understood():
    template = (TEMPLATES / "deepseek_r1_distill.jinja").read_text()
    codec = make_codec("qwen3", template)
    assert text_of(codec, codec.render(QUESTION)).endswith("<think>\n")
    message = codec.parse(sample(codec, "hm\n</think>\n\nThree.<|im_end|>"))
    assert (message.content, message.additional_kwargs["reasoning_content"]) == ("Three.", "hm")


def test_stop_strings_cut_before_calls_and_reasoning_are_read():
    codec, family = make_codec("qwen3"), FAMILIES["qwen3"]
    text = f"{family.thinks}Three. STOP {family.calls}"
    message = codec.parse(sample(codec, text), stop=("STOP",), tools=TOOLS)
    assert message.content == "Three. "
    assert message.tool_calls == []
    assert message.additional_kwargs["reasoning_content"] == "Small sums."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', [("add", {"a": 1})]),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', [("add", {"a": 1})]),
        ('{"name": "Ada", "age": 36}', []),
        ('{"answer": 12}', []),
        ("The sum is {3}.", []),
    ],
)
def test_llama_writes_calls_bare_or_after_its_tag(text, expected):
    codec = make_codec("llama3_1")
    message = codec.parse(sample(codec, text), tools=TOOLS)
    assert named(message) == expected
    assert message.invalid_tool_calls == []
    assert message.content == ("" if expected else text)


def test_mistral_calls_without_ids_get_some():
    codec = make_codec("mistral_small_3_2")
    message = codec.parse(sample(codec, 'Yes.[TOOL_CALLS]add{"a": 1}</s>'), tools=TOOLS)
    assert (message.content, named(message)) == ("Yes.", [("add", {"a": 1})])
    codec.render([*QUESTION, message, ToolMessage("1", tool_call_id=message.tool_calls[0]["id"])])


def test_a_closing_tag_inside_an_argument_ends_nothing():
    codec = make_codec("qwen2_5")
    args = {"note": "</tool_call> {"}
    text = f"<tool_call>{json.dumps({'name': 'add', 'arguments': args})}</tool_call>"
    assert named(codec.parse(sample(codec, text), tools=TOOLS)) == [("add", args)]


@pytest.mark.parametrize(
    "body",
    ["", "[1]", '{"arguments": {}}', '{"name": "add", "arguments": 3}', "[" * 5000, "{} {}"],
)
def test_whatever_is_no_call_is_invalid(body):
    codec = make_codec("qwen2_5")
    message = codec.parse(sample(codec, f"<tool_call>{body}</tool_call>"), tools=TOOLS)
    assert message.tool_calls == []
    assert len(message.invalid_tool_calls) == 1


def test_xml_values_have_the_types_of_the_schema():
    text = (
        "<tool_call><function=add><parameter=a>\n1\n</parameter><parameter=note>\n2\n</parameter>"
        "<parameter=other>[1, 2]</parameter><parameter=flag>True</parameter></function></tool_call>"
    )
    codec = make_codec("qwen3_coder")
    message = codec.parse(sample(codec, text), tools=TOOLS)
    expected = {"a": 1, "note": "2", "other": [1, 2], "flag": True}
    assert named(message) == [("add", expected)]


def test_the_tokenizers_own_response_template_comes_first_and_falls_back():
    codec = make_codec("qwen3")
    codec._tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*"},
            "tool_calls": {
                "open_pattern": r"CALL (?P<name>\w+) ",
                "close": ";",
                "repeats": True,
                "content": "json",
                "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close_pattern": r"<\|im_end\|>\s*"},
        },
    }
    text = '<think>hm</think>\n\nI add.CALL add {"a": 1};<|im_end|>'
    message = codec.parse(sample(codec, text), tools=TOOLS)
    assert (message.content, named(message)) == ("I add.", [("add", {"a": 1})])
    assert message.additional_kwargs == {"reasoning_content": "hm"}
    assert codec.parse(sample(codec, text)).content == 'I add.CALL add {"a": 1};'
    broken = codec.parse(sample(codec, 'CALL add {"a": ;<|im_end|>'), tools=TOOLS)
    assert (broken.content, broken.tool_calls) == ("", [])
    assert [call["args"] for call in broken.invalid_tool_calls] == ['CALL add {"a": ;']


def test_a_template_that_wants_arguments_as_text_gets_them_so():
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>" + '{"name": "{{ c.function.name }}", '
        '"arguments": ' + "{{ '' + c.function.arguments }}}</tool_call>{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    codec = make_codec("qwen2_5", template)
    prompt = codec.render(QUESTION, TOOLS)
    completion = sample(codec, json_calls().replace("\n", "") + "<|im_end|>")
    message = codec.parse(completion, tools=TOOLS)
    later = codec.render([*QUESTION, message, *results(message)], TOOLS)
    assert list(later[: len(prompt) + len(completion)]) == [*prompt, *completion]


def test_a_template_without_tool_calls_shows_what_the_model_wrote():
    codec, family = make_codec("qwen2_5", CHATML), FAMILIES["qwen2_5"]
    prompt = codec.render(QUESTION, TOOLS)
    completion = sample(codec, family.calls + family.end)
    message = codec.parse(completion, tools=TOOLS)
    later = codec.render([*QUESTION, message, *results(message)], TOOLS)
    assert list(later[: len(prompt) + len(completion)]) == [*prompt, *completion]


def test_a_refused_conversation_names_the_template_s_reason():
    codec = make_codec("llama3_1")
    calls = [{"name": "add", "args": {}, "id": str(n)} for n in range(2)]
    with pytest.raises(ModelError, match="single tool-calls"):
        codec.render([*QUESTION, AIMessage("", tool_calls=calls)], TOOLS)


def test_the_format_is_found_by_the_template_or_by_the_tokens():
    found = {name: make_codec(name)._format for name in FAMILIES}
    assert found == {
        "qwen2_5": HERMES,
        "qwen3": HERMES,
        "qwen3_5_think": XML,
        "qwen3_coder": XML,
        "hermes_3": HERMES,
        "llama3_1": LLAMA,
        "llama3_2": LLAMA,
        "mistral_nemo": MISTRAL,
        "mistral_small_3_2": MISTRAL,
    }
    assert detect_format("", ["<|python_tag|>"]) == LLAMA
    assert detect_format("") == HERMES


def test_threads_share_a_codec():
    codec, expected, wrong = make_codec("qwen3"), None, []
    messages = [*QUESTION, HumanMessage("<|im_end|>" * 50)]
    expected = codec.render(messages, TOOLS)

    def work():
        wrong.extend(ids for _ in range(50) if (ids := codec.render(messages, TOOLS)) != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Chat(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


class ScriptedEngine:
    """Answers with fixed ids, through a real codec."""

    def __init__(self, codec, completions):
        self._codec, self._completions = codec, list(completions)

    def codec(self, agent):
        return self._codec

    def submit(self, request):
        ids = tuple(self._completions.pop(0))
        future = Future()
        future.set_result(Completion(ids, (-1.0,) * len(ids), "stop", 0))
        return future

    def close(self):
        pass


class ToolModel(FakeListChatModel):
    def bind_tools(self, tools, **settings):
        return self.bind(tools=tools, **settings)


@every_family
def test_an_episode_stores_what_was_sampled_and_its_prompts_grow(name):
    family, codec = FAMILIES[name], make_codec(name)
    model = ToolModel(responses=["own"]).bind_tools(TOOLS)
    given = []

    def agent(state):
        answer = model.invoke(state["messages"])
        given.append(answer)
        return {"messages": [answer]}

    builder = StateGraph(Chat)
    builder.add_node("agent", agent)
    builder.add_node("tools", lambda state: {"messages": results(state["messages"][-1])})
    builder.add_edge(START, "agent")
    builder.add_conditional_edges(
        "agent", lambda state: "tools" if state["messages"][-1].tool_calls else END
    )
    builder.add_edge("tools", "agent")
    sampled = [
        sample(codec, family.thinks + family.calls + family.end),
        sample(codec, family.thinks + family.calls + family.end),
        sample(codec, family.thinks + "Three and seven." + family.end),
    ]
    (episode,) = run_episodes(
        builder.compile(), [{"messages": question(name)}], engine=ScriptedEngine(codec, sampled)
    )
    assert episode.status == "ok", episode.error
    assert [list(call.completion_ids) for call in episode.calls] == sampled
    first, second, third = episode.calls
    seen = first.prompt_ids + first.completion_ids
    assert second.prompt_ids[: len(seen)] == seen
    # Ids that a model writes again are changed, and Hermes' template is as above.
    if "abcdefgh0" not in family.calls and name != "hermes_3":
        seen = second.prompt_ids + second.completion_ids
        assert third.prompt_ids[: len(seen)] == seen
    ids = [call["id"] for message in given for call in message.tool_calls]
    assert len(set(ids)) == 4


def test_a_structured_answer_is_read_after_the_reasoning():
    codec, given = make_codec("qwen3"), []
    schema = {"type": "json_schema", "json_schema": {"name": "sum", "schema": {"type": "object"}}}
    model = FakeListChatModel(responses=["own"]).bind(response_format=schema)

    def agent(state):
        given.append(model.invoke(state["messages"]))
        return {"messages": given[-1:]}

    builder = StateGraph(Chat)
    builder.add_node("agent", agent)
    builder.add_edge(START, "agent")
    text = '<think>\n{"sum": 0}?\n</think>\n\n{"sum": 3}<|im_end|>'
    engine = ScriptedEngine(codec, [sample(codec, text)])
    (episode,) = run_episodes(builder.compile(), [{"messages": QUESTION}], engine=engine)
    assert episode.status == "ok", episode.error
    assert given[0].additional_kwargs["parsed"] == {"sum": 3}
    assert given[0].additional_kwargs["reasoning_content"] == '{"sum": 0}?'


@every_family
@pytest.mark.parametrize("content", ["It is 3.", ""])
def test_an_answer_to_learn_reads_back_as_it_was_recorded(name: str, content: str) -> None:
    codec = make_codec(name)
    calls = [] if content else [{"name": "add", "args": {"a": 1, "b": 2}, "id": "abcdefgh0"}]
    answer = AIMessage(content, tool_calls=calls)
    end = codec._tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    prompt, ids = codec.render_answer([*QUESTION, answer], TOOLS, frozenset({end}))
    assert prompt == codec.render(QUESTION, TOOLS)  # as the node will be asked
    assert ids.index(end) == len(ids) - 1  # it learns to stop, and nothing after that
    read = codec.parse(ids, tools=TOOLS)
    assert read.text.strip() == content
    assert [(c["name"], c["args"]) for c in read.tool_calls] == [
        (c["name"], c["args"]) for c in calls
    ]


def test_tools_are_described_in_words_where_the_template_has_no_place_for_them(caplog):
    codec = make_codec("qwen2_5", CHATML)
    assert not codec.shows_tools
    prompt = text_of(codec, codec.render(QUESTION, TOOLS))
    system, _, rest = prompt.partition("<|im_end|>")
    assert "Be brief.\n\nYou may call these tools:" in system
    assert '"name": "add"' in system
    assert '<tool_call>\n{"name": "NAME", "arguments": {"ARGUMENT": VALUE}}\n</tool_call>' in system
    assert "tools" not in rest
    message = codec.parse(sample(codec, json_calls()), tools=TOOLS)
    assert named(message) == CALLS
    longer = text_of(codec, codec.render([*QUESTION, message, *results(message)], TOOLS))
    assert longer.startswith(prompt)
    assert "<tool_call>" in longer.removeprefix(prompt)
    no_system = text_of(codec, codec.render(QUESTION[1:], TOOLS))
    assert no_system.startswith("<|im_start|>user\nWhat is 1+2, and what is 3+4?\n\nYou may")


@every_family
def test_a_template_that_shows_tools_is_given_no_words(name):
    codec = make_codec(name)
    assert codec.shows_tools
    assert "You may call these tools" not in text_of(codec, codec.render(question(name), TOOLS))


def test_tools_that_the_context_has_no_room_for_are_told_of(caplog):
    codec = make_codec("qwen2_5", CHATML)
    codec._context_length = 60
    assert "add" not in text_of(codec, codec.render(QUESTION, TOOLS))
    assert "it is not shown the tools" in caplog.text


def test_an_app_whose_base_shows_no_tools_is_warned_once_with_its_node(caplog):
    class Wordy(FakeEngine):
        """An engine whose codec shows no tools."""

        def codec(self, agent):
            class Codec(ByteCodec):
                shows_tools = False

            return Codec()

    model = FakeListChatModel(responses=["own"])

    def hermit(state):
        return {"messages": [model.bind(tools=TOOLS).invoke(state["messages"]) for _ in range(2)]}

    class Chat(TypedDict):
        messages: Annotated[list[AnyMessage], add_messages]

    graph = StateGraph(Chat).add_node("hermit", hermit).add_edge(START, "hermit").compile()
    engine = Wordy("text")
    run_episodes(graph, [{"messages": "hi"}], engine=engine, group_size=2)
    engine.close()
    told = [r.getMessage() for r in caplog.records if "no place for them" in r.getMessage()]
    assert len(told) == 1
    assert "'hermit'" in told[0]
