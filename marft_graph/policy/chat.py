"""Chat messages to token ids and back, through the model's own tokenizer and chat template.

Rendering happens once, at the call; what was rendered and sampled is stored as ids and never
rebuilt. This module knows LangChain messages and tokenizers, but no models and no graphs.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from transformers import PreTrainedTokenizerBase

from marft_graph.errors import ModelError

logger = logging.getLogger(__name__)

# For base models whose tokenizer brings no chat template. Plain text only, so that any vocabulary
# can write it.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
# Private-use characters stand in for special tokens inside a message's text while the template is
# rendered, so that text from data can never become a turn of its own.
_OPEN, _CLOSE = "\ue000", "\ue001"
_SENTINEL = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class TokenizerCodec:
    """The `ChatCodec` of a Hugging Face tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._special = tuple(sorted(set(tokenizer.all_special_tokens), key=len, reverse=True))
        self._template: str | None = None
        if not tokenizer.chat_template:
            logger.warning(
                "the tokenizer of %s has no chat template; using plain 'Role: text' lines",
                tokenizer.name_or_path or "the base model",
            )
            self._template = PLAIN_TEMPLATE

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and completion may have together."""
        return self._context_length

    def render(
        self, messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Token ids of the conversation, ending where the assistant's turn begins.

        Special tokens written inside a message's text are encoded as plain text.
        """
        turns = [self._shielded(message_to_dict(message)) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                tools=list(tools) or None,
                add_generation_prompt=True,
                tokenize=False,
                chat_template=self._template,
            )
        except Exception as error:  # templates are programs: any jinja error may come out
            raise ModelError(
                f"the chat template of {self._tokenizer.name_or_path} cannot render a conversation "
                f"with roles {[turn['role'] for turn in turns]}: {error}"
            ) from error
        ids: list[int] = []
        for part_index, part in enumerate(_SENTINEL.split(str(text))):
            if part_index % 2:
                part = self._special[int(part)]
            ids += self._tokenizer.encode(
                part, add_special_tokens=False, split_special_tokens=bool(part_index % 2)
            )
        return tuple(ids)

    def parse(
        self,
        completion_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        tools: Sequence[dict[str, Any]] = (),
    ) -> AIMessage:
        """The message a completion stands for; tool calls are read only where tools were given."""
        text = self.decode(completion_ids)
        cuts = [position for word in stop if (position := text.find(word)) >= 0]
        if cuts:
            text = text[: min(cuts)]
        if not tools or "<tool_call>" not in text:
            return AIMessage(content=text)
        calls: list[Any] = []
        invalid: list[Any] = []
        for match in _TOOL_CALL.finditer(text):
            call = _parse_tool_call(match[1])
            (calls if call["type"] == "tool_call" else invalid).append(call)
        return AIMessage(
            content=_TOOL_CALL.sub("", text).strip(), tool_calls=calls, invalid_tool_calls=invalid
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _shielded(self, turn: dict[str, Any]) -> dict[str, Any]:
        text = turn["content"]
        for index, token in enumerate(self._special):
            if token in text:
                text = text.replace(token, f"{_OPEN}{index}{_CLOSE}")
        return {**turn, "content": text}


def message_to_dict(message: BaseMessage) -> dict[str, Any]:
    """A LangChain message in the role/content form that chat templates read."""
    turn: dict[str, Any] = {"role": _role(message), "content": message_text(message)}
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


def _parse_tool_call(text: str) -> ToolCall | InvalidToolCall:
    call_id = f"call_{uuid.uuid5(uuid.NAMESPACE_OID, text).hex[:16]}"
    try:
        value = json.loads(text)
        name, arguments = value["name"], value.get("arguments", value.get("parameters", {}))
        if isinstance(name, str) and isinstance(arguments, Mapping):
            return ToolCall(type="tool_call", id=call_id, name=name, args=dict(arguments))
        problem = "a tool call is an object with a name and an object of arguments"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    return InvalidToolCall(
        type="invalid_tool_call", id=call_id, name=None, args=text, error=problem
    )
