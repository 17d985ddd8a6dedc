"""A paragraph that is added to a conversation: what a model must know that the app did not write.

It goes into the system message, or where there is none into the first message of the user, so that
no chat template meets a role that the app does not use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage


def with_paragraph(messages: Sequence[BaseMessage], text: str) -> tuple[BaseMessage, ...]:
    r"""The conversation with a paragraph more.

    >>> with_paragraph([HumanMessage("7+5?")], "Be brief.")[0].text
    '7+5?\n\nBe brief.'
    """
    for kind in (SystemMessage, HumanMessage):
        for place, message in enumerate(messages):
            if isinstance(message, kind):
                added = message.model_copy(update={"content": _content(message, text)})
                return (*messages[:place], added, *messages[place + 1 :])
    return (SystemMessage(text), *messages)


def _content(message: BaseMessage, text: str) -> str | list[str | dict[Any, Any]]:
    if isinstance(message.content, str):
        return f"{message.content}\n\n{text}" if message.content else text
    return [*message.content, {"type": "text", "text": f"\n\n{text}"}]
