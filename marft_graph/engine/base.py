"""What an engine is: something that continues a prompt of token ids for a named agent.

An engine owns its models and their tokenizers, hence also the codec between chat messages and
token ids. It knows nothing of graphs, episodes or rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from langchain_core.messages import AIMessage, BaseMessage

from marft_graph.episode import FinishReason


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How one completion is to be drawn."""

    temperature: float = 1.0
    """0 is greedy."""
    max_tokens: int = 256
    """Upper bound on completion tokens."""
    stop: tuple[str, ...] = ()
    """Generation ends once the decoded completion contains one of these."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One call of one agent.

    `agent` None is the untrained base. A sample is a function of the adapter, `prompt_ids`,
    `sampling`, `seed` and `grammar` alone. `order` sorts requests that join a batch together, so
    that batches are the same in every run with the same seed.
    """

    agent: str | None
    prompt_ids: tuple[int, ...]
    sampling: SamplingSettings
    seed: int = 0
    order: tuple[Any, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    """Tool schemas in OpenAI form, already rendered into the prompt; scripted engines read them."""
    tool_choice: Any = None
    """Which tool the app asks for, as it says it; only scripted engines read it."""
    response_format: Any = None
    """A pydantic class or a JSON schema that the app asks for; only scripted engines read it."""
    grammar: str = ""
    """JSON schema that the completion must fit, as text; empty: it is free. An engine that cannot
    constrain its completions ignores it."""
    timeout: float | None = None
    """Seconds from `submit` within which it must be answered; else it fails, alone, with
    `CallTimeoutError`. None: it may take any time. Scripted engines answer at once."""
    messages: tuple[BaseMessage, ...] = ()
    """The messages behind `prompt_ids`; only scripted engines read them."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled: ids (end-of-sequence included), one natural log-prob each."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    adapter_version: int
    is_constrained: bool = False
    """Whether the request's grammar held, and the log-probs are those of the tokens it allows."""


class ChatCodec(Protocol):
    """Chat messages to prompt ids, and completion ids back to a message."""

    def render(
        self, messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Token ids of the conversation, ending where the assistant's turn begins."""
        ...

    def parse(
        self,
        completion_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        tools: Sequence[dict[str, Any]] = (),
    ) -> AIMessage:
        """The message a completion stands for.

        Text is cut before the first stop string; tool calls go to `tool_calls`, malformed ones to
        `invalid_tool_calls`.
        """
        ...

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and completion may have together."""
        ...


@runtime_checkable
class SupportsDecode(Protocol):
    """A codec that tells the text of single tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        ...


@runtime_checkable
class WritesToolCalls(Protocol):
    """A codec that knows how its model writes tool calls."""

    @property
    def shows_tools(self) -> bool:
        """Whether the model's own template shows it the tools that it may call."""
        ...

    def tool_call_grammar(self, tools: Sequence[dict[str, Any]]) -> str:
        """What a completion must fit to be a call of one of the tools, as a request's `grammar`.

        Empty where the form is not known.
        """
        ...

    def answer_grammar(self, schema: Mapping[str, Any]) -> str:
        """What a completion must fit to be an answer by a JSON schema, as a request's `grammar`."""
        ...


class Gate(Protocol):
    """Tells an engine when no caller can submit more before it gets an answer."""

    def wait(self) -> None:
        """Return once no more calls can come, or after a short bounded patience."""
        ...


@runtime_checkable
class SupportsGate(Protocol):
    """An engine that can compose its batches deterministically."""

    def use_gate(self, gate: Gate | None) -> None:
        """Wait for `gate` before calls join a batch; None: start at once."""
        ...


class Engine(Protocol):
    """Samples completions; thread-safe."""

    def codec(self, agent: str | None) -> ChatCodec:
        """The codec of the model behind an agent."""
        ...

    def submit(self, request: GenerationRequest) -> Future[Completion]:
        """Queue a request from any thread; the future resolves to its completion.

        A future that is cancelled before it resolves frees its place in the batch.
        """
        ...

    def close(self) -> None:
        """Stop and release; pending futures fail with `EngineError`."""
        ...
