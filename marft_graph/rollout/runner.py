"""`run_episodes`: the unchanged app, many times at once, every trained call answered by an engine.

It owns concurrency, deadlines and what becomes of a failure. It knows nothing of learning.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.pregel import Pregel

from marft_graph.engine.base import Engine, SupportsGate
from marft_graph.episode import Call, Episode, Reward
from marft_graph.errors import EpisodeTimeoutError, RewardError
from marft_graph.graph.compile import as_compiled, compile_graph
from marft_graph.graph.flex_mg import resolve_nodes
from marft_graph.names import adapter_name, agent_path
from marft_graph.rollout.cancellation import Cancellation
from marft_graph.rollout.collector import fewer_collections
from marft_graph.rollout.emit import shares
from marft_graph.rollout.inputs import InputFunction, graph_inputs
from marft_graph.rollout.intercept import intercepting
from marft_graph.rollout.labels import Labels, labels_of
from marft_graph.rollout.quiescence import Quiescence
from marft_graph.rollout.recorder import (
    EpisodeRecorder,
    RecordedCall,
    TaskWatch,
    readable,
    stable_seed,
)
from marft_graph.rollout.rewards import (
    RewardCalls,
    RewardFunction,
    Rewards,
    as_reward_function,
    shown,
)
from marft_graph.rollout.trace import (
    CallMark,
    Event,
    GraphShape,
    is_last_attempt,
    trace_episode,
)

_WORKER_THREADS = 1024
_CANCEL_SECONDS = 2.0


def run_episodes(
    graph: Any,
    examples: Iterable[Mapping[str, Any]],
    *,
    engine: Engine | None,
    reward: Rewards | None = None,
    nodes: Sequence[str] | None = None,
    adapters: Mapping[str, str] | None = None,
    inputs: InputFunction | None = None,
    seed: int = 0,
    first_example: int = 0,
    group_size: int = 1,
    concurrency: int = 256,
    episode_timeout: float = 600.0,
    call_timeout: float | None = None,
    reward_timeout: float = 60.0,
    reward_concurrency: int = 64,
    temperature: float | None = None,
    max_new_tokens: int = 256,
    constrain_output: bool = False,
    greedy: bool = False,
    fault_rewards: Mapping[str, float] | None = None,
    reward_errors: Literal["stop", "drop"] = "stop",
    on_episode: Callable[[Episode], None] | None = None,
    cancellation: Cancellation | None = None,
) -> list[Episode]:
    """Run an app on examples and record every model call of the trained nodes.

    Args:
        graph: a compiled LangGraph app, which is not changed, or a StateGraph builder.
        examples: dicts; those keys that the graph's input has are handed to it, but no label: a key
            that the reward names and a node writes, in a graph without an input schema of its own.
        engine: answers the trained nodes' calls; None: the app's own models answer, and are only
            recorded (their calls have messages, tools and token counts, but no token ids).
        reward: `reward(example, state) -> float | dict[node, float] | Reward`, sync or async;
            several, as a list or as a dict of functions to weights, are combined; none: only what
            nodes emit counts.
        nodes: nodes to train, as agent paths; none: every node that calls a model. Other nodes keep
            their own model.
        adapters: name of the agent that answers a node, where it is not the node's own: nodes with
            one name share its adapter.
        inputs: makes the graph's input from an example, where its keys do not fit.
        seed: with the same seed, app and engine, the episodes are the same.
        first_example: number of the first example, where these are some of many; it is part of the
            seeds.
        group_size: episodes of each example.
        concurrency: episodes that run at once.
        episode_timeout: seconds that an episode may take.
        call_timeout: seconds that a model call may take, its time in the engine's queue included;
            its episode fails then. None: any time.
        reward_timeout: seconds that one reward may take.
        reward_concurrency: reward functions that run at once; synchronous ones in worker threads.
        temperature: sampling temperature; none: what the app asks for, else 1.
        max_new_tokens: limit of a completion where the app sets none.
        constrain_output: let calls that ask for structured output by a JSON schema write nothing
            else, on an engine that can (the local one, with the extra `grammar`).
        greedy: sample at temperature 0, whatever else is set.
        fault_rewards: exceptions that are the policy's own fault, by the name of their class or of
            one that it inherits from, and the outcome that an episode earns that one of them ends.
        reward_errors: what a reward function that fails does: `stop` the rollout, or `drop` its
            episode, which is then a failed one.
        on_episode: called on the event loop's thread for each episode as it ends.
        cancellation: ends the rollout where another thread asks for it.

    Returns:
        The episodes, those of the first example first. One that failed has a status
        `failed: REASON` and the whole error; it is data for nobody.

    Raises:
        GraphError: `graph` is no LangGraph app.
        UnknownNodeError: `nodes` names a node that the graph does not have.
        DatasetError: no examples, or an example without the graph's input keys.
        RewardError: the reward function failed (unless `reward_errors` is `drop`), or a node
            emitted what is no reward; the message shows the example.
        asyncio.CancelledError: it was cancelled.
    """
    app = as_compiled(graph)
    function = None if reward is None else as_reward_function(reward)
    labels = labels_of(app, function) if inputs is None else Labels()
    listed, graph_values = graph_inputs(app, examples, inputs, withheld=labels.withheld)
    rollout = _Rollout(
        graph=app,
        engine=engine,
        reward=function,
        labels=labels,
        trained=_trained(app, nodes),
        adapters=dict(adapters or {}),
        nodes=_node_names(app),
        shape=GraphShape.of(app),
        concurrency=concurrency,
        episode_timeout=episode_timeout,
        call_timeout=call_timeout,
        reward_timeout=reward_timeout,
        reward_concurrency=reward_concurrency,
        temperature=0.0 if greedy else temperature,
        max_new_tokens=max_new_tokens,
        constrain_output=constrain_output,
        fault_rewards=dict(fault_rewards or {}),
        reward_errors=reward_errors,
        on_episode=on_episode,
        cancellation=cancellation or Cancellation(),
    )
    plans = [
        _Plan(example, value, index, group, stable_seed(seed, index, group))
        for index, (example, value) in enumerate(
            zip(listed, graph_values, strict=True), first_example
        )
        for group in range(group_size)
    ]
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return rollout.run(plans)
    return _in_thread(lambda: rollout.run(plans))  # called from a running loop, say a notebook


def check_examples(
    graph: Any,
    examples: Iterable[Mapping[str, Any]],
    inputs: InputFunction | None = None,
    reward: RewardFunction | None = None,
) -> Labels:
    """Refuse examples that `run_episodes` would refuse, before anything is loaded.

    Returns:
        The labels that it would withhold, and those that it might have to.

    Raises:
        GraphError, DatasetError: as in `run_episodes`.
    """
    app = as_compiled(graph)
    labels = labels_of(app, reward) if inputs is None else Labels()
    graph_inputs(app, examples, inputs, withheld=labels.withheld)
    return labels


def _in_thread(work: Callable[[], list[Episode]]) -> list[Episode]:
    outcome: list[list[Episode] | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=run, name="marft-rollout", daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _trained(graph: Pregel[Any, Any, Any, Any], nodes: Sequence[str] | None) -> frozenset[str]:
    """Agent paths to train; empty: all."""
    if not nodes:
        return frozenset()
    if set(nodes) <= _node_names(graph):
        return frozenset(agent_path(node) for node in nodes)
    return frozenset(resolve_nodes(compile_graph(graph), tuple(nodes), found_before=True))


def _node_names(graph: Pregel[Any, Any, Any, Any], prefix: str = "") -> frozenset[str]:
    """Paths of all nodes, those of graphs inside included, as nodes and as agents."""
    names: set[str] = set()
    for name, node in graph.nodes.items():
        if name.startswith("__"):
            continue
        path = prefix + name
        names |= {path, agent_path(path)}
        if isinstance(node.bound, Pregel):
            names |= _node_names(node.bound, f"{path}/")
    return frozenset(names)


@dataclass(frozen=True, slots=True)
class _Plan:
    """One episode that is to be run."""

    example: Mapping[str, Any]
    value: Any
    example_index: int
    group: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rollout:
    """What all episodes of one `run_episodes` share."""

    graph: Pregel[Any, Any, Any, Any]
    engine: Engine | None
    reward: RewardFunction | None
    labels: Labels
    trained: frozenset[str]
    adapters: Mapping[str, str]
    nodes: frozenset[str]
    shape: GraphShape
    concurrency: int
    episode_timeout: float
    call_timeout: float | None
    reward_timeout: float
    reward_concurrency: int
    temperature: float | None
    max_new_tokens: int
    constrain_output: bool
    fault_rewards: Mapping[str, float]
    reward_errors: Literal["stop", "drop"]
    on_episode: Callable[[Episode], None] | None
    cancellation: Cancellation

    def run(self, plans: Sequence[_Plan]) -> list[Episode]:
        """Run all episodes on an event loop of their own."""
        threads = 4 * self.concurrency + self.reward_concurrency
        quiescence = Quiescence(min(_WORKER_THREADS, threads))
        gated = self.engine if isinstance(self.engine, SupportsGate) else None
        if gated is not None:
            gated.use_gate(quiescence)
        loop = quiescence.loop
        try:
            work = loop.create_task(self._all(plans, quiescence))
            with fewer_collections(), self.cancellation.reaches(work):
                return loop.run_until_complete(work)
        finally:
            if gated is not None:
                gated.use_gate(None)
            _cancel_all(loop)
            quiescence.close()

    async def _all(self, plans: Sequence[_Plan], quiescence: Quiescence) -> list[Episode]:
        places = asyncio.Semaphore(self.concurrency)
        rewards = RewardCalls(
            quiescence.workers, timeout=self.reward_timeout, concurrency=self.reward_concurrency
        )

        async def one(plan: _Plan) -> Episode:
            async with places:
                episode = await self._episode(plan, quiescence, rewards)
            if self.on_episode is not None:
                self.on_episode(episode)
            return episode

        return await asyncio.gather(*(one(plan) for plan in plans))

    async def _episode(self, plan: _Plan, quiescence: Quiescence, rewards: RewardCalls) -> Episode:
        started = time.monotonic()
        run = _EpisodeRun(self, plan, quiescence)
        await run.play()
        episode = run.episode()
        if episode.ok and not episode.error and self.reward is not None:
            named = self.nodes | {c.node for c in episode.calls}
            named |= {agent_path(call.node) for call in episode.calls}
            try:
                reward = await rewards.call(self.reward, plan.example, episode.state, nodes=named)
            except RewardError as error:
                cause = error.__cause__
                text = self.labels.explained(str(error), cause, plan.example)
                if self.reward_errors == "stop":
                    raise RewardError(text) from cause
                episode = replace(episode, status=reward_failure(error), error=text)
                episode = replace(episode, state=None, outcome_reward=0.0)
            else:
                episode = with_reward(episode, reward)
        return replace(episode, seconds=time.monotonic() - started)

    def agent_of(self, node: str) -> str | None:
        """Adapter of a node path, if the node is trained."""
        agent = agent_path(node)
        if self.trained and agent not in self.trained:
            return None
        return self.adapters.get(agent, adapter_name(agent))


class _EpisodeRun:
    """One run of the app, from its input to an `Episode`."""

    def __init__(self, rollout: _Rollout, plan: _Plan, quiescence: Quiescence) -> None:
        self._rollout = rollout
        self._plan = plan
        self._watch = TaskWatch()
        self._recorder = EpisodeRecorder(
            rollout.engine,
            rollout.agent_of,
            self._watch,
            quiescence,
            seed=plan.seed,
            order=(plan.example_index, plan.group),
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            constrain_output=rollout.constrain_output,
            timeout=rollout.episode_timeout,
            call_timeout=rollout.call_timeout,
        )
        self._events: list[Event] = []
        self._state: Any = None
        self._error: BaseException | None = None
        self._is_interrupted = False

    async def play(self) -> None:
        """Run the app until its end, its failure or its deadline."""
        with intercepting(self._recorder) as metadata:
            task = asyncio.ensure_future(self._stream(metadata))
            try:
                done, _ = await asyncio.wait([task], timeout=self._rollout.episode_timeout)
                if done:
                    self._error = task.exception()
                    return
                self._recorder.end()
                self._error = EpisodeTimeoutError(
                    f"the episode took longer than {self._rollout.episode_timeout:g} seconds "
                    "(episode_timeout)"
                )
                task.cancel()
                await asyncio.wait([task], timeout=_CANCEL_SECONDS)
            finally:
                task.cancel()
                self._recorder.end()

    async def _stream(self, metadata: dict[str, str]) -> None:
        graph = self._rollout.graph
        if graph.checkpointer:  # the app's own store is not for training runs
            graph = graph.copy(update={"checkpointer": InMemorySaver()})
        config: Any = {
            "configurable": {"thread_id": str(uuid.uuid4())},
            "metadata": metadata,
            "callbacks": [self._watch],
        }
        stream = graph.astream(
            self._plan.value, config, stream_mode=["tasks", "values"], subgraphs=True
        )
        async for item in stream:
            namespace, mode, payload = cast("tuple[tuple[str, ...], str, Any]", item)
            self._events.append(Event(namespace, mode, payload))
            if mode == "values" and not namespace:
                self._state = payload
            elif mode == "tasks" and payload.get("interrupts"):
                self._is_interrupted = True

    def episode(self) -> Episode:
        """What is left of the run.

        Raises:
            RewardError: a node emitted what is no reward.
        """
        status, error, earned = self._outcome()
        attempts = dict(self._watch.attempts())
        recorded = self._recorder.calls.copy()
        marks = [_mark(call) for call in recorded]
        emitted = [e for e in self._recorder.emitted if is_last_attempt(e.attempts, attempts)]
        emitted = emitted if status == "ok" else []
        trace = trace_episode(
            self._events, marks, self._rollout.shape, attempts, {e.namespace for e in emitted}
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
            state=self._state if status == "ok" else None,
            status=status,
            error=error,
            seed=self._plan.seed,
            example_index=self._plan.example_index,
        )

    def _outcome(self) -> tuple[str, str, float]:
        """Status, error and what an error that is the policy's own fault earns."""
        error = self._error
        if isinstance(self._recorder.fatal, RewardError):
            raise RewardError(f"{self._recorder.fatal}, on example {shown(self._plan.example)}")
        if isinstance(error, EpisodeTimeoutError):
            return "failed: timeout", str(error), 0.0
        error = self._recorder.fatal or error
        if error is None and self._is_interrupted:
            return (
                "failed: interrupt",
                (
                    "the app called interrupt() and waits for a person; train it with a graph that "
                    "does not interrupt"
                ),
                0.0,
            )
        if error is None:
            return "ok", "", 0.0
        node = self._watch.node_of(error)
        name = type(error).__name__
        where = f" in {node}" if node else ""
        text = f"{name}{where and f' in node {node!r}'}: {error}"
        text = self._rollout.labels.explained(text, error, self._plan.example)
        for kind in type(error).__mro__:
            if kind.__name__ in self._rollout.fault_rewards:
                return "ok", text, self._rollout.fault_rewards[kind.__name__]
        return f"failed: {name}{where}", text, 0.0


def _mark(recorded: RecordedCall) -> CallMark:
    steps = tuple(part[1:] for part in recorded.lineage)
    return CallMark(
        namespace=recorded.call.namespace,
        begun=recorded.begun,
        ended=recorded.ended,
        key=(str(steps), recorded.call.node, recorded.request.seed),
        attempts=recorded.attempts,
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
        messages=tuple(readable(message) for message in (*call.messages, recorded.message)),
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


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what an error or Ctrl-C left running, without waiting for ever."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=_CANCEL_SECONDS))
    loop.run_until_complete(loop.shutdown_asyncgens())
