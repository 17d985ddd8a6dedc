"""Which texts a text holds as they are: the second witness of what a prompt was made from.

A state that is copied whole (`{**state, ...}`, `dict(state)`, `f(**state)`) does not say which of
its values are used; and an agent that writes `history + answer` passes on more than its answer. In
both cases the text itself tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage
from pydantic import BaseModel

LEAST = 4
"""Characters of a text that is not found by chance, as `yes` is."""
_PART = 24
_DEPTH = 6


def leaves(value: Any, depth: int = _DEPTH) -> Iterator[tuple[Any, str]]:
    """The texts in a value, each with the object that holds it.

    >>> [text for _, text in leaves({"a": ["one", {"b": "two"}], "n": 3})]
    ['one', 'two']
    """
    if isinstance(value, str):
        yield value, value
    elif isinstance(value, BaseMessage):
        yield value, value.text
        for call in value.tool_calls if isinstance(value, AIMessage) else ():
            yield from leaves(call["args"], depth - 1)
    elif depth == 0:
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item, depth - 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from leaves(item, depth - 1)
    elif isinstance(value, BaseModel):
        yield from leaves(dict(value), depth - 1)


def shows(text: str, leaf: str) -> bool:
    r"""Whether a text holds another one, perhaps escaped, or cut at one end.

    >>> shows(repr({"plan": "one\ntwo"}), "one\ntwo")
    True
    """
    leaf = leaf.strip()
    if not leaf:
        return False
    forms = [leaf, json.dumps(leaf)[1:-1], repr(leaf)[1:-1]]
    if len(leaf) > _PART:
        forms += [leaf[:_PART], leaf[-_PART:]]
    return any(form in text for form in forms)


def quotes(text: str, leaf: str) -> bool:
    """Whether a text certainly holds another one: a long enough one, in words of its own.

    >>> quotes("it is plan 1, or 12", "plan 1"), quotes("it is plan 12", "plan 1")
    (True, False)
    """
    leaf = leaf.strip()
    if len(leaf) < LEAST or not shows(text, leaf):
        return False
    place = text.find(leaf)
    while place >= 0:
        before, after = text[place - 1 : place], text[place + len(leaf) :][:1]
        if not (_joins(before, leaf[0]) or _joins(leaf[-1], after)):
            return True
        place = text.find(leaf, place + 1)
    return leaf not in text  # escaped, or cut


def texts_of_answer(answer: str) -> list[str]:
    """The texts of a model's answer that can be quoted: itself, or those in its JSON.

    >>> texts_of_answer('{"score": "yes", "reason": "well said"}'), texts_of_answer("well said")
    (['well said'], ['well said'])
    """
    try:
        value = json.loads(answer)
    except ValueError:
        value = answer
    return [leaf for _, leaf in leaves(value) if len(leaf.strip()) >= LEAST]


def _joins(left: str, right: str) -> bool:
    return left.isalnum() and right.isalnum()


def as_text(value: Any) -> str:
    """All texts of a value in one."""
    return "\n".join(text for _, text in leaves(value))
