"""What a chat template does, found out by rendering short conversations with it.

Templates are programs, and none says which messages it can write. Knows neither tokenizer nor
LangChain: a template is a function from role/content dicts to text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_ASK = {"role": "user", "content": "ask"}


class Template(Protocol):
    """A chat template that is ready to render."""

    def __call__(
        self, turns: Sequence[dict[str, Any]], tools: Any, *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; any exception where the template refuses it."""
        ...


@dataclass(frozen=True, slots=True)
class TemplateHabits:
    """How a template writes what a model is to go on from."""

    generation_prompt: str = ""
    """What opens the assistant's turn."""
    most_calls: float = math.inf
    """Tool calls of one message that it can write: 0, 1 or any number."""
    arguments_as_text: bool = False
    """It wants a call's arguments as JSON text, not as an object."""
    shows_tools: bool = True
    """Whether it writes the schemas of the tools that it is given."""


def habits_of(template: Template) -> TemplateHabits:
    """The habits of a template.

    >>> def template(turns, tools, *, add_generation_prompt=True):
    ...     return "".join(t["content"] for t in turns) + "bot:" * add_generation_prompt
    >>> habits_of(template)
    TemplateHabits(generation_prompt='bot:', most_calls=0, arguments_as_text=False,
                   shows_tools=False)
    """
    opened = _probe(template, [_ASK])
    closed = _probe(template, [_ASK], add_generation_prompt=False)
    as_text = not _writes_calls(template, 1) and _writes_calls(template, 1, as_text=True)
    counts = [count for count in (1, 2) if _writes_calls(template, count, as_text=as_text)]
    schema = {"name": "probeshown", "description": "", "parameters": {"properties": {}}}
    shown = _probe(template, [_ASK], [{"type": "function", "function": schema}])
    return TemplateHabits(
        generation_prompt=opened.removeprefix(closed) if opened.startswith(closed) else "",
        most_calls=math.inf if 2 in counts else max(counts, default=0),
        arguments_as_text=as_text,
        shows_tools="probeshown" in shown,
    )


def _writes_calls(template: Template, count: int, *, as_text: bool = False) -> bool:
    """Whether the template writes the arguments of so many calls in one message."""
    arguments = [{"key": f"value{number}"} for number in range(count)]
    calls = [
        {
            "type": "function",
            "id": f"probecal{number}",
            "function": {"name": "probe", "arguments": json.dumps(args) if as_text else args},
        }
        for number, args in enumerate(arguments)
    ]
    results = [{"role": "tool", "content": "", "tool_call_id": call["id"]} for call in calls]
    schema = {"name": "probe", "description": "", "parameters": {"properties": {}}}
    text = _probe(
        template,
        [_ASK, {"role": "assistant", "content": "", "tool_calls": calls}, *results],
        tools=[{"type": "function", "function": schema}],
    )
    # An escaped quote is JSON inside JSON: that template wants the object.
    return all(
        f"value{number}" in text and f'\\"value{number}' not in text for number in range(count)
    )


def _probe(
    template: Template, turns: Sequence[dict[str, Any]], tools: Any = None, **settings: bool
) -> str:
    """What the template makes of a conversation; nothing where it refuses."""
    try:
        return template(turns, tools, **settings)
    except Exception:  # noqa: BLE001 - any jinja error: that is the answer
        return ""
