"""Calls of the local engine: as they wait, and as rows of the running batch."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from marft_graph.engine.base import Completion, GenerationRequest
from marft_graph.errors import CallTimeoutError, MarftError
from marft_graph.policy.grammar import Following


@dataclass(eq=False, slots=True)
class Waiting:
    """A call that was submitted."""

    request: GenerationRequest
    future: Future[Completion]
    deadline: float
    """On the monotonic clock; infinity: none."""

    def too_late(self, doing: str) -> CallTimeoutError:
        """The error of a call that has missed its deadline."""
        return CallTimeoutError(
            f"a call of {self.request.agent or 'the base'} was not answered within "
            f"{self.request.timeout:g} seconds (call_timeout); it was {doing}"
        )


@dataclass(eq=False, slots=True)
class Running:
    """A completion in the running batch."""

    waiting: Waiting
    limit: int
    """Most tokens this completion may still have in the context."""
    uniforms: list[float]
    """One uniform number per token, from the call's own seed: neighbours do not change a sample."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    grammar: Following | None = None
    """Says which tokens may come next; None: all."""
    failure: MarftError | None = None
    """Why the completion cannot be finished."""

    @property
    def request(self) -> GenerationRequest:
        """What was asked for."""
        return self.waiting.request

    @property
    def future(self) -> Future[Completion]:
        """Where the completion goes."""
        return self.waiting.future

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the last one sampled."""
        return len(self.request.prompt_ids) + len(self.ids) - 1
