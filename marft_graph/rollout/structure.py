"""Structured output: the schema that an app asks for, how a model is told, and how it fails.

The one rule: whatever way a structured answer fails to parse, the app meets the exception that its
own model's class would raise, and the episode's failure has one name, `StructuredOutputError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage
from pydantic import BaseModel, PydanticUserError, ValidationError

from marft_graph.policy.paragraph import with_paragraph
from marft_graph.rollout.responder import InterceptedCall

_SHOWN_CHARACTERS = 200


def structured_answer(text: str, response_format: Any) -> Any:
    """What OpenAI models put into `parsed`: the answer's JSON, validated; None where it is invalid.

    >>> structured_answer('{"answer": 12}', {"type": "json_schema"})
    {'answer': 12}
    """
    if response_format is None:
        return None
    if is_model_class(response_format):
        try:
            return response_format.model_validate_json(text)
        except ValidationError:
            return None
    if not isinstance(response_format, Mapping) or response_format.get("type") != "json_schema":
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_model_class(response_format: Any) -> bool:
    """Whether the format is a pydantic class, as OpenAI models take one."""
    return isinstance(response_format, type) and issubclass(response_format, BaseModel)


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
        known: Mapping[str, Any] | None = response_format.get("schema")
        return known or {"type": "object", "additionalProperties": True}
    return None if kind == "text" else response_format


def _schema_if_any(response_format: Any) -> Mapping[str, Any] | None:
    """The schema; None too for a class that has none, which only constrained output refuses."""
    try:
        return schema_of(response_format)
    except PydanticUserError:
        return None


# How a model is told


def told(call: InterceptedCall) -> tuple[BaseMessage, ...]:
    """The call's messages, with what a provider's server would know of the answer's form."""
    wish = instruction(call)
    if not wish:
        return call.messages
    return with_paragraph(call.messages, wish)


def instruction(call: InterceptedCall) -> str:
    """What a model is told of the form of its answer; empty where it is free.

    A tool call that is forced needs no words: its tool's schema is in the prompt already.
    """
    schema = _schema_if_any(call.response_format)
    if schema is None:
        return ""
    otherwise = " unless you call a tool" if call.tools and call.tool_choice != "none" else ""
    if "properties" not in schema and schema.get("type") == "object":
        return f"Answer with one JSON object and nothing else{otherwise}."
    text = json.dumps(_without_titles(schema), ensure_ascii=False, separators=(",", ":"))
    return f"Answer with JSON that fits this schema and nothing else{otherwise}:\n{text}"


def _without_titles(schema: Any, *, is_named: bool = False) -> Any:
    """The schema without the titles that pydantic makes of names; `is_named`: keys are names."""
    if isinstance(schema, Mapping):
        return {
            name: _without_titles(inner, is_named=not is_named and name in ("properties", "$defs"))
            for name, inner in schema.items()
            if is_named or name != "title" or not isinstance(inner, str)
        }
    return [_without_titles(item) for item in schema] if isinstance(schema, list) else schema


# How it fails


def problem_of(call: InterceptedCall, message: AIMessage, *, is_cut_off: bool, tokens: int) -> str:
    """Why an answer has not the form that the app asks for; empty where it has, or was free.

    Args:
        call: what was asked.
        message: what was answered.
        is_cut_off: whether the answer ended at its limit of tokens.
        tokens: of the answer.
    """
    if call.asked.forced_tools:
        problem, what = _problem_of_call(call, message), "tool call"
    elif call.response_format is not None and not message.tool_calls:
        problem, what = _problem_of_json(call.response_format, message.text), "JSON"
    else:
        return ""
    if problem and is_cut_off:
        return f"the {what} was cut off at max tokens, after {tokens}: {problem}"
    return problem


def asks_for_structure(call: InterceptedCall) -> bool:
    """Whether the app parses the answer: by a response format or from a forced tool call."""
    return bool(call.asked.forced_tools) or call.response_format is not None


def _problem_of_call(call: InterceptedCall, message: AIMessage) -> str:
    forced = call.asked.forced_tools
    parameters = {
        tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in call.tools
    }
    for made in message.tool_calls:
        if made["name"] in forced:
            misfit = next(misfits(made["args"], parameters.get(made["name"], {})), "")
            return f"the call of tool {made['name']!r} does not fit: {misfit}" if misfit else ""
    asked = " or ".join(map(repr, forced))
    for broken in message.invalid_tool_calls:
        return f"a forced tool call ({asked}) was written wrongly: {broken['error']}"
    if message.tool_calls:
        return f"a forced tool call ({asked}) was not written, but one of {_names(message)}"
    return f"a forced tool call ({asked}) was not written: {_shown(message.text)}"


def _names(message: AIMessage) -> str:
    return ", ".join(repr(call["name"]) for call in message.tool_calls)


def _problem_of_json(response_format: Any, text: str) -> str:
    schema = _schema_if_any(response_format)
    if schema is None and not is_model_class(response_format):
        return ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the answer is no JSON ({error}): {_shown(text)}"
    if is_model_class(response_format):
        try:
            response_format.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            return f"the answer does not fit {response_format.__name__}: {place}: {first['msg']}"
        return ""
    misfit = next(misfits(value, schema), "")
    return f"the answer does not fit its JSON schema: {misfit}" if misfit else ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")


_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (Mapping,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def misfits(
    value: Any, schema: Any, root: Mapping[str, Any] | None = None, place: str = "the answer"
) -> Iterator[str]:
    """Where a value does not fit a JSON schema, as far as types, names and choices tell.

    >>> schema = {"properties": {"n": {"type": "integer"}}, "required": ["n", "m"]}
    >>> list(misfits({"n": "1"}, schema))
    ["the answer lacks 'm'", 'the answer.n is no integer']
    """
    if not isinstance(schema, Mapping):
        return
    root = schema if root is None else root
    if isinstance(schema.get("$ref"), str):
        yield from misfits(value, _target(schema["$ref"], root), root, place)
        return
    for several in ("anyOf", "oneOf"):
        choices = schema.get(several)
        if choices and all(any(misfits(value, choice, root)) for choice in choices):
            yield f"{place} fits none of the choices"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_of(value, kind) for kind in kinds):
        yield f"{place} is no {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is none of {schema['enum']}"
    if isinstance(value, Mapping):
        yield from (
            f"{place} lacks {name!r}" for name in schema.get("required", ()) if name not in value
        )
        for name, inner in (schema.get("properties") or {}).items():
            if name in value:
                yield from misfits(value[name], inner, root, f"{place}.{name}")
    if isinstance(value, list):
        for position, item in enumerate(value):
            yield from misfits(item, schema.get("items"), root, f"{place}[{position}]")


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind != "boolean":
        return False
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, (object,)))


def _target(reference: str, root: Mapping[str, Any]) -> Any:
    """What a `$ref` inside the schema names; nothing where it leads outside."""
    part_of_schema: Any = root
    for part in reference.lstrip("#/").split("/"):
        part_of_schema = part_of_schema.get(part) if isinstance(part_of_schema, Mapping) else None
    return part_of_schema


def raise_as_own_model(call: InterceptedCall, message: AIMessage, *, is_cut_off: bool) -> None:
    """Raise what the app's own model raises for an answer that does not parse, if it raises itself.

    OpenAI's client parses inside the model call; the other classes leave it to LangChain's parsers,
    which the app has already.

    Raises:
        openai.LengthFinishReasonError: a structured answer was cut off.
        pydantic.ValidationError: the answer does not fit the class that was asked for.
    """
    if call.response_format is None or call.asked.provider != "openai" or message.tool_calls:
        return
    if is_cut_off:
        raise _cut_off(call, message)
    if is_model_class(call.response_format) and message.text:
        call.response_format.model_validate_json(message.text)


def _cut_off(call: InterceptedCall, message: AIMessage) -> Exception:
    from openai import LengthFinishReasonError
    from openai.types.chat import ChatCompletion

    usage = message.response_metadata.get("token_usage")
    answer = {
        "id": message.id or "",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": message.text},
            }
        ],
        "created": 0,
        "model": call.model_name,
        "object": "chat.completion",
        "usage": usage,
    }
    return LengthFinishReasonError(completion=ChatCompletion.model_validate(answer))


# Which failures of an episode it explains

FAULT_NAMES = ("StructuredOutputError", "OutputParserException", "ValidationError")
"""Names under which `fault_rewards` finds such a failure, the first that it has."""
_ALWAYS = frozenset({"StructuredOutputError", "OutputParserException"})
_OF_PARSERS = frozenset(
    {"ValidationError", "JSONDecodeError", "LengthFinishReasonError", "OpenAIRefusalError"}
)


def failure_of(
    error: BaseException, task: str, answers: Sequence[tuple[InterceptedCall, str]]
) -> str | None:
    """Why a structured answer is what ended an episode; None where something else did.

    Args:
        error: that ended it.
        task: namespace of the innermost task that it left.
        answers: the episode's calls in the order of their answers, each with its problem.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    mine = [
        (call, problem)
        for call, problem in answers
        if task and (call.namespace == task or call.namespace.startswith(f"{task}|"))
    ]
    last, problem = mine[-1] if mine else (None, "")
    if names & _ALWAYS:
        return problem or str(error)
    if last is not None and asks_for_structure(last) and names & _OF_PARSERS:
        return problem or str(error)
    if problem and isinstance(
        error, ValueError | TypeError | AttributeError | LookupError | AssertionError
    ):
        return problem
    if answers and ("GraphRecursionError" in names or _is_about_none(error)):
        return _unmended(answers)
    return None


def _unmended(answers: Sequence[tuple[InterceptedCall, str]]) -> str | None:
    """The problem of the latest answer that had one, unless its node answered well since."""
    latest: dict[str, str] = {}
    for call, problem in answers:
        latest.pop(call.node, None)
        latest[call.node] = problem
    return next((problem for problem in reversed(latest.values()) if problem), None)


def _is_about_none(error: BaseException) -> bool:
    """Whether code met a None, which parsers give for a tool call that was not written."""
    if isinstance(error, KeyError):
        return error.args == (None,)
    return isinstance(error, AttributeError | TypeError) and "NoneType" in str(error)
