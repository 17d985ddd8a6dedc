"""Adapters on an OpenAI-compatible server, such as vLLM: who is asked, and how.

The server's answers pass through LangChain's own client for it, so tools, structured output and
streaming are as the app's model would have them. Nothing is recorded and nothing is sampled here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from marft_graph.deploy.manifest import Manifest
from marft_graph.deploy.untrained import Untrained
from marft_graph.errors import ConfigError
from marft_graph.names import agent_path
from marft_graph.rollout.callsite import CallSite
from marft_graph.rollout.responder import Delegate, InterceptedCall, Responder
from marft_graph.rollout.structure import schema_of, told

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

logger = logging.getLogger(__name__)


class ServerResponder(Responder):
    """Hands each trained node's calls to its adapter's model name on a server."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        base_url: str,
        api_key: str,
        timeout: float,
        temperature: float,
        fallback: bool,
    ) -> None:
        if timeout <= 0:
            raise ConfigError(f"timeout is {timeout}; it must be above 0")
        self._adapters = manifest.nodes
        self._untrained = Untrained(manifest)
        self._schema_in_prompt = manifest.schema_in_prompt
        self._max_new_tokens = manifest.max_new_tokens
        self._temperature = temperature
        self._fallback = fallback
        self._base_url = base_url
        self._models = {
            name: _client(name, base_url=base_url, api_key=api_key, timeout=timeout)
            for name in manifest.adapters
        }

    @property
    def delegates(self) -> bool:
        """Always: the client of the server answers."""
        return True

    def agent_for(self, node: str) -> str | None:
        """The node's adapter, where one was exported."""
        return self._adapters.get(agent_path(node))

    def passed(self, site: CallSite) -> None:
        """Tell of a node whose own model answers, once."""
        self._untrained.passed(site)

    def respond(self, call: InterceptedCall) -> Delegate:
        """Ask the server for the call, within the limits that the app set."""
        kwargs: dict[str, Any] = {
            "temperature": self._temperature if call.temperature is None else call.temperature,
            "max_tokens": call.max_tokens or self._max_new_tokens,
            "stop": list(call.stop) or None,
        }
        if call.tools:
            kwargs["tools"] = list(call.tools)
            if call.tool_choice is not None:
                kwargs["tool_choice"] = tool_choice(call.tool_choice)
            if call.asked.is_one_call:
                kwargs["parallel_tool_calls"] = False
        if call.asked.wants_logprobs:
            kwargs["logprobs"] = True
        if call.response_format is not None:
            kwargs["response_format"] = response_format(call.response_format)

        def replaces(error: Exception) -> bool:
            if not self._fallback or not _is_the_servers(error):
                return False
            logger.warning(
                "%s failed for node %r, whose own model answers instead: %s: %s",
                self._base_url,
                call.node,
                type(error).__name__,
                error,
            )
            return True

        messages = told(call) if self._schema_in_prompt else None
        return Delegate(self._models[call.agent], kwargs, messages=messages, replaces=replaces)


def tool_choice(asked: Any) -> Any:
    """Which tool an app asks for, in OpenAI's form.

    >>> tool_choice("any"), tool_choice({"type": "tool", "name": "add"})
    ('required', {'type': 'function', 'function': {'name': 'add'}})
    """
    if asked is True or asked in ("any", "required"):
        return "required"
    if isinstance(asked, str):
        if asked in ("auto", "none"):
            return asked
        return {"type": "function", "function": {"name": asked}}
    if isinstance(asked, Mapping):
        kind = asked.get("type")
        if kind in ("any", "auto", "none"):
            return "required" if kind == "any" else kind
        if kind == "tool":
            return {"type": "function", "function": {"name": asked["name"]}}
    return asked


def response_format(asked: Any) -> Any:
    """The structure that an app asks for, in OpenAI's form.

    >>> response_format({"type": "json_object", "schema": {"title": "Answer"}})
    {'type': 'json_object'}
    """
    if not isinstance(asked, Mapping) or asked.get("type") == "text" or "json_schema" in asked:
        return asked
    if asked.get("type") == "json_object":
        return {"type": "json_object"}
    schema = schema_of(asked) or {}
    named = {"name": schema.get("title", "answer"), "schema": schema}
    return {"type": "json_schema", "json_schema": named}


def _client(model: str, *, base_url: str, api_key: str, timeout: float) -> BaseChatModel:
    try:
        from langchain_openai.chat_models.base import BaseChatOpenAI
    except ImportError as error:
        raise ConfigError(
            "bind(base_url=...) needs langchain-openai: pip install 'marft-graph[openai]'"
        ) from error
    # The base class: ChatOpenAI changes requests for OpenAI's own models, whose names an adapter
    # may have by chance.
    return BaseChatOpenAI(
        model=model,
        base_url=base_url,
        api_key=api_key,  # type: ignore[arg-type]  # pydantic makes it a secret
        timeout=timeout,
        max_retries=1,
        stream_usage=True,
        use_responses_api=False,
    )


def _is_the_servers(error: Exception) -> bool:
    """Whether it is the server that failed, and not what the model wrote."""
    from openai import APIError

    return isinstance(error, APIError)
