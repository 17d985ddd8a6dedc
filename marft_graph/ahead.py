"""Rollouts that run ahead of the updates, in a thread beside them, at most so many iterations.

With a staleness of S, iteration k learns with the weights after k - 1 updates from episodes that
the weights after max(0, k - 1 - S) updates have sampled: always those, however fast either side
is. So the rollout of iteration k + S can begin, and is begun, when iteration k begins; rollouts run
one after another. After weights were put back, sampling begins anew with those, lag 0.
"""

from __future__ import annotations

import contextvars
import copy
import logging
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from marft_graph.config import TrainConfig
from marft_graph.errors import ConfigError, MarftError
from marft_graph.policy.team import Team, Weights
from marft_graph.rollout.cancellation import Cancellation
from marft_graph.sampling import Sampled, Sampler

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Job:
    """The rollout of an iteration, begun or about to."""

    iteration: int
    weights: Weights
    result: Future[Sampled] = field(default_factory=Future)
    cancellation: Cancellation = field(default_factory=Cancellation)


class RolloutsAhead:
    """The rollouts of the next iterations. Leaving it as a context ends those that run.

    Args:
        sampler: samples them.
        staleness: how many run ahead; 0: each is run when it is asked for, by who asks.
        iterations: the last one; none is begun after it.
        patience: seconds that a rollout may take to end when it is cancelled.
        plans: which weights sample coming iterations, where that was decided before.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        staleness: int,
        iterations: int,
        patience: float,
        plans: Mapping[int, Weights],
    ) -> None:
        self._sampler = sampler
        self._staleness = staleness
        self._iterations = iterations
        self._patience = patience
        self._plans = {n: w for n, w in plans.items() if n - 1 - w.version <= staleness}
        self._jobs: dict[int, _Job] = {}
        self._queue: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def plans(self) -> dict[int, Weights]:
        """Which weights sample the coming iterations, as far as that is decided."""
        return dict(self._plans)

    def rollout(self, iteration: int, weights: Weights) -> Sampled:
        """The episodes of an iteration; the rollouts of the next ones begin or go on.

        Args:
            iteration: the one after that of the last call.
            weights: those that are about to learn; they sample what is not decided yet.

        Raises:
            MarftError: of the rollout, with the iteration in the message.
        """
        if self._staleness == 0:
            return self._sampler.iteration(iteration, weights, Cancellation())
        coming = range(iteration, iteration + self._staleness + 1)
        self._plans = {number: self._plans.get(number, weights) for number in coming}
        self._begin([n for n in coming if n not in self._jobs and n <= self._iterations])
        sampled = _result_of(self._jobs[iteration])
        del self._jobs[iteration], self._plans[iteration]
        return sampled

    def stop(self) -> None:
        """Cancel what runs and put its examples back; the next rollout begins it again."""
        with self._lock:
            jobs, self._jobs = self._jobs, {}
            self._queue.clear()
            thread = self._thread
        for job in jobs.values():
            job.cancellation.ask()
        if thread is not None:
            thread.join(self._patience)
            if thread.is_alive():
                logger.warning("a rollout still runs %g s after it was cancelled", self._patience)
        for job in sorted(jobs.values(), key=lambda job: -job.iteration):
            if job.result.done() and job.result.exception() is None:
                self._sampler.put_back(job.result.result())

    def discard(self) -> None:
        """Stop, and forget which weights were to sample: they are dropped."""
        self.stop()
        self._plans.clear()

    def _begin(self, iterations: list[int]) -> None:
        jobs = [_Job(number, self._plans[number]) for number in iterations]
        with self._lock:
            self._jobs |= {job.iteration: job for job in jobs}
            self._queue.extend(jobs)
            if self._thread is None and self._queue:
                context = contextvars.copy_context()
                self._thread = threading.Thread(
                    target=context.run, args=(self._work,), name="marft-ahead", daemon=True
                )
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                job = self._queue.popleft()
            try:
                sampled = self._sampler.iteration(job.iteration, job.weights, job.cancellation)
            except BaseException as error:  # noqa: BLE001 - raised again by who wants the rollout
                with self._lock:
                    dropped = list(self._queue)
                    self._queue.clear()  # it would take the examples that were put back
                for failed in (job, *dropped):
                    failed.result.set_exception(error)
            else:
                job.result.set_result(sampled)


def _result_of(job: _Job) -> Sampled:
    """What a job has sampled, or its error with the iteration."""
    try:
        return job.result.result()
    except MarftError as error:
        message = f"in the rollout of iteration {job.iteration}: {error}"
        told = copy.copy(error)  # with what else it says of itself
        told.args = (message,)
        raise told from error
    except Exception as error:
        error.add_note(f"in the rollout of iteration {job.iteration}")
        raise


def check_weights_can_be_kept(team: Team, config: TrainConfig) -> None:
    """Refuse adapters of which no older version can be sampled from while they learn.

    Raises:
        ConfigError: names the settings.
    """
    if not config.staleness or config.engine != "local":
        return
    if any(policy.rows_follow_training for policy in team.policies):
        raise ConfigError(
            f"staleness is {config.staleness}, with engine local and a quantized base or LoRA on "
            "embeddings, whose older versions cannot be sampled from while they learn; set "
            "staleness to 0, or use engine vllm"
        )
