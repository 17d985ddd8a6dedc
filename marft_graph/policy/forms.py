"""Forms of an answer that are more than one JSON schema: text, schemas and choices in a row.

A form is kept as text, as a JSON schema is, so that requests, recorded calls and traces carry
either. `policy.grammar` compiles both. It knows neither tokenizers nor xgrammar.

A form is a list of choices, each a list of parts: a text stands for itself, an object with `regex`
for what the expression matches, one with `choices` for a form inside, any other is a JSON schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

_KEY = "marft_graph_form"

Part = str | dict[str, Any]


def one_of(choices: Iterable[Sequence[Part]]) -> str:
    """A form as text; empty where there is no choice.

    >>> one_of([["yes"], ["no"]])
    '{"marft_graph_form": [["yes"], ["no"]]}'
    """
    listed = [list(parts) for parts in choices]
    return json.dumps({_KEY: listed}, ensure_ascii=False) if listed else ""


def text_without(closing: str) -> str:
    """An expression for any text in which no tag closes as `closing` does: `</...` or `[/...`.

    >>> import re
    >>> free = re.compile(text_without("</think>"))
    >>> [bool(free.fullmatch(text)) for text in ("a < b <", "a<<b", "x</y", "x<</y")]
    [False, True, False, False]
    """
    first = f"\\{closing[0]}" if closing[0] == "[" else closing[0]
    return f"([^{first}]|{first}+[^{first}/])*"


def choices_in(text: str) -> list[list[Part]] | None:
    """The choices of a form; None where the text is a JSON schema.

    >>> choices_in(one_of([["yes"], ["no"]]))
    [['yes'], ['no']]
    >>> choices_in('{"type": "integer"}')
    """
    if _KEY not in text:
        return None
    read = json.loads(text)
    return read.get(_KEY) if isinstance(read, dict) else None
