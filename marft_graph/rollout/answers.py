"""Between an intercepted call and an engine: the request that asks, and the message that answers.

Shared by training rollouts and bound apps, so that both sample and parse alike. It records nothing.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage
from pydantic import PydanticUserError

from marft_graph.engine.base import (
    ChatCodec,
    Completion,
    GenerationRequest,
    SamplingSettings,
    SupportsDecode,
    WritesToolCalls,
)
from marft_graph.errors import ConfigError, PromptTooLongError
from marft_graph.policy.tool_formats import fresh_id
from marft_graph.rollout.asked import reason_in_words_of, usage_in_words_of, warn_once
from marft_graph.rollout.responder import InterceptedCall
from marft_graph.rollout.structure import schema_of, structured_answer, told

_NO_PLACE_FOR_TOOLS = (
    "node %r has tools, but the chat template of its base model has no place for them: they are "
    "described in the system message instead, or the first one of the user, which this model was "
    "not trained on. Take a base model whose template shows tools, or expect to learn this format"
)


def prompt_of(
    call: InterceptedCall, codec: ChatCodec, *, max_new_tokens: int, schema_in_prompt: bool
) -> tuple[tuple[BaseMessage, ...], tuple[int, ...]]:
    """The messages and token ids that a model is asked with.

    They tell of the form of the answer where `schema_in_prompt` says so and the context has room
    for it beside the answer; where it has none, that is said once for each node.
    """
    if call.tools and isinstance(codec, WritesToolCalls) and not codec.shows_tools:
        warn_once(call.node, _NO_PLACE_FOR_TOOLS)
    prompt_ids = codec.render(call.messages, call.tools)
    if not schema_in_prompt:
        return call.messages, prompt_ids
    messages = told(call)
    if messages is call.messages:
        return messages, prompt_ids
    told_ids = codec.render(messages, call.tools)
    if len(told_ids) + (call.max_tokens or max_new_tokens) <= codec.context_length:
        return messages, told_ids
    warn_once(
        call.node,
        "the JSON schema that node %r asks for is not in its prompts: with it they have %d tokens, "
        "which leaves no room for the answer in the model's context of %d. Take a shorter schema "
        "or a base model with a longer context, or set schema_in_prompt to false",
        len(told_ids),
        codec.context_length,
    )
    return call.messages, prompt_ids


def request_for(
    call: InterceptedCall,
    codec: ChatCodec,
    *,
    prompt: tuple[tuple[BaseMessage, ...], tuple[int, ...]] | None = None,
    seed: int = 0,
    order: tuple[Any, ...] = (),
    temperature: float | None = None,
    max_new_tokens: int = 256,
    constrain_output: bool = False,
    timeout: float | None = None,
) -> GenerationRequest:
    """The request for a call, within the limits that the app set.

    Args:
        call: what the node asks.
        codec: renders the prompt.
        prompt: what `prompt_of` gives; None: the app's messages alone.
        seed: of the sample.
        order: sorts the request among others.
        temperature: overrides the app's; None: what the app asks for, else 1.
        max_new_tokens: limit where the app sets none.
        constrain_output: let a call that asks for structured output, or forces a tool call, write
            nothing else. One that may answer either way stays free.
        timeout: seconds within which it must be answered; None: any time.

    Raises:
        PromptTooLongError: the prompt leaves no room for a single token.
        ConfigError: the structure that is asked for has no JSON schema.
    """
    messages, prompt_ids = prompt or (call.messages, codec.render(call.messages, call.tools))
    room = codec.context_length - len(prompt_ids)
    if room < 1:
        raise PromptTooLongError(
            f"node {call.node!r} has a prompt of {len(prompt_ids)} tokens; the model's context is "
            f"{codec.context_length} tokens, and at least one must be left for the answer"
        )
    asked = 1.0 if call.temperature is None else call.temperature
    sampling = SamplingSettings(
        temperature=asked if temperature is None else temperature,
        max_tokens=min(call.max_tokens or max_new_tokens, room),
        stop=call.stop,
    )
    return GenerationRequest(
        timeout=timeout,
        agent=call.agent,
        prompt_ids=prompt_ids,
        sampling=sampling,
        seed=seed,
        order=order,
        tools=call.tools,
        tool_choice=call.tool_choice,
        response_format=call.response_format,
        grammar=_grammar(call, codec) if constrain_output else "",
        messages=messages,
    )


def message_for(
    call: InterceptedCall, codec: ChatCodec, request: GenerationRequest, completion: Completion
) -> AIMessage:
    """The message that the app gets for a completion, as its own model's class would make it."""
    tools = () if call.tool_choice == "none" else call.tools
    message = _with_new_call_ids(
        codec.parse(completion.ids, stop=call.stop, tools=tools), call.messages
    )
    if call.asked.is_one_call:
        message = _with_one_call(message)
    read, written = len(request.prompt_ids), len(completion.ids)
    is_cut_off = completion.finish_reason == "length"
    reason = "tool_calls" if message.tool_calls and not is_cut_off else completion.finish_reason
    extra = dict(message.additional_kwargs)
    parsed = structured_answer(message.text, call.response_format)
    if parsed is not None:
        extra["parsed"] = parsed
    metadata: dict[str, Any] = {
        **message.response_metadata,
        **usage_in_words_of(call.asked.provider, read, written),
        **reason_in_words_of(call.asked.provider, reason),
        "model_name": call.model_name or call.agent,
        "model_provider": "marft-graph",
        "adapter": call.agent,
    }
    if call.asked.wants_logprobs:
        metadata["logprobs"] = _logprobs(codec, completion)
    return message.model_copy(
        update={
            "id": f"run-{uuid.uuid4()}",
            "additional_kwargs": extra,
            "usage_metadata": {
                "input_tokens": read,
                "output_tokens": written,
                "total_tokens": read + written,
            },
            "response_metadata": metadata,
        }
    )


def _logprobs(codec: ChatCodec, completion: Completion) -> dict[str, Any]:
    """The written tokens' log-probs as OpenAI's API gives them."""
    content: list[dict[str, Any]] = []
    for token, logprob in zip(completion.ids, completion.logprobs, strict=True):
        text = codec.decode([token]) if isinstance(codec, SupportsDecode) else ""
        entry = {"token": text, "bytes": list(text.encode()), "logprob": logprob}
        content.append(entry | {"top_logprobs": []})
    return {"content": content, "refusal": None}


def _with_one_call(message: AIMessage) -> AIMessage:
    """The message with its first tool call alone: an API that is told so gives no second one."""
    calls = message.tool_calls[:1]
    invalid = [] if calls else message.invalid_tool_calls[:1]
    return message.model_copy(update={"tool_calls": calls, "invalid_tool_calls": invalid})


def _with_new_call_ids(message: AIMessage, earlier: Sequence[BaseMessage]) -> AIMessage:
    """The message with ids of its tool calls that the conversation does not have yet.

    A model that writes the same call twice would otherwise seem to have its result already.
    """
    taken = {
        call["id"] or ""
        for before in earlier
        if isinstance(before, AIMessage)
        for call in (*before.tool_calls, *before.invalid_tool_calls)
    }
    if not taken:
        return message
    return message.model_copy(
        update={
            kind: [{**call, "id": fresh_id(call["id"] or "", taken)} for call in calls]
            for kind, calls in (
                ("tool_calls", message.tool_calls),
                ("invalid_tool_calls", message.invalid_tool_calls),
            )
        }
    )


def _grammar(call: InterceptedCall, codec: ChatCodec) -> str:
    """What a call's answer must fit, as text; empty where it is free."""
    if call.asked.forced_tools:
        tools = [t for t in call.tools if t["function"]["name"] in call.asked.forced_tools]
        return codec.tool_call_grammar(tools) if isinstance(codec, WritesToolCalls) else ""
    if call.tools and call.tool_choice != "none":
        return ""
    try:
        schema = schema_of(call.response_format)
        if schema is None:
            return ""
        if isinstance(codec, WritesToolCalls):
            return codec.answer_grammar(schema)
        return json.dumps(schema)
    except (PydanticUserError, TypeError, ValueError) as error:
        raise ConfigError(
            f"constrain_output: what node {call.node!r} asks for has no JSON schema: {error}"
        ) from error
