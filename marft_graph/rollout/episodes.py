"""A rollout: many episodes at once, on the event loop of the process, each with its reward.

It owns concurrency and what becomes of a reward that fails. It knows nothing of learning.
"""

from __future__ import annotations

import asyncio
import logging
import textwrap
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from langgraph.pregel import Pregel

from marft_graph.engine.base import Engine, SupportsGate
from marft_graph.episode import Episode, Failure
from marft_graph.errors import EpisodeTimeoutError, RewardError
from marft_graph.graph.compile import as_compiled, compile_graph
from marft_graph.graph.flex_mg import resolve_nodes
from marft_graph.names import agent_path
from marft_graph.rollout.callsite import CallSite
from marft_graph.rollout.cancellation import Cancellation
from marft_graph.rollout.collector import fewer_collections
from marft_graph.rollout.decisions import Decisions
from marft_graph.rollout.episode_run import (
    EpisodeRun,
    Plan,
    Shared,
    reward_failure,
    with_reward,
)
from marft_graph.rollout.inputs import AppCall, AppInputs, app_call, listed_examples
from marft_graph.rollout.intercept import tidy
from marft_graph.rollout.labels import Labels, labels_of, say_once
from marft_graph.rollout.process_loop import Blocked, process_loop
from marft_graph.rollout.quiescence import Quiescence
from marft_graph.rollout.recorder import stable_seed
from marft_graph.rollout.rewards import RewardCalls, Rewards, as_reward_function
from marft_graph.rollout.scopes import outside_runs
from marft_graph.rollout.settings import RolloutSettings, check_at_least
from marft_graph.rollout.shape import GraphShape

logger = logging.getLogger(__name__)

_CANCEL_SECONDS = 2.0
_synchronous: weakref.WeakSet[Pregel[Any, Any, Any, Any]] = weakref.WeakSet()
"""Apps that have been found to work only synchronously."""


class Rollout:
    """An app with who answers it and how; the arguments are those of `run_episodes`.

    Raises:
        GraphError, UnknownNodeError: as in `run_episodes`.
    """

    def __init__(
        self,
        *,
        graph: Any,
        engine: Engine | None,
        reward: Rewards | None,
        nodes: Sequence[str],
        adapters: Mapping[str, str],
        given: AppInputs,
        settings: RolloutSettings,
        frozen: Sequence[str] = (),
        on_new_node: Callable[[CallSite], None] | None = None,
        on_episode: Callable[[Episode], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        app = as_compiled(graph)
        self._given = given
        self._reward = None if reward is None else as_reward_function(reward)
        self._on_episode = on_episode
        self._cancellation = cancellation or Cancellation()
        self._names = _node_names(app)
        self._shared = Shared(
            graph=app,
            shape=GraphShape.of(app),
            engine=engine,
            labels=labels_of(app, self._reward) if given.inputs is None else Labels(),
            decisions=Decisions(
                app,
                trained=_trained(app, nodes),
                adapters=adapters,
                frozen=frozen,
                new_nodes=settings.new_nodes,
                on_new_node=on_new_node,
            ),
            settings=settings,
            reviewer=given.on_interrupt,
        )

    def run(
        self,
        examples: Iterable[Mapping[str, Any]],
        *,
        seed: int = 0,
        first_example: int = 0,
        group_size: int = 1,
    ) -> list[Episode]:
        """The episodes of some examples, those of the first one first.

        Raises:
            ConfigError, DatasetError, RewardError, asyncio.CancelledError: as in `run_episodes`.
        """
        check_at_least("group_size", group_size, 1)
        graph, withheld = self._shared.graph, self._shared.labels.withheld
        listed = listed_examples(graph, examples, self._given, withheld=withheld)
        self._shared.labels.refuse_read(listed)
        say_once(self._shared.labels.told({key for example in listed for key in example}))
        plans = [
            Plan(example, self._call(example), index, group, stable_seed(seed, index, group))
            for index, example in enumerate(listed, first_example)
            for group in range(group_size)
        ]
        gated = self._shared.engine if isinstance(self._shared.engine, SupportsGate) else None
        settings = self._shared.settings
        with process_loop() as loop:
            if gated is not None:
                gated.use_gate(loop.quiescence)
            try:
                with fewer_collections():
                    return loop.run(
                        lambda: self._all(plans, loop.quiescence),
                        threads=4 * settings.concurrency + settings.reward_concurrency,
                        cancellation=self._cancellation,
                        on_blocked=self._given_up,
                    )
            finally:
                tidy()
                if gated is not None:
                    gated.use_gate(None)

    async def _all(self, plans: Sequence[Plan], quiescence: Quiescence) -> list[Episode]:
        places = asyncio.Semaphore(self._shared.settings.concurrency)
        rewards = RewardCalls(
            quiescence.workers,
            timeout=self._shared.settings.reward_timeout,
            concurrency=self._shared.settings.reward_concurrency,
        )

        async def one(plan: Plan) -> Episode:
            async with places:
                episode = await self._episode(plan, quiescence, rewards)
            if self._on_episode is not None:
                with outside_runs():
                    self._on_episode(episode)
            return episode

        episodes = [asyncio.ensure_future(one(plan)) for plan in plans]
        try:
            return await asyncio.gather(*episodes)
        except BaseException:
            for episode in episodes:
                episode.cancel()
            await asyncio.wait(episodes, timeout=_CANCEL_SECONDS)
            raise

    def _given_up(self, blocked: Blocked) -> Exception | None:
        """What ends the rollout where something blocks the event loop past its own deadline."""
        settings = self._shared.settings
        if blocked.is_reward and blocked.seconds > settings.reward_timeout:
            return RewardError(
                f"the reward function took longer than {settings.reward_timeout:g} seconds "
                f"(reward_timeout) without an await, at {blocked.where}. An async reward that "
                "blocks stops every episode: make it a plain function, which gets a thread"
            )
        if blocked.seconds > settings.episode_timeout:
            return EpisodeTimeoutError(
                f"an episode took longer than {settings.episode_timeout:g} seconds "
                f"(episode_timeout) without an await, at {blocked.where}. Async code that blocks "
                "stops every episode: make the node or tool a plain function, which gets a thread"
            )
        return None

    def _call(self, example: Mapping[str, Any]) -> AppCall:
        withheld = self._shared.labels.withheld
        return app_call(self._shared.graph, example, self._given, withheld=withheld)

    async def _played(self, plan: Plan, quiescence: Quiescence) -> EpisodeRun:
        """A run of the app: an asynchronous one, unless the app works only synchronously."""
        is_sync = self._shared.graph in _synchronous
        run = EpisodeRun(self._shared, plan, quiescence, is_sync=is_sync)
        await run.play()
        cause = run.sync_only
        if cause is None:
            return run
        plan = replace(plan, call=self._call(plan.example))
        again = EpisodeRun(self._shared, plan, quiescence, is_sync=True)
        await again.play()
        if again.is_async_only:
            return run
        if self._shared.graph not in _synchronous:
            _synchronous.add(self._shared.graph)
            logger.warning(
                "something in the app works only synchronously (%s): its episodes call it by "
                "stream(), each in a thread of its own",
                textwrap.shorten(str(cause), width=120, placeholder="...") or "NotImplementedError",
            )
        return again

    async def _episode(self, plan: Plan, quiescence: Quiescence, rewards: RewardCalls) -> Episode:
        started = time.monotonic()
        run = await self._played(plan, quiescence)
        episode = run.episode()
        if episode.ok and not episode.error and self._reward is not None:
            named = self._names | {c.node for c in episode.calls}
            named |= {agent_path(call.node) for call in episode.calls}
            try:
                reward = await rewards.call(self._reward, plan.example, episode.state, nodes=named)
            except RewardError as error:
                cause = error.__cause__
                text = self._shared.labels.explained(str(error), cause, plan.example)
                if self._shared.settings.reward_errors == "stop":
                    raise RewardError(text) from cause
                episode = replace(
                    episode, status=reward_failure(error), error=text, failure=Failure.REWARD
                )
                episode = replace(episode, state=None, outcome_reward=0.0)
            else:
                episode = with_reward(episode, reward)
        return replace(episode, seconds=time.monotonic() - started)


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
