"""Between an intercepted call and an engine: the request that asks, and the message that answers.

Shared by training rollouts and bound apps, so that both sample and parse alike. It records nothing.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage
from pydantic import BaseModel, PydanticUserError, ValidationError

from marft_graph.engine.base import (
    ChatCodec,
    Completion,
    GenerationRequest,
    SamplingSettings,
)
from marft_graph.errors import ConfigError, PromptTooLongError
from marft_graph.policy.tool_formats import fresh_id
from marft_graph.rollout.intercept import InterceptedCall


def request_for(
    call: InterceptedCall,
    codec: ChatCodec,
    *,
    prompt_ids: tuple[int, ...] | None = None,
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
        prompt_ids: the rendered prompt, where it has been rendered already.
        seed: of the sample.
        order: sorts the request among others.
        temperature: overrides the app's; None: what the app asks for, else 1.
        max_new_tokens: limit where the app sets none.
        constrain_output: let a call that asks for structured output write nothing else. One that
            may also answer with a tool call stays free, as does structure asked for as a tool call.
        timeout: seconds within which it must be answered; None: any time.

    Raises:
        PromptTooLongError: the prompt leaves no room for a single token.
        ConfigError: the structure that is asked for has no JSON schema.
    """
    if prompt_ids is None:
        prompt_ids = codec.render(call.messages, call.tools)
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
        grammar=_grammar(call) if constrain_output else "",
        messages=call.messages,
    )


def message_for(
    call: InterceptedCall, codec: ChatCodec, request: GenerationRequest, completion: Completion
) -> AIMessage:
    """The message that the app gets for a completion."""
    message = _with_new_call_ids(
        codec.parse(completion.ids, stop=call.stop, tools=call.tools), call.messages
    )
    read, written = len(request.prompt_ids), len(completion.ids)
    reason = "tool_calls" if message.tool_calls else completion.finish_reason
    extra = dict(message.additional_kwargs)
    parsed = structured_answer(message.text, call.response_format)
    if parsed is not None:
        extra["parsed"] = parsed
    return message.model_copy(
        update={
            "id": f"run-{uuid.uuid4()}",
            "additional_kwargs": extra,
            "usage_metadata": {
                "input_tokens": read,
                "output_tokens": written,
                "total_tokens": read + written,
            },
            "response_metadata": {
                **message.response_metadata,
                "finish_reason": reason,
                "model_name": call.agent,
                "model_provider": "marft-graph",
            },
        }
    )


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


def structured_answer(text: str, response_format: Any) -> Any:
    """What OpenAI models put into `parsed`: the answer's JSON, validated; None where it is invalid.

    Leaving it out lets the app meet its own usual error, as with a model that answered badly.

    >>> structured_answer('{"answer": 12}', {"type": "json_schema"})
    {'answer': 12}
    """
    if response_format is None:
        return None
    if isinstance(response_format, type) and issubclass(response_format, BaseModel):
        try:
            return response_format.model_validate_json(text)
        except ValidationError:
            return None
    if not isinstance(response_format, dict) or response_format.get("type") != "json_schema":
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def schema_of(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema that a response format stands for; None where any text will do.

    It is a pydantic class, a format of OpenAI's, or a JSON schema itself.

    >>> schema_of({"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}})
    {'type': 'integer'}
    >>> schema_of({"type": "json_object"})
    {'type': 'object', 'additionalProperties': True}
    """
    if isinstance(response_format, type) and issubclass(response_format, BaseModel):
        return response_format.model_json_schema()
    if not isinstance(response_format, Mapping):
        return None
    kind = response_format.get("type")
    if kind == "json_schema":
        inner = response_format.get("json_schema", response_format)
        schema: Mapping[str, Any] = inner.get("schema", inner)
        return schema
    if kind == "json_object":
        return {"type": "object", "additionalProperties": True}
    return None if kind == "text" else response_format


def _grammar(call: InterceptedCall) -> str:
    """The schema that a call's answer must fit, as text; empty where it is free."""
    if call.tools and call.tool_choice != "none":
        return ""
    try:
        schema = schema_of(call.response_format)
        return "" if schema is None else json.dumps(schema)
    except (PydanticUserError, TypeError, ValueError) as error:
        raise ConfigError(
            f"constrain_output: what node {call.node!r} asks for has no JSON schema: {error}"
        ) from error
