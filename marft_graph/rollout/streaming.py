"""An answer in pieces, as an app's own streaming model gives it.

An engine answers whole. Whoever listens for tokens (`model.stream`, `astream_events`, LangGraph's
`messages` mode, a callback) gets the answer cut into chunks that add up to it, by the same rules by
which LangChain decides whether a model streams. Knows nothing of runs and engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

from langchain_core.language_models import _compat_bridge
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

_WORD = re.compile(r"\S+\s*|^\s+")
_ARGUMENT_CHARACTERS = 8


def chunks_of(message: AIMessage, output_version: str | None = None) -> list[AIMessageChunk]:
    """The answer in chunks, with the message's id; the last one has usage and metadata.

    Reasoning comes first, then the text word by word, then the tool calls piece by piece.

    >>> [chunk.content for chunk in chunks_of(AIMessage("seven plus five", id="1"))]
    ['seven ', 'plus ', 'five', '']
    """
    extra = dict(message.additional_kwargs)
    reasoning = extra.pop("reasoning_content", None)
    chunks = []
    if isinstance(reasoning, str):
        chunks += [
            AIMessageChunk(content="", additional_kwargs={"reasoning_content": word})
            for word in _WORD.findall(reasoning)
        ]
    chunks += [AIMessageChunk(content=word) for word in _WORD.findall(message.text)]
    for index, call in enumerate([*message.tool_calls, *message.invalid_tool_calls]):
        chunks.append(_call_piece("", index, name=call["name"], call_id=call["id"]))
        arguments = _json(call["args"])
        chunks += [
            _call_piece(arguments[at : at + _ARGUMENT_CHARACTERS], index)
            for at in range(0, len(arguments), _ARGUMENT_CHARACTERS)
        ]
    chunks.append(
        AIMessageChunk(
            content="",
            additional_kwargs=extra,
            response_metadata=message.response_metadata,
            usage_metadata=message.usage_metadata,
            chunk_position="last",
        )
    )
    for chunk in chunks:
        chunk.id = message.id
    return _as_blocks(chunks) if output_version == "v1" else chunks


def _call_piece(
    arguments: str, index: int, *, name: str | None = None, call_id: str | None = None
) -> AIMessageChunk:
    piece = tool_call_chunk(name=name, args=arguments, id=call_id, index=index)
    return AIMessageChunk(content="", tool_call_chunks=[piece])


def _json(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)


def _as_blocks(chunks: list[AIMessageChunk]) -> list[AIMessageChunk]:
    """The chunks with content blocks as their content, numbered as LangChain numbers them."""
    made, kind, index = [], "", -1
    for chunk in chunks:
        blocks: list[Any] = [dict(block) for block in chunk.content_blocks]
        for block in blocks:
            if block["type"] != kind:
                kind, index = block["type"], index + 1
            block.setdefault("index", index)
        update = {
            "content": blocks,
            "response_metadata": {**chunk.response_metadata, "output_version": "v1"},
        }
        made.append(chunk.model_copy(update=update))
    return made


def _streamed(
    model: BaseChatModel, run_manager: Any, kwargs: Mapping[str, Any], *, is_async: bool
) -> str:
    """How the app listens to this call: by events, by tokens, or not at all."""
    if run_manager is None:
        return ""
    asked = {"async_api": is_async, "run_manager": run_manager, **kwargs}
    if model._should_use_protocol_streaming(**asked):
        return "events"
    return "tokens" if model._should_stream(**asked) else ""


def tell(
    model: BaseChatModel, message: AIMessage, run_manager: Any, kwargs: Mapping[str, Any]
) -> None:
    """Hand the answer in pieces to whoever listens to this call, before it is returned whole."""
    how = _streamed(model, run_manager, kwargs, is_async=False)
    if how == "events":
        for event in events_of(message, message.id):
            run_manager.on_stream_event(event)
    elif how == "tokens":
        for chunk in chunks_of(message, model.output_version):
            generation = ChatGenerationChunk(message=chunk)
            run_manager.on_llm_new_token(chunk.content, chunk=generation)


async def atell(
    model: BaseChatModel, message: AIMessage, run_manager: Any, kwargs: Mapping[str, Any]
) -> None:
    """`tell` for an asynchronous call."""
    how = _streamed(model, run_manager, kwargs, is_async=True)
    if how == "events":
        for event in events_of(message, message.id):
            await run_manager.on_stream_event(event)
    elif how == "tokens":
        for chunk in chunks_of(message, model.output_version):
            generation = ChatGenerationChunk(message=chunk)
            await run_manager.on_llm_new_token(chunk.content, chunk=generation)


def events_of(message: AIMessage, message_id: str | None) -> Iterator[Any]:
    """LangChain's protocol events of the answer, with a delta for each piece."""
    pieces = (ChatGenerationChunk(message=chunk) for chunk in chunks_of(message))
    yield from _compat_bridge.chunks_to_events(pieces, message_id=message_id)


class Answering:
    """The app's model, except that its stream is made of an answer that comes whole.

    LangChain's own `stream` and `astream` take it for the model: so callbacks, events and the last
    chunk are as they are without us.

    Args:
        model: the app's own model.
        ask: messages, stop words and keyword arguments to the whole answer.
        aask: the same for asynchronous calls.
    """

    rate_limiter = None  # the app's own limits the requests to its provider

    def __init__(
        self,
        model: BaseChatModel,
        *,
        ask: Callable[..., AIMessage],
        aask: Callable[..., Awaitable[AIMessage]],
    ) -> None:
        self._model = model
        self._ask = ask
        self._aask = aask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in chunks_of(self._ask(messages, stop, kwargs)):
            yield ChatGenerationChunk(message=chunk)

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in chunks_of(await self._aask(messages, stop, kwargs)):
            yield ChatGenerationChunk(message=chunk)
