"""Sampling: the episodes of an iteration or an evaluation, from one version of the adapters.

Owns the engine's use: who samples gives it the weights first, and nobody else samples meanwhile.
Knows nothing of updates; it may run in a thread beside them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from langgraph.pregel import Pregel

from marft_graph.config import TrainConfig, rollout_settings
from marft_graph.data import Example, TrainingData
from marft_graph.engine.local import LocalEngine
from marft_graph.engine.routing import RoutingEngine
from marft_graph.engine.vllm.engine import VllmEngine
from marft_graph.episode import Episode
from marft_graph.errors import ConfigError, EngineError, EpisodesFailedError
from marft_graph.evaluation import failure_reasons
from marft_graph.learn.groups import without_equal_groups
from marft_graph.names import agent_path
from marft_graph.policy.team import Weights
from marft_graph.ranks import Ranks
from marft_graph.rollout.callsite import CallSite
from marft_graph.rollout.cancellation import Cancellation
from marft_graph.rollout.episodes import Rollout
from marft_graph.rollout.inputs import AppInputs
from marft_graph.rollout.rewards import RewardFunction
from marft_graph.workers.rollouts import RolloutWorkers

logger = logging.getLogger(__name__)

TrainingEngine = LocalEngine | RoutingEngine | VllmEngine | RolloutWorkers
"""An engine that new versions of the adapters can be given to."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What an iteration learns from, and where that left the training data."""

    episodes: list[Episode]
    learnt: list[Episode]
    """Those of the episodes that it learns from."""
    examples: list[Example]
    """Taken from the training data."""
    position: int
    """Of the training data after them."""
    seconds: float


class Sampler:
    """Runs the app on examples and has the engine answer, for one caller at a time.

    Args:
        graph: the app.
        engine: answers the trained nodes' calls.
        data: where iterations take their examples.
        reward: of an episode.
        adapters: the trained nodes, and the name of each one's adapter.
        frozen: nodes whose own models answer on purpose.
        greedy: nodes that are known, and were said, to leave the policy no choice.
        given: how the app is called.
        ranks: processes that share the episodes.
        base: holds what the engine needs of the base model while episodes run.
    """

    def __init__(
        self,
        graph: Pregel[Any, Any, Any, Any],
        engine: TrainingEngine,
        data: TrainingData,
        config: TrainConfig,
        *,
        reward: RewardFunction,
        adapters: Mapping[str, str],
        frozen: Sequence[str] = (),
        greedy: Iterable[str] = (),
        given: AppInputs,
        ranks: Ranks,
        base: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._graph = graph
        self._base = base
        self._engine = engine
        self._data = data
        self._config = config
        self._reward = reward
        self._adapters = dict(adapters)
        self._frozen = tuple(frozen)
        self.new_nodes: dict[str, CallSite] = {}
        """Nodes that first showed up in a rollout and are frozen since, by path."""
        self._given = given
        self._ranks = ranks
        self._turn = threading.Lock()
        self._published: Weights | None = None
        self._known_greedy = set(greedy)

    def iteration(self, number: int, weights: Weights, cancellation: Cancellation) -> Sampled:
        """An iteration's episodes; where it fails, its examples are put back.

        Raises:
            EpisodesFailedError: too many episodes failed; the message has the reasons.
            ConfigError: no call was a choice of the policy.
            EngineError, RewardError, asyncio.CancelledError: as in `run_episodes`.
        """
        config = self._config
        taken: list[Example] = []
        episodes: list[Episode] = []
        learnt: list[Episode] = []
        seconds = 0.0
        try:
            for attempt in range(1 + config.filter_rounds):
                wanted = config.examples_per_iteration - _examples_in(learnt)
                examples = self._data.take(wanted)
                taken += examples
                with self._turn:
                    started = time.perf_counter()
                    found = self._run(
                        examples,
                        weights,
                        group_size=config.group_size,
                        seed=config.seed * 1_000_003 + number + attempt * 500_000_003,
                        cancellation=cancellation,
                    )
                    seconds += time.perf_counter() - started
                offset = 1 + max((episode.example_index for episode in episodes), default=-1)
                found = [replace(e, example_index=e.example_index + offset) for e in found]
                self._refuse_failures(found, number)
                self._refuse_greedy(found)
                episodes += found
                learnt += found if config.filter_rounds == 0 else without_equal_groups(found)
                if _examples_in(learnt) >= config.examples_per_iteration:
                    break
        except BaseException:
            self._data.put_back(taken)
            raise
        return Sampled(episodes, learnt, taken, self._data.position, seconds)

    def put_back(self, sampled: Sampled) -> None:
        """Take the examples of the iteration that was sampled last again: nobody learns from it."""
        self._data.put_back(sampled.examples)

    def evaluation(
        self, examples: Sequence[Example], weights: Weights, *, seed: int, greedy: bool
    ) -> list[Episode]:
        """One episode of each example, once a rollout that runs has ended."""
        with self._turn:
            return self._run(examples, weights, group_size=1, seed=seed, greedy=greedy)

    def _run(
        self,
        examples: Sequence[Example],
        weights: Weights,
        *,
        group_size: int,
        seed: int,
        greedy: bool = False,
        cancellation: Cancellation | None = None,
    ) -> list[Episode]:
        """Episodes of all processes; each runs its share of the examples."""
        if weights is not self._published:
            self._engine.publish(weights.version, weights.values)
            self._published = weights
        share = self._ranks.share(len(examples))
        own = [examples[i] for i in share]

        def run() -> list[Episode]:
            if isinstance(self._engine, RolloutWorkers):
                return self._engine.run(
                    own,
                    first_example=share.start,
                    group_size=group_size,
                    seed=seed,
                    greedy=greedy,
                    cancellation=cancellation,
                )
            rollout = Rollout(
                graph=self._graph,
                engine=self._engine,
                reward=self._reward,
                nodes=list(self._adapters),
                frozen=self._frozen,
                adapters=self._adapters,
                given=self._given,
                settings=rollout_settings(self._config, greedy=greedy),
                on_new_node=self._met,
                cancellation=cancellation,
            )
            return rollout.run(own, seed=seed, first_example=share.start, group_size=group_size)

        with self._base():
            return self._ranks.together(lambda: run() if own else [])

    def _met(self, site: CallSite) -> None:
        """Tell of a node that nobody had decided on, once."""
        if site.node not in self.new_nodes:
            self.new_nodes[site.node] = site
            logger.warning("%s; it answers from now on, as new_nodes is 'freeze'", site)

    def _refuse_failures(self, episodes: Sequence[Episode], iteration: int) -> None:
        failed = [episode for episode in episodes if not episode.ok]
        if len(failed) <= self._config.max_failed_share * len(episodes) and len(failed) < len(
            episodes
        ):
            return
        reasons = ", ".join(f"{reason} ({n}x)" for reason, n in failure_reasons(episodes).items())
        raise EpisodesFailedError(
            f"{len(failed)} of {len(episodes)} episodes of iteration {iteration} failed, more "
            f"than max_failed_share={self._config.max_failed_share} allows: {reasons}. "
            f"The first: {failed[0].error}"
        )

    def _refuse_greedy(self, episodes: Sequence[Episode]) -> None:
        """A call at temperature 0 was no choice of the policy: nothing can be learnt from it."""
        sampled: dict[str, bool] = {}
        for call in (call for episode in episodes if episode.ok for call in episode.calls):
            node = agent_path(call.node)
            sampled[node] = sampled.get(node, False) or call.temperature > 0
        greedy = {node for node, is_sampled in sampled.items() if not is_sampled}
        if greedy - self._known_greedy:
            self._known_greedy |= greedy
            check_can_learn(sampled)


def check_can_learn(is_sampled: Mapping[str, bool]) -> set[str]:
    """Say which nodes the app asks at temperature 0 only: they cannot learn.

    Args:
        is_sampled: by node, whether any of its calls leaves the policy a choice.

    Raises:
        ConfigError: none of the nodes can learn.
    """
    greedy = [node for node, sampled in is_sampled.items() if not sampled]
    if not greedy:
        return set()
    text = (
        f"{', '.join(greedy)} cannot learn: the app calls the model with temperature 0 there. "
        "Set temperature to 1.0 to sample in training (the app keeps its own outside)"
    )
    if len(greedy) == len(is_sampled):
        raise ConfigError(text)
    logger.warning("%s; the other nodes are trained", text)
    return set(greedy)


def check_staleness(episodes: Sequence[Episode], version: int, bound: int) -> int:
    """How many updates the weights that sampled some episodes lag behind `version`, at most.

    Args:
        episodes: what is to be learnt from; failed ones do not count.
        version: of the weights that are about to learn.
        bound: `staleness` of the settings.

    Raises:
        EngineError: a call was sampled by weights outside of the bound.
    """
    worst = 0
    for call in (call for episode in episodes if episode.ok for call in episode.calls):
        lag = version - call.adapter_version
        if not 0 <= lag <= bound:
            raise EngineError(
                f"a call of {call.node!r} was sampled by version {call.adapter_version} of the "
                f"adapters, and version {version} is to learn from it: {lag} updates behind, where "
                f"staleness allows 0 to {bound}"
            )
        worst = max(worst, lag)
    return worst


def _examples_in(episodes: Sequence[Episode]) -> int:
    return len({episode.example_index for episode in episodes})
