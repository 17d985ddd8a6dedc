"""What an app wants of an answer, read from the words of its provider's class.

Every provider's class names structured output, forced tool calls and log-probs in its own way.
Here they become one: OpenAI's form. Providers are told apart by the package of the class, so that
none of them needs to be installed. Knows nothing of runs, prompts and engines.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel, PydanticUserError

from marft_graph.errors import ConfigError

logger = logging.getLogger(__name__)

PROVIDERS = ("openai", "anthropic", "google_genai", "ollama", "mistralai", "groq")
"""Providers whose words are known: `langchain_NAME` is the package of their chat model."""
REASON_KEYS = ("finish_reason", "stop_reason", "done_reason")
"""Keys of `response_metadata` under which providers say why an answer ended."""
CUT_OFF = frozenset({"length", "max_tokens", "MAX_TOKENS"})
"""What providers say there of an answer that ended at its limit of tokens."""
_OWN_FORMS = (
    "function",
    "parameters",
    "input_schema",
    "function_declarations",
    "functionDeclarations",
)
_GOOGLE_TYPES = ("STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL")
_PROVIDERS_TOOL = (
    "node %r gives its model the provider's own tool %r, which runs on the provider's servers; the "
    "trained model is not shown it. Give the node a tool of the app's own for it, or keep the node "
    "out of `nodes`, so that it keeps its own model"
)
_told_of: set[tuple[str, str]] = set()


# What `with_structured_output` says of itself; LangChain drops it before the model is asked.
_declared: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "marft_structure", default=MappingProxyType({})
)


@contextmanager
def asked_for(kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Remember, while the model is asked, which structure a call with these arguments is for."""
    declared = kwargs.get("ls_structured_output_format") or kwargs.get("structured_output_format")
    token = _declared.set(_mapping(declared))
    try:
        yield
    finally:
        _declared.reset(token)


@dataclass(frozen=True, slots=True)
class Asked:
    """What an app wants of one answer, beside tools and structure."""

    forced_tools: tuple[str, ...] = ()
    """Names of the tools of which one must be called; none: the model is free."""
    is_one_call: bool = False
    """Whether the app wants at most one tool call (`parallel_tool_calls=False`)."""
    wants_logprobs: bool = False
    provider: str = ""
    """One of `PROVIDERS` whose class, or a class of which, the app's model is."""


def what_is_asked(
    model: BaseChatModel, kwargs: Mapping[str, Any], node: str
) -> tuple[tuple[dict[str, Any], ...], Any, Any, Asked]:
    """Tools, tool choice and response format in OpenAI form, and the rest.

    Args:
        model: the app's own model.
        kwargs: what it is asked with; nothing that is None.
        node: whose call it is, for messages.

    Raises:
        ConfigError: the app asks for the log-probs of tokens that were not written.
    """
    extra = getattr(model, "model_kwargs", None)
    arguments = {**(extra if isinstance(extra, Mapping) else {}), **kwargs}
    tools = _tools(arguments.get("tools", ()), node)
    names = tuple(tool["function"]["name"] for tool in tools)
    choice, forced = _tool_choice(arguments, names)
    declared = _declared.get()
    method = _mapping(declared.get("kwargs")).get("method")
    if method == "function_calling" and not forced and choice != "none":
        # Ollama's class cannot force a call, but parses the answer as if it had.
        forced = tuple(name for name in names if name == _name_of(declared.get("schema")))
    is_single = arguments.get("parallel_tool_calls") is False or bool(
        _mapping(arguments.get("tool_choice")).get("disable_parallel_tool_use")
    )
    asked = Asked(
        forced_tools=forced,
        is_one_call=is_single,
        wants_logprobs=_wants_logprobs(model, arguments, node),
        provider=provider_of(model),
    )
    structure = _structure(model, arguments)
    if method == "json_mode" and _mapping(structure).get("type") == "json_object":
        structure = {**structure, **_schema_entry(declared.get("schema"))}
    return tools, choice, structure, asked


def _name_of(schema: Any) -> str | None:
    """The name of the tool that stands for a schema."""
    try:
        name = convert_to_openai_tool(schema)["function"]["name"]
    except (ValueError, TypeError, KeyError):
        return None
    return str(name)


def _schema_entry(schema: Any) -> dict[str, Any]:
    """The JSON schema by which the app will parse any JSON object; nothing where it has none."""
    try:
        return {"schema": convert_to_json_schema(schema)} if schema is not None else {}
    except (PydanticUserError, ValueError, TypeError):
        return {}


def provider_of(model: BaseChatModel) -> str:
    """The provider whose LangChain package the model's class, or one it inherits from, is in."""
    for kind in type(model).__mro__:
        name = kind.__module__.partition(".")[0].removeprefix("langchain_")
        if name in PROVIDERS:
            return name
    return ""


def _tools(tools: Sequence[Any], node: str) -> tuple[dict[str, Any], ...]:
    """The tools in OpenAI form, without those that only the provider can run."""
    forms = []
    for tool in tools:
        if isinstance(tool, Mapping) and not any(name in tool for name in _OWN_FORMS):
            kind = str(tool.get("type") or next(iter(tool), "?"))
            if kind not in ("function", "object") and "title" not in tool:
                warn_once(node, _PROVIDERS_TOOL, kind)
                continue
        declared = _mapping(tool)
        several = declared.get("function_declarations", declared.get("functionDeclarations"))
        if several is None:
            forms.append(convert_to_openai_tool(tool))
        else:
            forms += [convert_to_openai_tool(_google_function(one)) for one in several]
    return tuple(forms)


def _google_function(declaration: Any) -> dict[str, Any]:
    """One of Google's function declarations as OpenAI's function."""
    known = _mapping(declaration)
    parameters = known.get("parameters_json_schema") or known.get("parameters") or {}
    return {
        "name": known["name"],
        "description": known.get("description", ""),
        "parameters": _plain_schema(parameters),
    }


def warn_once(node: str, message: str, *values: Any) -> None:
    """Log a warning whose first value is the node, once for each node and kind of warning."""
    if (node, message) not in _told_of:
        _told_of.add((node, message))
        logger.warning(message, node, *values)


def _tool_choice(kwargs: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """Which tools an app asks for: in OpenAI form, and the names among which one is forced.

    >>> _tool_choice({"tool_choice": {"type": "tool", "name": "add"}}, ["add", "sub"])
    ({'type': 'function', 'function': {'name': 'add'}}, ('add',))
    >>> _tool_choice({"tool_choice": "any"}, ["add", "sub"])
    ('required', ('add', 'sub'))
    """
    asked = kwargs.get("tool_choice")
    config = _mapping(kwargs.get("tool_config"))
    if asked is None and config:
        inner = config.get("function_calling_config", config.get("functionCallingConfig"))
        asked = _mapping(inner) or None
    allowed: Sequence[str] = kwargs.get("allowed_function_names") or ()
    if isinstance(asked, list | tuple):  # Google: names of which one is to be called
        asked, allowed = "any", asked
    if isinstance(asked, Mapping):
        asked, allowed = _named_choice(asked)
    if asked is None or asked == "auto" or not names:
        return asked, ()
    if asked is False or asked == "none":
        return "none", ()
    if asked is True or asked in ("any", "required"):
        among = tuple(name for name in names if not allowed or name in allowed)
        if len(among) < len(names) and len(among) == 1:
            return {"type": "function", "function": {"name": among[0]}}, among
        return "required", among
    return {"type": "function", "function": {"name": asked}}, (asked,)


def _named_choice(asked: Mapping[str, Any]) -> tuple[Any, Sequence[str]]:
    """A choice that is an object: a mode or a tool's name, and the tools that it may be."""
    kind = str(asked.get("type") or asked.get("mode") or "auto").rpartition(".")[2].lower()
    if kind == "allowed_tools":
        inner = _mapping(asked.get("allowed_tools")) or asked
        tools = [_mapping(tool) for tool in inner.get("tools", ())]
        names = [_mapping(tool.get("function")).get("name") or tool.get("name") for tool in tools]
        return inner.get("mode", "auto"), [name for name in names if name]
    if kind in ("tool", "function"):
        return _mapping(asked.get("function")).get("name") or asked.get("name"), ()
    allowed = asked.get("allowed_function_names") or asked.get("allowedFunctionNames") or ()
    return ("auto" if kind in ("validated", "mode_unspecified") else kind), allowed


def _structure(model: BaseChatModel, kwargs: Mapping[str, Any]) -> Any:
    """The response format: a pydantic class of an OpenAI model, else a dict; None: any text."""
    for named in (
        kwargs.get("response_format"),
        _mapping(kwargs.get("text")).get("format"),
        _mapping(kwargs.get("output_config")).get("format"),
        kwargs.get("output_format"),
    ):
        if isinstance(named, type) and issubclass(named, BaseModel):
            return named
        if isinstance(named, Mapping):
            return None if named.get("type") == "text" else named
    return _googles(model, kwargs) or _ollamas(model, kwargs)


def _googles(model: BaseChatModel, kwargs: Mapping[str, Any]) -> Any:
    """`response_mime_type` with a schema."""
    settings = _mapping(kwargs.get("generation_config"))

    def setting(name: str) -> Any:
        return kwargs.get(name) or settings.get(name) or getattr(model, name, None)

    if setting("response_mime_type") != "application/json":
        return None
    schema = setting("response_json_schema") or setting("response_schema")
    if schema is None:
        return {"type": "json_object"}
    return {"type": "json_schema", "schema": _plain_schema(schema)}


def _ollamas(model: BaseChatModel, kwargs: Mapping[str, Any]) -> Any:
    """`format`: "json" or a schema."""
    asked = kwargs.get("format") or getattr(model, "format", None)
    if asked == "json":
        return {"type": "json_object"}
    if isinstance(asked, type) and issubclass(asked, BaseModel):
        asked = asked.model_json_schema()
    return {"type": "json_schema", "schema": asked} if isinstance(asked, Mapping) else None


def _plain_schema(schema: Any) -> Any:
    """A schema of Google's, whose types are in capitals, as JSON schema."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    if isinstance(schema, BaseModel):
        schema = schema.model_dump(exclude_none=True, mode="json")
    if isinstance(schema, Mapping):
        return {
            name: value.lower()
            if name == "type" and isinstance(value, str) and value in _GOOGLE_TYPES
            else _plain_schema(value)
            for name, value in schema.items()
        }
    return [_plain_schema(item) for item in schema] if isinstance(schema, list) else schema


def _wants_logprobs(model: BaseChatModel, kwargs: Mapping[str, Any], node: str) -> bool:
    def setting(name: str) -> Any:
        return kwargs.get(name, getattr(model, name, None))

    asked = setting("logprobs")
    if (isinstance(asked, int) and asked is not True and asked) or setting("top_logprobs"):
        raise ConfigError(
            f"node {node!r} asks its model for top_logprobs, the log-probs of tokens that it did "
            "not write; trained models report those of the written tokens: ask for logprobs=True "
            "alone, or keep the node out of `nodes`"
        )
    return asked is True


def _mapping(value: Any) -> Mapping[str, Any]:
    """A value as a mapping, pydantic objects included; empty where it is none."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True, mode="json")
    return value if isinstance(value, Mapping) else {}


def reason_in_words_of(provider: str, reason: str) -> dict[str, str]:
    """Why an answer ended, under the provider's key and in its words.

    Args:
        provider: one of `PROVIDERS`; others get OpenAI's words.
        reason: `stop`, `length` or `tool_calls`.

    >>> reason_in_words_of("anthropic", "length")
    {'stop_reason': 'max_tokens'}
    >>> reason_in_words_of("openai", "tool_calls")
    {'finish_reason': 'tool_calls'}
    """
    if provider == "anthropic":
        words = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
        return {"stop_reason": words[reason]}
    if provider == "google_genai":
        return {"finish_reason": "MAX_TOKENS" if reason == "length" else "STOP"}
    if provider == "ollama":
        return {"done_reason": "length" if reason == "length" else "stop"}
    return {"finish_reason": reason}


def usage_in_words_of(provider: str, read: int, written: int) -> dict[str, Any]:
    """Token counts as the provider's class puts them into `response_metadata`."""
    if provider == "anthropic":
        return {"usage": {"input_tokens": read, "output_tokens": written}}
    if provider == "ollama":
        return {"prompt_eval_count": read, "eval_count": written, "done": True}
    if provider == "google_genai":
        return {}
    counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"token_usage": counts}
