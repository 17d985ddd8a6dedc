"""One episode: a run of the app on one example, from its input to an `Episode`.

What becomes of a failure is decided here; how many episodes run, and their rewards, in `runner`.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from langgraph.errors import GraphRecursionError
from langgraph.pregel import Pregel

from marft_graph.engine.base import Engine
from marft_graph.episode import Call, Episode, Failure, Reward
from marft_graph.errors import (
    CallTimeoutError,
    EpisodeTimeoutError,
    ReviewerError,
    RewardError,
    UndecidedCallError,
)
from marft_graph.names import agent_path
from marft_graph.rollout.app_run import AppRun
from marft_graph.rollout.decisions import Decisions
from marft_graph.rollout.emit import shares
from marft_graph.rollout.inputs import AppCall, Reviewer, context_hint
from marft_graph.rollout.intercept import intercepting
from marft_graph.rollout.isolation import Isolation, isolated
from marft_graph.rollout.labels import Labels
from marft_graph.rollout.limits import RECURSION_LIMIT, limit_of_graph, too_many_steps
from marft_graph.rollout.quiescence import Quiescence
from marft_graph.rollout.reads import recording_reads
from marft_graph.rollout.recorder import EpisodeRecorder, RecordedCall, readable
from marft_graph.rollout.review import Review, told
from marft_graph.rollout.rewards import shown
from marft_graph.rollout.scopes import RUN_KEY
from marft_graph.rollout.settings import RolloutSettings
from marft_graph.rollout.shape import GraphShape
from marft_graph.rollout.structure import FAULT_NAMES, failure_of
from marft_graph.rollout.task_runs import CallMark
from marft_graph.rollout.trace import is_last_attempt, trace_episode
from marft_graph.rollout.watch import Attempts, TaskWatch
from marft_graph.rollout.worker_threads import owned_by

_CANCEL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One episode that is to be run."""

    example: Mapping[str, Any]
    call: AppCall
    example_index: int
    group: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all episodes of one rollout share."""

    graph: Pregel[Any, Any, Any, Any]
    shape: GraphShape
    engine: Engine | None
    labels: Labels
    decisions: Decisions
    settings: RolloutSettings
    reviewer: Reviewer | None = None


class EpisodeRun:
    """One run of the app, from its input to an `Episode`.

    Args:
        shared: with the other episodes.
        plan: what is run.
        quiescence: the event loop and the worker threads.
        is_sync: whether to call the app synchronously.
    """

    def __init__(
        self, shared: Shared, plan: Plan, quiescence: Quiescence, *, is_sync: bool = False
    ) -> None:
        self._shared = shared
        self._plan = plan
        self._workers = quiescence.workers
        self._owner = object()
        self._is_sync = is_sync
        self._watch = TaskWatch()
        self._recorder = EpisodeRecorder(
            shared.engine,
            shared.decisions,
            self._watch,
            quiescence,
            seed=plan.seed,
            order=(plan.example_index, plan.group),
            settings=shared.settings,
        )
        settings = shared.settings
        self._steps = limit_of_graph(shared.graph, settings.recursion_limit)
        self._isolation = Isolation(
            plan.call.store, recursion_limit=settings.recursion_limit or RECURSION_LIMIT
        )
        review = Review(
            shared.reviewer,
            plan.example,
            self._workers,
            settings.reward_timeout,
            self._steps,
            contextvars.copy_context(),
        )
        self._app = AppRun(
            shared.graph,
            plan.call,
            self._isolation,
            review,
            is_sync=is_sync,
            workers=self._workers,
        )
        self._error: BaseException | None = None

    @property
    def sync_only(self) -> BaseException | None:
        """Why the app has to be called synchronously, where it was not and has to be."""
        return None if self._is_sync else self._watch.sync_only

    @property
    def is_async_only(self) -> bool:
        """Whether the app could not be called synchronously."""
        return isinstance(self._error, TypeError) and "No synchronous function" in str(self._error)

    async def play(self) -> None:
        """Run the app until its end, its failure or its deadline."""
        timeout = self._shared.settings.episode_timeout
        with (
            intercepting(self._recorder) as metadata,
            recording_reads(metadata[RUN_KEY], self._recorder.reads),
            isolated(self._isolation, metadata[RUN_KEY]),
            owned_by(self._owner),
        ):
            task = asyncio.ensure_future(
                self._app.play(metadata=metadata, callbacks=[self._watch], steps=self._steps)
            )
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                done, _ = await asyncio.wait([task], timeout=timeout)
                if done:
                    self._error = task.exception()
                    return
                self._error = EpisodeTimeoutError(
                    f"the episode took longer than {timeout:g} seconds (episode_timeout)"
                    + self._waited_for()
                )
                self._recorder.end()
                task.cancel()
                await asyncio.wait([task], timeout=_CANCEL_SECONDS)
            finally:
                self._recorder.end()
                if not task.done() or self._error is not None:
                    self._workers.give_up(self._owner)
                if not task.done():
                    task.cancel()
                    await asyncio.wait([task], timeout=_CANCEL_SECONDS)

    def _waited_for(self) -> str:
        """What the app is waiting for now, for the message of a time-out."""
        if unanswered := self._recorder.unanswered():
            more = f" and {len(unanswered) - 1} more calls" if len(unanswered) > 1 else ""
            return f"; it was waiting for {unanswered[0]}{more}"
        running = self._watch.running()
        return f"; running then: {', '.join(running[:3])}" if running else ""

    def episode(self) -> Episode:
        """What is left of the run.

        Raises:
            RewardError: a node emitted what is no reward.
            UndecidedCallError: a node asked a model, and nobody had decided who answers it.
            ReviewerError: the app's interrupts could not be answered.
        """
        status, error, earned = self._outcome()
        ended_by = self._recorder.fatal or self._error
        attempts = dict(self._watch.attempts())
        recorded = self._recorder.calls.copy()
        marks = [_mark(call, self._standing(call.attempts)) for call in recorded]
        emitted = [
            e
            for e in self._recorder.emitted
            if is_last_attempt(self._standing(e.attempts), attempts)
        ]
        emitted = emitted if status == "ok" else []
        trace = trace_episode(
            self._app.events,
            marks,
            self._shared.shape,
            attempts,
            {e.namespace for e in emitted},
            self._recorder.reads,
        )
        calls = [
            _call(recorded[position], index, parents)
            for index, (position, parents) in enumerate(trace.order)
        ]
        if emitted:
            namespaces = [marks[position].namespace for position, _ in trace.order]
            parents_of = [parents for _, parents in trace.order]
            own, unclaimed = shares(emitted, namespaces, parents_of, trace.inputs)
            calls = [replace(c, reward=r) for c, r in zip(calls, own, strict=True)]
        else:
            unclaimed = 0.0
        return Episode(
            example=self._plan.example,
            calls=tuple(calls),
            outcome_reward=unclaimed + earned,
            state=self._app.state if status == "ok" else None,
            status=status,
            error=error,
            failure=None if status == "ok" else self._failure(),
            failed_node="" if ended_by is None else self._watch.node_of(ended_by),
            set_aside=self._recorder.set_aside(recorded, {p for p, _ in trace.order}),
            seed=self._plan.seed,
            example_index=self._plan.example_index,
        )

    def _standing(self, attempts: Attempts) -> Attempts:
        return self._watch.standing(attempts, is_saved=self._app.is_saved)

    def _failure(self) -> Failure:
        """What kind of thing ended an episode that failed."""
        error = self._recorder.fatal or self._error
        if isinstance(self._error, EpisodeTimeoutError) or isinstance(error, CallTimeoutError):
            return Failure.TIMEOUT
        return Failure.INTERRUPT if error is None else Failure.APP

    def _outcome(self) -> tuple[str, str, float]:
        """Status, error and what an error that is the policy's own fault earns."""
        error = self._error
        undecided = self._recorder.fatal or error
        if isinstance(undecided, UndecidedCallError):
            raise undecided
        if isinstance(self._recorder.fatal, RewardError):
            raise RewardError(f"{self._recorder.fatal}, on example {shown(self._plan.example)}")
        if isinstance(error, ReviewerError):
            raise error
        if isinstance(error, EpisodeTimeoutError):
            return "failed: timeout", str(error), 0.0
        error = self._recorder.fatal or error
        if error is None and self._app.is_waiting:
            return "failed: interrupt", told(self._app.waiting, after=self._app.resumed), 0.0
        if error is None:
            return "ok", "", 0.0
        node = self._watch.node_of(error)
        name, said = type(error).__name__, self._said(error)
        names = [kind.__name__ for kind in type(error).__mro__]
        answers = [(recorded.call, recorded.problem) for recorded in self._recorder.calls]
        why = failure_of(error, self._watch.task_of(error), answers)
        if why is not None:
            name, said = FAULT_NAMES[0], why if why == said else f"{why} ({name}: {said})"
            names += FAULT_NAMES
        where = f" in {node}" if node else ""
        text = f"{name}{where and f' in node {node!r}'}: {said}"
        text = self._shared.labels.explained(text, error, self._plan.example)
        rewards = self._shared.settings.fault_rewards
        for kind in names:
            if kind in rewards:
                return "ok", text, rewards[kind]
        return f"failed: {name}{where}", text, 0.0

    def _said(self, error: BaseException) -> str:
        """An error's text, with what there is to do where that is known."""
        if isinstance(error, GraphRecursionError):
            tasks = [e.payload for e in self._app.events if e.mode == "tasks"]
            names = [task["name"] for task in tasks if "triggers" in task]
            return too_many_steps(self._steps, names)
        if isinstance(error, AttributeError | TypeError) and "NoneType" in str(error):
            return str(error) + context_hint(self._shared.graph, self._plan.call.context)
        return str(error)


def _mark(recorded: RecordedCall, attempts: Attempts) -> CallMark:
    steps = tuple(part[1:] for part in recorded.lineage)
    return CallMark(
        namespace=recorded.call.namespace,
        begun=recorded.begun,
        ended=recorded.ended,
        key=(str(steps), recorded.call.node, recorded.request.seed),
        attempts=attempts,
        answer=recorded.message.text,
        prompt=recorded.call.messages,
    )


def _call(recorded: RecordedCall, index: int, parents: tuple[int, ...]) -> Call:
    call, request, completion = recorded.call, recorded.request, recorded.completion
    return Call(
        agent=call.agent,
        node=call.node,
        index=index,
        parents=parents,
        prompt_ids=request.prompt_ids,
        completion_ids=completion.ids,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        adapter_version=completion.adapter_version,
        temperature=request.sampling.temperature,
        messages=tuple(readable(message) for message in (*request.messages, recorded.message)),
        task_id=call.task_id,
        step=call.step,
        seed=request.seed,
        tools=call.tools,
        usage=_usage(recorded),
        grammar=request.grammar if completion.is_constrained else "",
        started=recorded.started,
        seconds=recorded.seconds,
    )


def reward_failure(error: RewardError) -> str:
    """The status of an episode whose reward function failed.

    >>> reward_failure(RewardError("the reward function raised KeyError: 'a'"))
    'failed: RewardError'
    """
    cause = error.__cause__
    inner = cause.__cause__ if isinstance(cause, RewardError) else cause
    named = "" if inner is None else f": {type(inner).__name__}"
    return f"failed: RewardError{named}"


def _usage(recorded: RecordedCall) -> tuple[int, int] | None:
    """Token counts as the app's own model reports them; None where token ids tell."""
    counted = recorded.message.usage_metadata
    if recorded.completion.ids or counted is None:
        return None
    if "input_tokens" not in counted or "output_tokens" not in counted:
        return None  # a cache answered: LangChain counts nothing then
    return counted["input_tokens"], counted["output_tokens"]


def with_reward(episode: Episode, reward: Reward) -> Episode:
    """The episode with its reward; a node's own goes to the node's last call."""
    calls = list(episode.calls)
    for name, value in reward.nodes.items():
        mine = [c.index for c in calls if name in (c.node, agent_path(c.node))]
        if mine:
            last = calls[mine[-1]]
            calls[mine[-1]] = replace(last, reward=last.reward + value)
    return replace(
        episode,
        calls=tuple(calls),
        outcome_reward=episode.outcome_reward + reward.outcome,
        node_rewards=dict(reward.nodes),
        reward_parts=dict(reward.parts),
    )
