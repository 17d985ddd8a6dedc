"""LangChain messages as chat templates read them: role, text, tool calls and their ids."""

from __future__ import annotations

import re
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from marft_graph.errors import ModelError
from marft_graph.policy.tool_formats import short_id


def sampled_ids(message: BaseMessage) -> list[int]:
    """The token ids that `TokenizerCodec.parse` read a message from; none for other messages."""
    ids = message.response_metadata.get("completion_ids")
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        return []
    return ids


def said(message: AIMessage) -> tuple[Any, ...]:
    """What a message says, without the ids of its calls."""
    calls = [(call["name"], call["args"]) for call in message.tool_calls]
    return message.content, calls, [call["args"] for call in message.invalid_tool_calls]


def nine_letters(call_id: str) -> str:
    """The id of a tool call, or what stands for it where an id must be nine letters and digits.

    >>> nine_letters("abcDEF123"), len(nine_letters("call_1"))
    ('abcDEF123', 9)
    """
    return call_id if re.fullmatch("[A-Za-z0-9]{9}", call_id) else short_id(call_id)


def message_to_dict(message: BaseMessage) -> dict[str, Any]:
    """A LangChain message in the role/content form that chat templates read."""
    turn: dict[str, Any] = {"role": _role(message), "content": message_text(message)}
    reasoning = message.additional_kwargs.get("reasoning_content")
    if isinstance(message, AIMessage) and isinstance(reasoning, str) and reasoning:
        turn["reasoning_content"] = reasoning
    if isinstance(message, AIMessage) and message.tool_calls:
        turn["tool_calls"] = [
            {
                "type": "function",
                "id": call["id"] or "",
                "function": {"name": call["name"], "arguments": call["args"]},
            }
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        turn["tool_call_id"] = message.tool_call_id
        if message.name:
            turn["name"] = message.name
    return turn


def message_text(message: BaseMessage) -> str:
    """The text of a message; parts that are no text are refused.

    Raises:
        ModelError: the message carries an image, audio or another part that is no text.
    """
    if isinstance(message.content, str):
        return message.content
    parts = []
    for part in message.content:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif part.get("type") not in ("tool_use", "tool_call", "reasoning", "thinking"):
            raise ModelError(
                f"a {message.type} message carries a part of type {part.get('type')!r}; "
                "only text can be rendered for the base model"
            )
    return "".join(parts)


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in (
        (SystemMessage, "system"),
        (HumanMessage, "user"),
        (AIMessage, "assistant"),
        (ToolMessage, "tool"),
    ):
        if isinstance(message, kind):
            return role
    raise ModelError(f"messages of type {message.type!r} cannot be rendered for the base model")
