"""Rollouts in other processes: episodes are those of this process, whoever runs them.

Stands where an engine stands in the trainer: it is published to, runs episodes, and is closed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

import marft_graph
from marft_graph.agents import Agent, adapters_of
from marft_graph.config import TrainConfig
from marft_graph.engine.vllm.engine import VllmEngine
from marft_graph.episode import Episode
from marft_graph.errors import DatasetError, EngineError
from marft_graph.policy.lora import AdapterValues
from marft_graph.policy.team import Team
from marft_graph.rollout.cancellation import Cancellation
from marft_graph.rollout.portions import Crew, portions
from marft_graph.workers.cluster import RayWorker, connection, put
from marft_graph.workers.job import App, Job, Offer, Work

_MARGIN = 60.0
"""Seconds that a portion may take beside its episodes: getting the adapters, say."""


class RolloutWorkers:
    """Rollout workers of one run, on this machine or in a cluster.

    Args:
        app: the user's code.
        nodes: agent paths of the trained nodes.
        team: the policies that are trained.
        agents: the agents of the team.
        config: the run's settings.
        served: the servers that workers sample at; it is closed with this. None: every worker has
            models of its own.
        frozen: nodes whose own models answer on purpose.

    `publish` starts what has to be started, and must be called before `run`.
    """

    def __init__(
        self,
        app: App,
        nodes: Sequence[str],
        team: Team,
        agents: Sequence[Agent],
        config: TrainConfig,
        served: VllmEngine | None,
        *,
        frozen: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._nodes = tuple(nodes)
        self._frozen = tuple(frozen)
        self._team = team
        self._agents = tuple(map(_with_whole_path, agents))
        self._config = config
        self._served = served
        self._published: tuple[str, Any] | None = None
        """Name of the weights that were published last, and the reference to them."""
        self._crew: Crew[Work, Episode] | None = None
        self._one_at_a_time = threading.Lock()

    def publish(self, version: int, values: AdapterValues | None = None) -> None:
        """Let rollouts from now on sample from other adapters.

        Args:
            version: what completions will say that they come from.
            values: copies of adapter weights; None: the adapters as they are.

        Raises:
            EngineError: Ray cannot be used, or no server could take the adapters in time.
        """
        if self._served is not None:
            self._served.publish(version, values)
        if self._crew is None:
            connection.open(self._config.ray_address, self._config.rollout_workers)
            self._crew = self._new_crew()
        if self._served is None:
            weights = {
                agent: save(self._team.of(agent).adapter_weights(agent, values))
                for agent in self._team.agents
            }
            name = f"v{version}-{secrets.token_hex(4)}"
            self._published = name, put(Offer(name, version, weights))

    def run(
        self,
        examples: Sequence[Mapping[str, Any]],
        *,
        first_example: int,
        group_size: int,
        seed: int,
        greedy: bool,
        cancellation: Cancellation | None = None,
    ) -> list[Episode]:
        """What `run_episodes` makes of the examples, but for the episodes' final states.

        Samples from what was published last when this was called, even if more is published
        meanwhile.

        Raises:
            EngineError: nothing was published, or no worker is left; the message has the reason.
            DatasetError: there is no example.
            MarftError: as in `run_episodes`, from a worker.
            asyncio.CancelledError: it was cancelled; workers that were busy have been stopped.
        """
        if not examples:
            raise DatasetError("the data set is empty; at least one example is needed")
        with self._one_at_a_time, self._offered() as (offer, reference):
            if self._crew is None:
                raise EngineError("nothing was published yet; call publish(version) first")
            works = [
                Work(
                    offer=offer,
                    reference=reference,
                    examples=tuple(examples[i] for i in part),
                    first_example=first_example + part.start,
                    group_size=group_size,
                    seed=seed,
                    greedy=greedy,
                )
                for part in portions(len(examples), self._config.rollout_workers)
            ]
            return self._crew.run(works, self._deadline, cancellation)

    def stats(self) -> dict[str, int]:
        """Workers that there should be, how many were lost so far, and what servers say."""
        own = {
            "workers": self._config.rollout_workers,
            "workers_lost": 0 if self._crew is None else self._crew.lost,
        }
        return own if self._served is None else {**own, **self._served.stats()}

    def close(self) -> None:
        """End the workers, a Ray and a server that were started for them; never a cluster."""
        if self._crew is not None:
            self._crew.stop()
            self._crew = None
            connection.close()
        if self._served is not None:
            self._served.close()

    def _new_crew(self) -> Crew[Work, Episode]:
        config = self._config
        job = put(
            Job(
                release=marft_graph.__version__,
                app=self._app,
                nodes=self._nodes,
                adapters=adapters_of(self._agents),
                agents=self._agents,
                config=config,
                frozen=self._frozen,
                servers=None if self._served is None else self._served.for_workers(),
            )
        )
        hire = functools.partial(
            RayWorker,
            job,
            cpus=0 if config.ray_address is None else 1,
            gpus=config.worker_gpus,
        )
        return Crew(hire, config.rollout_workers, patience=config.engine_patience)

    @contextlib.contextmanager
    def _offered(self) -> Iterator[tuple[str, Any]]:
        """Name of the adapters to sample from, and a reference to what workers need of them."""
        if self._served is not None:
            with self._served.held() as held:
                offer = Offer(held.folder.name, held.version, held)
                yield offer.name, put(offer)
        elif self._published is not None:
            yield self._published
        else:
            raise EngineError("nothing was published yet; call publish(version) first")

    def _deadline(self, work: Work) -> float:
        """Seconds after which a worker has had time for every deadline of its episodes."""
        config = self._config
        episodes = len(work.examples) * work.group_size
        at_once = min(episodes, config.concurrency)
        rewards = math.ceil(at_once / config.reward_concurrency) * config.reward_timeout
        return math.ceil(episodes / at_once) * (config.episode_timeout + rewards) + _MARGIN


def _with_whole_path(agent: Agent) -> Agent:
    """The agent, its base as a path that holds in other working directories too."""
    base = Path(agent.base_model).expanduser()
    return replace(agent, base_model=str(base.resolve())) if base.is_dir() else agent
