"""Calls that name the version of the adapter that they want, and versions that calls still ask for.

Who publishes versions, and what becomes of one that nobody asks for any more, is said from outside.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from marft_graph.engine.base import ChatCodec, Completion, GenerationRequest
from marft_graph.engine.vllm.endpoint import Adapter, Answer, Prompt
from marft_graph.engine.vllm.pool import ServerPool
from marft_graph.errors import ConfigError, EngineError, PromptTooLongError

logger = logging.getLogger(__name__)

# What vLLM accepts as it is; it raises lower temperatures to the first of them.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.01, 2.0
NO_GRAMMAR = (
    "constrain_output is not supported with engine vllm, whose log-probs are not those under the "
    "grammar; use engine local, or set constrain_output to false"
)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What calls need to know of the base and adapters that servers have."""

    agents: tuple[str, ...]
    codec: ChatCodec
    end_ids: tuple[int, ...]
    """Tokens that end a completion."""
    vocabulary: int
    """Token ids are below it."""


@dataclass(eq=False, slots=True)
class Publication:
    """The adapters of one version, and how many calls still ask for them."""

    version: int
    folder: Path
    adapters: dict[str | None, Adapter] = field(default_factory=dict)
    """None is the base, as an adapter that changes nothing."""
    users: int = 0

    def own_adapters(self) -> list[Adapter]:
        """The adapters that end with this version."""
        return [adapter for agent, adapter in self.adapters.items() if agent is not None]


class VersionedCalls:
    """Puts requests to servers, each to the version that was in use when it came; thread-safe.

    Args:
        model: what the servers serve.
        pool: the servers.
        retire: called once for every version that is no longer in use and that nobody asks for.
    """

    def __init__(
        self, model: ServedModel, pool: ServerPool, retire: Callable[[Publication], None]
    ) -> None:
        self._model = model
        self._pool = pool
        self._retire = retire
        self._lock = threading.Lock()
        self.published: Publication | None = None
        """The version in use."""

    def use(self, publication: Publication) -> None:
        """Let requests ask for these adapters from now on."""
        with self._lock:
            old, self.published = self.published, publication
            is_over = old is not None and old.users == 0
        if old is not None and is_over:
            self._retire(old)

    @contextlib.contextmanager
    def held(self) -> Iterator[Publication]:
        """The version in use, which is not retired before the context ends.

        Raises:
            EngineError: there is none.
        """
        publication = self._take()
        try:
            yield publication
        finally:
            self._release(publication)

    def submit(self, request: GenerationRequest) -> Future[Completion]:
        """Queue a request for the version in use.

        Raises:
            EngineError: there is none, the pool is closed, or the agent is not known.
            PromptTooLongError: the prompt leaves no room for a token.
            ConfigError: the request has a grammar, or a temperature that vLLM would change.
        """
        self._check(request)
        model = self._model
        prompt = Prompt(
            request.prompt_ids, request.sampling, request.seed, model.end_ids, model.vocabulary
        )
        publication = self._take()
        future: Future[Completion] = Future()
        try:
            answer = self._pool.submit(publication.adapters[request.agent], prompt, request.timeout)
        except KeyError:
            self._release(publication)
            raise EngineError(
                f"version {publication.version} has no adapter {request.agent!r}"
            ) from None
        except BaseException:
            self._release(publication)
            raise
        future.add_done_callback(lambda done: answer.cancel() if done.cancelled() else None)
        answer.add_done_callback(
            functools.partial(self._settle, future=future, publication=publication)
        )
        return future

    def _check(self, request: GenerationRequest) -> None:
        if request.agent is not None and request.agent not in self._model.agents:
            raise EngineError(
                f"no adapter {request.agent!r}; this engine has {', '.join(self._model.agents)}"
            )
        context = self._model.codec.context_length
        if not 0 < len(request.prompt_ids) < context:
            raise PromptTooLongError(
                f"prompt of {request.agent or 'the base'} has {len(request.prompt_ids)} tokens; "
                f"the context of {context} needs room for an answer"
            )
        if request.grammar:
            raise ConfigError(NO_GRAMMAR)
        temperature = request.sampling.temperature
        if temperature and not _LEAST_TEMPERATURE <= temperature <= _MOST_TEMPERATURE:
            raise ConfigError(
                f"temperature is {temperature:g}; on vLLM it must be 0 or between "
                f"{_LEAST_TEMPERATURE} and {_MOST_TEMPERATURE:g}"
            )

    def _settle(
        self, answer: Future[Answer], *, future: Future[Completion], publication: Publication
    ) -> None:
        try:
            self._release(publication)
        except Exception:  # the caller waits for the answer, whatever becomes of old adapters
            logger.exception("adapters of version %d could not be retired", publication.version)
        if not future.set_running_or_notify_cancel():
            return
        if answer.cancelled():
            future.set_exception(EngineError("the engine was closed"))
        elif (error := answer.exception()) is not None:
            future.set_exception(error)
        else:
            got = answer.result()
            version = publication.version
            future.set_result(Completion(got.ids, got.logprobs, got.finish_reason, version))

    def _take(self) -> Publication:
        with self._lock:
            if self.published is None:
                raise EngineError("nothing was published yet; call publish(version) first")
            self.published.users += 1
            return self.published

    def _release(self, publication: Publication) -> None:
        with self._lock:
            publication.users -= 1
            is_over = publication.users == 0 and publication is not self.published
        if is_over:
            self._retire(publication)
