"""How families of models write tool calls and reasoning, and how what they wrote is read back.

Works on text alone: it knows no tokenizer, and of LangChain only the two kinds of tool call. What a
model writes wrongly is kept as an `InvalidToolCall`, which the app may answer; nothing is repaired.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import InvalidToolCall, ToolCall

from marft_graph.policy.forms import Part, text_without

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_BLOCK_END = re.compile(r"\s*(?:</tool_call>|\Z)")
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>\Z", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_NAMED_CALL = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*")
_PYTHON_TAG = "<|python_tag|>"
_TOOL_CALLS = "[TOOL_CALLS]"


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A tool call as a model wrote it."""

    text: str
    name: str | None = None
    arguments: Mapping[str, Any] | None = None
    call_id: str | None = None
    """The id that the model itself gave, in formats that have one."""
    problem: str | None = None
    """Why it is no valid call; None where it is one."""


def _exemplified(part: Part) -> str:
    """A part of a form as a reader sees it in an example."""
    if isinstance(part, str):
        return part
    return "VALUE" if "choices" in part else '{"ARGUMENT": VALUE}'


Scan = Callable[[str, Sequence[Mapping[str, Any]]], tuple[str, list[WrittenCall]]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family of models writes tool calls."""

    name: str
    markers: tuple[str, ...]
    """Tokens that announce a call: special in some vocabularies, but needed for reading it."""
    scan: Scan
    """Text and tool schemas -> the text outside the calls, and the calls in their order."""
    form: Callable[[str, Mapping[str, Any]], list[Part]] = field(compare=False)
    """Name and parameters of a tool -> the form (`policy.forms`) of one call of it."""

    def described(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Tools, and how to call them, in words: for models whose template shows none."""
        functions = [tool.get("function", tool) for tool in tools]
        listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
        example = {"type": "object", "properties": {"ARGUMENT": {}}, "required": ["ARGUMENT"]}
        form = "".join(_exemplified(part) for part in self.form("NAME", example))
        return f"You may call these tools:\n{listed}\nA call is written as\n{form}"


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """What a reasoning model writes around its thoughts."""

    opening: str
    closing: str

    def split(self, text: str, *, is_open: bool = False) -> tuple[str, str]:
        r"""The reasoning and the answer; the whole text is the answer where no tag is.

        Reasoning that never ends leaves an empty answer.

        Args:
            text: what the model wrote.
            is_open: whether the prompt already ends inside the reasoning.

        >>> ReasoningTags("<think>", "</think>").split("<think>\n2+2\n</think>\n\nfour")
        ('2+2', 'four')
        """
        before, opening, after = text.partition(self.opening)
        if opening and not before.strip():
            text, is_open = after, True
        reasoning, closing, answer = text.partition(self.closing)
        if closing:
            return reasoning.strip("\n"), answer.lstrip("\n")
        return (text.strip("\n"), "") if is_open else ("", text)


def reasoning_tags(template: str) -> ReasoningTags | None:
    """The tags that a chat template knows, if any."""
    for opening, closing in (("<think>", "</think>"), ("[THINK]", "[/THINK]")):
        if closing in template:
            return ReasoningTags(opening, closing)
    return None


def detect_format(template: str, vocabulary: Iterable[str] = ()) -> ToolFormat:
    """The format that a chat template writes, or else the one whose tokens the vocabulary has.

    Models of neither kind get Hermes' `<tool_call>` form, which needs no token of its own.

    Args:
        template: source of the chat template.
        vocabulary: tokens that were added to the tokenizer's ordinary ones.

    >>> detect_format("... [TOOL_CALLS] ...").name
    'mistral'
    """
    if "<function=" in template and "<tool_call>" in template:
        return XML
    if _TOOL_CALLS in template and "[ARGS]" in template:
        return MISTRAL_NAMED
    tokens = set(vocabulary)
    for tool_format, marks in (
        (MISTRAL, (_TOOL_CALLS,)),
        (HERMES, ("<tool_call>",)),
        (LLAMA, (_PYTHON_TAG, "<|start_header_id|>ipython")),
    ):
        if any(mark in template for mark in marks):
            return tool_format
    for tool_format in (MISTRAL, LLAMA):
        if tool_format.markers[0] in tokens and "<tool_call>" not in tokens:
            return tool_format
    return HERMES


def langchain_calls(
    written: Sequence[WrittenCall], salt: str = ""
) -> tuple[list[ToolCall], list[InvalidToolCall]]:
    """The valid and the invalid calls of one message, as LangChain keeps them.

    A call without an id of its own gets nine letters and digits made of `salt` and its position:
    the same in every run, and different for two equal calls of a message.

    >>> add = WrittenCall("", "add", {"a": 1})
    >>> calls, _ = langchain_calls([add, add])
    >>> calls[0]["id"] != calls[1]["id"]
    True
    """
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    taken: set[str] = set()
    for position, call in enumerate(written):
        call_id = fresh_id(call.call_id or short_id(f"{salt}/{position}"), taken)
        taken.add(call_id)
        if call.problem is None and call.name is not None and call.arguments is not None:
            args = dict(call.arguments)
            calls.append(ToolCall(type="tool_call", id=call_id, name=call.name, args=args))
        else:
            problem = call.problem or "no tool call"
            invalid.append(
                InvalidToolCall(
                    type="invalid_tool_call",
                    id=call_id,
                    name=call.name,
                    args=call.text,
                    error=problem,
                )
            )
    return calls, invalid


def short_id(text: str) -> str:
    """Nine letters and digits that stand for a text: the only ids that Mistral's templates accept.

    >>> short_id("call_1")
    'Rgj3pdhdm'
    """
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")
    return "".join(_DIGITS[number // 62**place % 62] for place in range(9))


def fresh_id(call_id: str, taken: Iterable[str]) -> str:
    """The id itself, or another made of it where it is taken.

    >>> fresh_id("a", []), fresh_id("a", ["a"]) != "a"
    ('a', True)
    """
    known = set(taken)
    while call_id in known:
        call_id = short_id(call_id)
    return call_id


def call_from_json(value: Any, text: str) -> WrittenCall:
    """A call from an object with a name and arguments (Llama says parameters).

    >>> call_from_json({"name": "add", "arguments": {"a": 1}}, "").arguments
    {'a': 1}
    """
    problem = "a tool call is an object with a name and an object of arguments"
    if not isinstance(value, Mapping):
        return WrittenCall(text, problem=problem)
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON inside JSON, as OpenAI writes it
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            problem = f"the arguments are no JSON: {error}"
    call_id = value.get("id")
    known_id = call_id if isinstance(call_id, str) and call_id else None
    if not isinstance(name, str) or not name:
        return WrittenCall(text, call_id=known_id, problem=problem)
    if not isinstance(arguments, Mapping):
        return WrittenCall(text, name, call_id=known_id, problem=problem)
    return WrittenCall(text, name, arguments, known_id)


def _scan_hermes(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[WrittenCall]]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5, Qwen 3."""
    rest, calls, at = [], [], 0
    while block := _BLOCK.search(text, at):
        rest.append(text[at : block.start()])
        body, at = block[1], block.end()
        try:
            # From where the JSON ends, as a string in it may hold the closing tag.
            value, end = _read_json(text, block.start(1))
            close = _BLOCK_END.match(text, end)
            if close is None:
                raise ValueError("more follows the object")
            calls.append(call_from_json(value, text[block.start(1) : end]))
            at = close.end()
        except ValueError as error:
            calls.append(WrittenCall(body, problem=f"no JSON: {error}"))
    return _outside(text, [*rest, text[at:]], calls)


def _scan_xml(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[WrittenCall]]:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...`: Qwen 3 Coder, Qwen 3.5."""
    calls = []
    for block in _BLOCK.finditer(text):
        function = _FUNCTION.match(block[1])
        if function is None:
            calls.append(WrittenCall(block[1], problem="no closed <function=NAME> in the block"))
            continue
        name = function[1].strip()
        types = _parameter_types(name, tools)
        arguments = {
            key.strip(): _typed(value, types.get(key.strip()))
            for key, value in _PARAMETER.findall(function[2])
        }
        leftover = _PARAMETER.sub("", function[2]).strip()
        problem = f"not a parameter: {leftover[:80]!r}" if leftover else None
        calls.append(WrittenCall(block[1], name, arguments, problem=problem))
    return _outside(text, [_BLOCK.sub("", text)], calls)


def _scan_llama(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[WrittenCall]]:
    """`{"name": ..., "parameters": {...}}`, bare or after `<|python_tag|>`: Llama 3.1 to 3.3."""
    head, tag, body = text.partition(_PYTHON_TAG)
    if not tag:
        if not re.match(r"\s*\{\s*\"name\"\s*:", text):
            return text, []
        head, body = "", text
    calls: list[WrittenCall] = []
    at = 0
    while True:
        gap = re.compile(rf"(?:[\s;,]|{re.escape(_PYTHON_TAG)})*").match(body, at)
        begin = gap.end() if gap else at
        if begin == len(body) or (calls and body[begin] != "{"):
            return (head + body[begin:]).strip(), calls
        try:
            value, at = _read_json(body, begin)
        except ValueError as error:
            calls.append(WrittenCall(body[begin:].strip(), problem=f"no JSON: {error}"))
            return head.strip(), calls
        is_call = isinstance(value, dict) and ("parameters" in value or "arguments" in value)
        if not tag and not calls and not is_call:
            return text, []  # an answer in JSON that happens to have a name
        calls.append(call_from_json(value, body[begin:at]))


def _scan_mistral(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[WrittenCall]]:
    """`[TOOL_CALLS][{...}, ...]`, or since 2025 `[TOOL_CALLS]NAME[ARGS]{...}` for each call."""
    head, *parts = text.split(_TOOL_CALLS)
    rest, calls = [head], []
    for part in parts:
        named = _NAMED_CALL.match(part)
        try:
            value, end = _read_json(part, named.end() if named else len(part) - len(part.lstrip()))
        except ValueError as error:
            name = named[1] if named else None
            calls.append(WrittenCall(part.strip(), name, problem=f"no JSON: {error}"))
            continue
        if named:
            value = [{"name": named[1], "arguments": value, "id": named[2]}]
        values = value if isinstance(value, list) else [value]
        calls += [
            call_from_json(value, part[:end].strip() if named else json.dumps(value))
            for value in values
        ]
        rest.append(part[end:])
    return _outside(text, rest, calls)


def _form_around(begin: str, key: str, end: str) -> Callable[[str, Mapping[str, Any]], list[Part]]:
    """A call as an object with a name and, under `key`, its arguments."""
    return functools.partial(_form_object, begin, key, end)  # workers get it pickled


def _form_object(
    begin: str, key: str, end: str, name: str, parameters: Mapping[str, Any]
) -> list[Part]:
    opening = f'{begin}{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '
    return [opening, dict(parameters), "}" + end]


def _form_named(name: str, parameters: Mapping[str, Any]) -> list[Part]:
    return [f"{_TOOL_CALLS}{name}[ARGS]", dict(parameters)]


def _form_xml(name: str, parameters: Mapping[str, Any]) -> list[Part]:
    """Texts stand for themselves there, as far as no tag closes in them; all else is JSON."""
    properties: Mapping[str, Any] = parameters.get("properties") or {}
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    parts: list[Part] = [f"<tool_call>\n<function={name}>\n"]
    for key, schema in properties.items():
        value: list[list[Part]] = [[{**schema, **shared}]]
        if schema.get("type") == "string":
            plain = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
            value = [[text] for text in plain] or [[{"regex": text_without("</parameter>")}]]
        row: list[Part] = [f"<parameter={key}>\n", {"choices": value}, "\n</parameter>\n"]
        parts += row if key in parameters.get("required", ()) else [{"choices": [row, [""]]}]
    return [*parts, "</function>\n</tool_call>"]


HERMES = ToolFormat(
    "hermes",
    ("<tool_call>", "</tool_call>"),
    _scan_hermes,
    _form_around("<tool_call>\n", "arguments", "\n</tool_call>"),
)
XML = ToolFormat("xml", ("<tool_call>", "</tool_call>"), _scan_xml, _form_xml)
LLAMA = ToolFormat("llama", (_PYTHON_TAG,), _scan_llama, _form_around("", "parameters", ""))
MISTRAL = ToolFormat(
    "mistral",
    (_TOOL_CALLS, "[CALL_ID]", "[ARGS]"),
    _scan_mistral,
    _form_around(f"{_TOOL_CALLS}[", "arguments", "]"),
)
MISTRAL_NAMED = ToolFormat("mistral", MISTRAL.markers, _scan_mistral, _form_named)


def _outside(
    text: str, rest: Sequence[str], calls: list[WrittenCall]
) -> tuple[str, list[WrittenCall]]:
    """The text between calls without the white space around them; untouched where there is none."""
    return ("".join(rest).strip() if calls else text), calls


def _read_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a position, and where it ends; ValueError where none does."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value, end


def _parameter_types(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = function.get("parameters", {}).get("properties", {})
            return {key: schema.get("type") for key, schema in properties.items()}
    return {}


def _typed(value: str, kind: Any) -> Any:
    """A value that was written as text, in the type that the tool's schema asks for."""
    if kind == "string":
        return value
    plain = {"True": "true", "False": "false", "None": "null"}.get(value.strip(), value)
    try:
        return json.loads(plain)
    except ValueError:
        return value
