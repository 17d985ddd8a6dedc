"""Who answers the model calls of a run: the seam between `intercept` and episodes, bound apps.

A call is answered by an adapter, or passed to the app's own model by whoever runs the app: never
without that one having been asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage

from marft_graph.rollout.asked import Asked
from marft_graph.rollout.callsite import CallSite


@dataclass(frozen=True, slots=True)
class InterceptedCall:
    """One chat-model call of a graph node, with what the app asked for."""

    agent: str
    """Adapter that is to answer, as `Responder.agent_for` named it."""
    node: str
    """Node path, without task ids."""
    namespace: str
    """Node names and task ids from the run's outermost graph down."""
    step: int
    """Superstep of the innermost graph."""
    path: tuple[Any, ...]
    """LangGraph's path of the task: tells tasks of one node in one superstep apart."""
    messages: tuple[BaseMessage, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Tool schemas in OpenAI form."""
    tool_choice: Any = None
    """Which tool the app asks for, in OpenAI form."""
    response_format: Any = None
    """A pydantic class or a JSON schema dict, where structured output is asked for that way."""
    asked: Asked = dataclasses.field(default_factory=Asked)
    """What else the app wants of the answer, and in whose words."""
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    model_name: str = ""
    """What the app calls its own model."""

    @property
    def task_id(self) -> str:
        """Id of the LangGraph task that makes the call."""
        named = [part for part in self.namespace.split("|") if not part.isdigit()]
        return named[-1].rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class Pending:
    """An answer on its way: `finish` turns the future's result into the message, in the caller."""

    future: Future[Any]
    finish: Callable[[Any], AIMessage]


@dataclass(frozen=True, slots=True)
class Delegate:
    """A chat model that makes the call by LangChain's own means, streaming included."""

    model: BaseChatModel | None = None
    """None: the app's own model, asked exactly as the app asks it."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What another model is asked with: tools, limits and the like in its own terms."""
    messages: Sequence[BaseMessage] | None = None
    """What another model is asked, where that is not what the app's own would be asked."""
    answered: Callable[[AIMessage], None] | None = None
    """Told the whole answer."""
    replaces: Callable[[Exception], bool] | None = None
    """Whether the app's own model is to answer after the other one raised this."""


class Responder(Protocol):
    """Who answers the calls of a run. Inherit from it to get the defaults."""

    @property
    def delegates(self) -> bool:
        """Whether `respond` names a chat model, whose answers may be streamed as they come."""
        return False

    def agent_for(self, node: str) -> str | None:
        """Adapter that answers for a node path; None: the node keeps its own model."""
        ...

    def respond(self, call: InterceptedCall) -> Pending | Delegate:
        """Begin to answer a call; called in whatever thread the app calls from."""
        ...

    @property
    def is_strict(self) -> bool:
        """Whether calls that no task makes are refused while the run is active."""
        return False

    def passed(self, site: CallSite) -> None:
        """Told of a call that the app's own model is about to answer, as `agent_for` named nobody.

        What it raises the call raises: nothing has then left for the model.
        """
        return

    def seconds_left(self) -> float | None:
        """How long a call may still wait; None: for ever."""
        return None

    def blocked_on(self, future: Future[Any]) -> AbstractContextManager[None]:
        """Entered while a thread waits for `future`."""
        return nullcontext()

    def credit(self, namespace: str, amount: float) -> None:
        """Take a reward that a task emits while it runs; by default nobody wants it."""
        return
