"""What happens inside one episode while it runs: `EpisodeRecorder` answers and records its calls.

The tasks around a call are known from `watch`; parents are found after the episode, in `trace`.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from marft_graph.engine.base import (
    Completion,
    Engine,
    GenerationRequest,
    SamplingSettings,
)
from marft_graph.episode import SetAside
from marft_graph.errors import (
    EngineError,
    EpisodeTimeoutError,
    MarftError,
    RewardError,
    UndecidedCallError,
)
from marft_graph.names import node_path
from marft_graph.rollout.answers import message_for, prompt_of, request_for
from marft_graph.rollout.asked import CUT_OFF, REASON_KEYS
from marft_graph.rollout.callsite import CallSite
from marft_graph.rollout.decisions import Decisions
from marft_graph.rollout.emit import Emitted
from marft_graph.rollout.quiescence import Quiescence
from marft_graph.rollout.read_log import ReadLog
from marft_graph.rollout.responder import Delegate, InterceptedCall, Pending, Responder
from marft_graph.rollout.rewards import finite_number
from marft_graph.rollout.settings import RolloutSettings
from marft_graph.rollout.structure import problem_of, raise_as_own_model, told
from marft_graph.rollout.watch import TaskWatch

_JUST_NOW = 0.1
"""Seconds before the deadline that count as its end."""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """An answered call with the marks that `trace` orders it by."""

    call: InterceptedCall
    request: GenerationRequest
    completion: Completion
    message: AIMessage
    lineage: tuple[Any, ...]
    """Node name, superstep and path of each task from the root down: the same in every run."""
    attempts: tuple[tuple[str, int], ...]
    """Namespace and attempt number of each task around the call."""
    begun: int
    ended: int
    """Positions on the episode's clock: a call that ended before another began was known to it."""
    started: float
    seconds: float
    problem: str = ""
    """Why the answer has not the form that the app asks for; empty: it has, or is free."""


class _Began(NamedTuple):
    """Where and when a call began."""

    lineage: tuple[Any, ...]
    attempts: tuple[tuple[str, int], ...]
    clock: int
    time: float


def stable_seed(*parts: Any) -> int:
    """A 63-bit seed from plain values; the same in every process.

    >>> stable_seed(0, "actor", (1, 2)) == stable_seed(0, "actor", (1, 2))
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class EpisodeRecorder(Responder):
    """Answers the trained nodes' calls of one episode from an engine and keeps them.

    Args:
        engine: None: the app's own models answer, and their calls are kept without token ids.
        decisions: who answers which node.
        order: where the episode stands among all (example, group), for the engine's batches.
        settings: of the rollout.
    """

    def __init__(
        self,
        engine: Engine | None,
        decisions: Decisions,
        watch: TaskWatch,
        quiescence: Quiescence,
        *,
        seed: int,
        order: tuple[int, int],
        settings: RolloutSettings,
    ) -> None:
        self.calls: list[RecordedCall] = []
        self.emitted: list[Emitted] = []
        """Rewards that nodes emitted, those of failed attempts included."""
        self.asked: Counter[str] = Counter()
        """Calls of trained nodes by node path, answered or not."""
        self.passed_on: Counter[str] = Counter()
        """Calls of frozen nodes, which their own models answer."""
        self.undecided: Counter[str] = Counter()
        """Calls of nodes that nobody had decided on, which their own models answer."""
        self.fatal: MarftError | None = None
        """The first failure that is ours and not the app's; no `except` of the app hides it."""
        self._engine = engine
        self._decisions = decisions
        self._watch = watch
        self._quiescence = quiescence
        self._seed = seed
        self._order = order
        self._settings = settings
        self._started = time.monotonic()
        self._deadline = self._started + settings.episode_timeout
        self._clock = itertools.count()
        self.reads = ReadLog(self._clock)
        """What the app's tasks read of their state, on the clock of the calls."""
        self._lock = threading.Lock()
        self._repeats: Counter[tuple[Any, ...]] = Counter()
        self._futures: dict[Future[Completion], str] = {}
        """What the engine has not answered yet, in words."""
        self._late: list[str] = []
        self._is_over = False

    def agent_for(self, node: str) -> str | None:
        """Adapter of a trained node."""
        return self._decisions.agent_of(node)

    @property
    def is_strict(self) -> bool:
        """Unless the app's own models are what is asked for."""
        return self._engine is not None

    def passed(self, site: CallSite) -> None:
        """Count a call that the node's own model answers; refuse what nobody decided on."""
        if self._engine is None:
            return
        try:
            is_decided = self._decisions.pass_on(site)
        except UndecidedCallError as error:
            self._note(error)
            raise
        with self._lock:
            (self.passed_on if is_decided else self.undecided)[site.node] += 1

    def set_aside(
        self, answered: Sequence[RecordedCall], kept: Collection[int]
    ) -> tuple[tuple[str, SetAside], ...]:
        """The calls that are none of the episode's, and why, when the run has ended.

        Args:
            answered: `calls` at its end.
            kept: positions in it of those that are the episode's.
        """
        retried = Counter(c.call.node for place, c in enumerate(answered) if place not in kept)
        with self._lock:
            unanswered = self.asked - Counter(recorded.call.node for recorded in answered)
            why = (
                (SetAside.RETRIED, retried),
                (SetAside.UNANSWERED, unanswered),
                (SetAside.OWN_MODEL, self.passed_on),
                (SetAside.UNDECIDED, self.undecided),
            )
            return tuple((node, reason) for reason, calls in why for node in calls.elements())

    def seconds_left(self) -> float:
        """Seconds until the episode's deadline."""
        return max(0.0, self._deadline - time.monotonic())

    def unanswered(self) -> list[str]:
        """The calls that the engine has not answered yet, in words."""
        with self._lock:
            return [*self._futures.values(), *self._late]

    def blocked_on(self, future: Future[Any]) -> AbstractContextManager[None]:
        """Tells the gate that this thread waits."""
        return self._quiescence.blocked_on(future)

    @property
    def delegates(self) -> bool:
        """Whether the app's own models answer."""
        return self._engine is None

    def respond(self, call: InterceptedCall) -> Pending | Delegate:
        """Submit a call to the engine, or watch the app's own model answer it."""
        with self._lock:
            self.asked[call.node] += 1
        if self._engine is None:
            return self._watched(call)
        most = self._settings.max_new_tokens
        if self._settings.cap_new_tokens and (call.max_tokens or 0) > most:
            call = replace(call, max_tokens=most)
        codec = self._engine.codec(call.agent)
        prompt = prompt_of(
            call,
            codec,
            max_new_tokens=self._settings.max_new_tokens,
            schema_in_prompt=self._settings.schema_in_prompt,
        )
        began = self._begin(call)
        seed = self._seed_of(call, began.lineage, prompt[1])
        try:
            if self._is_over:
                raise EpisodeTimeoutError(f"node {call.node!r} called after its episode had ended")
            request = request_for(
                call,
                codec,
                prompt=prompt,
                seed=seed,
                order=(*self._order, call.node, call.step, str(began.lineage), seed),
                temperature=self._settings.temperature,
                max_new_tokens=self._settings.max_new_tokens,
                constrain_output=self._settings.constrain_output,
                timeout=self._settings.call_timeout,
            )
            future = self._engine.submit(request)
        except MarftError as error:
            self._note(error)
            raise
        with self._lock:
            self._futures[future] = f"{told_tokens(request)} from node {call.node!r}"
            is_over = self._is_over
        future.add_done_callback(self._settled)
        if is_over:  # it ended meanwhile: nobody else would cancel this one
            future.cancel()
        began = began._replace(time=time.monotonic())

        def finish(completion: Completion) -> AIMessage:
            self._check_answer(call, completion)
            message = message_for(call, codec, request, completion)
            self._keep(call, request, completion, message, began)
            raise_as_own_model(call, message, is_cut_off=completion.finish_reason == "length")
            return message

        return Pending(future, finish)

    def _begin(self, call: InterceptedCall) -> _Began:
        """Where a call stands, from now on."""
        lineage = self._watch.lineage(call.namespace)
        attempts = self._watch.attempts(call.namespace)
        with self._lock:
            return _Began(lineage, attempts, next(self._clock), time.monotonic())

    def _seed_of(
        self, call: InterceptedCall, lineage: tuple[Any, ...], prompt_ids: tuple[int, ...]
    ) -> int:
        """The seed of a call; equal prompts of one task get seeds of their own, in turn."""
        with self._lock:
            repeat = self._repeats[lineage, prompt_ids]
            self._repeats[lineage, prompt_ids] += 1
        return stable_seed(self._seed, call.node, lineage, repeat, _digest(prompt_ids))

    def _check_answer(self, call: InterceptedCall, completion: Completion) -> None:
        """Refuse an answer that says nothing and does not end either."""
        if not completion.ids:
            error = EngineError(
                f"the engine answered node {call.node!r} with no token at all, not even one "
                "that ends the answer; there is nothing to learn from"
            )
            self._note(error)
            raise error

    def _watched(self, call: InterceptedCall) -> Delegate:
        """Keep what the app's own model answers; attempts that raise are no calls."""
        began = self._begin(call)

        def answered(message: AIMessage) -> None:
            reasons = {message.response_metadata.get(name) for name in REASON_KEYS}
            completion = Completion((), (), "length" if reasons & CUT_OFF else "stop", 0)
            sampling = SamplingSettings(
                temperature=1.0 if call.temperature is None else call.temperature
            )
            seed = stable_seed(call.node, began.lineage, [m.text for m in call.messages])
            messages = told(call) if self._settings.schema_in_prompt else call.messages
            request = GenerationRequest(call.agent, (), sampling, seed=seed, messages=messages)
            self._keep(call, request, completion, message, began)

        return Delegate(answered=answered)

    def _keep(
        self,
        call: InterceptedCall,
        request: GenerationRequest,
        completion: Completion,
        message: AIMessage,
        began: _Began,
    ) -> None:
        """A call has been answered."""
        counted: Mapping[str, Any] = message.usage_metadata or {}
        problem = problem_of(
            call,
            message,
            is_cut_off=completion.finish_reason == "length",
            tokens=len(completion.ids) or counted.get("output_tokens", 0),
        )
        with self._lock:
            self.calls.append(
                RecordedCall(
                    call=call,
                    request=request,
                    completion=completion,
                    message=message,
                    lineage=began.lineage,
                    attempts=began.attempts,
                    begun=began.clock,
                    ended=next(self._clock),
                    started=began.time - self._started,
                    seconds=time.monotonic() - began.time,
                    problem=problem,
                )
            )

    def credit(self, namespace: str, amount: float) -> None:
        """Keep a reward that a task emits.

        Raises:
            RewardError: it is no finite number; the run stops, whatever the app catches.
        """
        try:
            value = finite_number(amount, f"node {node_path(namespace)!r} emitted")
        except RewardError as error:
            self._note(error)
            raise
        entry = Emitted(namespace, value, self._watch.attempts(namespace))
        with self._lock:
            self.emitted.append(entry)

    def end(self) -> None:
        """Cancel what is still waiting; later calls are refused."""
        with self._lock:
            self._is_over = True
            waiting = list(self._futures)
        for future in waiting:
            future.cancel()

    def _settled(self, future: Future[Completion]) -> None:
        with self._lock:
            asked = self._futures.pop(future, "")
            if future.cancelled() and self.seconds_left() < _JUST_NOW:
                self._late.append(asked)  # whoever waited for it has met the episode's deadline
        error = None if future.cancelled() else future.exception()
        if isinstance(error, MarftError):
            self._note(error)

    def _note(self, error: MarftError) -> None:
        with self._lock:
            self.fatal = self.fatal or error


def told_tokens(request: GenerationRequest) -> str:
    """What a request asks for, for a message."""
    return f"a completion of up to {request.sampling.max_tokens} tokens"


def _digest(ids: tuple[int, ...]) -> str:
    return hashlib.blake2b(struct.pack(f"{len(ids)}q", *ids), digest_size=16).hexdigest()


def readable(message: BaseMessage) -> dict[str, Any]:
    """A message as a role/content dict, for people."""
    roles = {"human": "user", "ai": "assistant"}
    entry: dict[str, Any] = {"role": roles.get(message.type, message.type), "content": message.text}
    if isinstance(message, AIMessage) and message.tool_calls:
        entry["tool_calls"] = [
            {"name": call["name"], "args": call["args"], "id": call["id"]}
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        entry["tool_call_id"] = message.tool_call_id
    return entry
