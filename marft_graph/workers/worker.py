"""A rollout worker: runs examples of its job with the adapters that the work names.

Lives in a process of its own, which Ray starts; knows nothing of Ray, of other workers or of
learning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

from safetensors.torch import load

import marft_graph
from marft_graph.config import rollout_settings
from marft_graph.engine.base import Engine
from marft_graph.engine.routing import local_engine
from marft_graph.engine.vllm.calls import Publication
from marft_graph.engine.vllm.client import VersionClient
from marft_graph.episode import Episode
from marft_graph.errors import EngineError
from marft_graph.policy.team import Team
from marft_graph.rollout.episodes import Rollout
from marft_graph.workers.job import Job, Offer, Work

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `accelerate launch` tells its processes, whose environment a worker may have inherited."""


class RolloutWorker:
    """Samples for one job, from one version of the adapters at a time.

    Raises:
        EngineError: another marft-graph is installed here than where the learner runs.
        WorkflowError: the app cannot be loaded here.
        ModelError: a base model cannot be loaded here.
    """

    def __init__(self, job: Job) -> None:
        if job.release != marft_graph.__version__:
            raise EngineError(
                f"a rollout worker has marft-graph {marft_graph.__version__}, and the learner "
                f"{job.release}; install the same version on all machines"
            )
        for name in _OF_RANKS:  # it is none of the processes that train together
            os.environ.pop(name, None)
        self._job = job
        self._graph, self._reward, self._given = job.app.load()
        self._models: _OwnModels | _Servers = (
            _OwnModels(job) if job.servers is None else _Servers(job)
        )
        self._offer = ""

    def run(self, work: Work, fetch: Callable[[], Offer]) -> list[Episode]:
        """The episodes of some examples, those of the first one first.

        Their final states stay here: the reward has seen them, and they may not be picklable.

        Args:
            work: the examples, and the name of the adapters to sample from.
            fetch: gets those adapters; it is called where the worker has others.

        Raises:
            EngineError: `fetch` got other adapters than the work names, or no server has them.
            MarftError: as in `run_episodes`.
        """
        if work.offer != self._offer:
            offer = fetch()
            if offer.name != work.offer:
                raise EngineError(
                    f"a rollout worker was to sample from {work.offer}, and was given {offer.name}"
                )
            self._offer = ""
            self._models.take(offer)
            self._offer = offer.name
        rollout = Rollout(
            graph=self._graph,
            engine=self._models.engine,
            reward=self._reward,
            nodes=self._job.nodes,
            frozen=self._job.frozen,
            adapters=self._job.adapters,
            given=self._given,
            settings=rollout_settings(self._job.config, greedy=work.greedy),
        )
        episodes = rollout.run(
            work.examples,
            seed=work.seed,
            first_example=work.first_example,
            group_size=work.group_size,
        )
        return [replace(episode, state=None) for episode in episodes]

    def close(self) -> None:
        """Stop the engine."""
        self._models.engine.close()


class _OwnModels:
    """The worker's own copy of the base models, with the learner's adapters."""

    def __init__(self, job: Job) -> None:
        config = job.config
        # The adapters' weights come from the learner, not from where it once began.
        agents = [replace(agent, start_from=None) for agent in job.agents]
        device = config.device if config.worker_gpus else "cpu"
        self._team = Team.load(agents, config.replace(device=device, gradient_checkpointing=False))
        self._local = local_engine(self._team, config)

    @property
    def engine(self) -> Engine:
        """Samples from what was taken last."""
        return self._local

    def take(self, offer: Offer) -> None:
        """Overwrite the adapters with the ones that are offered."""
        if not isinstance(offer.content, Mapping):
            raise EngineError(f"{offer.name} has no weights, and this worker has its own models")
        for agent, weights in offer.content.items():
            policy = self._team.of(agent)
            policy.set_adapter_weights(agent, load(weights), source=offer.name)
        self._local.publish(offer.version)


class _Servers:
    """vLLM servers, which the learner gives its adapters."""

    def __init__(self, job: Job) -> None:
        if job.servers is None:
            raise EngineError("this job has no servers")
        config = job.config
        self._client = VersionClient(
            job.servers,
            in_flight=-(-config.max_batch_size // config.rollout_workers),
            patience=config.engine_patience,
            timeout=config.engine_timeout,
        )

    @property
    def engine(self) -> Engine:
        """Asks for what was taken last."""
        return self._client

    def take(self, offer: Offer) -> None:
        """Ask for the adapters that are offered from now on."""
        if not isinstance(offer.content, Publication):
            raise EngineError(f"{offer.name} is at no server, and this worker has no models")
        self._client.use(offer.content)
