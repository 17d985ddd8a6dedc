"""This process's connection to Ray, and rollout workers as actors of it.

Ray is imported where it is first used: it is an extra, and its settings are read at that moment.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pickle import PicklingError
from typing import Any

from marft_graph import errors
from marft_graph.config import TrainConfig
from marft_graph.episode import Episode
from marft_graph.errors import ConfigError, DatasetError, EngineError, MarftError
from marft_graph.rollout.portions import WorkerLost
from marft_graph.run.stopping import STOP_SIGNALS
from marft_graph.workers.job import Job, Offer, Work
from marft_graph.workers.worker import RolloutWorker

_FETCH_SECONDS, _CONNECT_SECONDS = 300.0, 10.0
_ADDRESS = re.compile(r"auto|[^\s/]+:\d{1,5}")
_REASON = 300
"""Characters of what Ray says when a worker is lost; it goes on with advice."""


def check_worker_settings(config: TrainConfig) -> None:
    """Refuse settings that cannot go together, before anything is loaded.

    Raises:
        ConfigError: the message says which, and what would do; or Ray is not installed.
    """
    if config.rollout_workers == 0:
        if config.ray_address is not None or config.worker_gpus:
            name = "worker_gpus" if config.ray_address is None else "ray_address"
            raise ConfigError(f"{name} needs rollout_workers, and rollout_workers is 0")
        return
    if config.ray_address is not None and not _ADDRESS.fullmatch(config.ray_address):
        raise ConfigError(
            f"ray_address is {config.ray_address!r}; it must be host:port, such as gpu-1:6379, or "
            "auto"
        )
    if config.worker_gpus and config.engine != "local":
        raise ConfigError(
            "worker_gpus needs engine local: with engine vllm the GPUs are the servers'"
        )
    if config.engine == "vllm" and config.ray_address is not None and not config.engine_urls:
        raise ConfigError(
            "engine vllm starts a server that only this machine can reach; rollout workers of a "
            "cluster (ray_address) need servers in engine_urls"
        )
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("rollout_workers needs Ray: pip install 'marft-graph[ray]'")


def prepare_ray(address: str | None) -> None:
    """Say how Ray is to behave, before it is imported: it reads some of its settings then.

    Nobody is told that it is used. One of our own (`address` None) listens on the loopback, and
    takes orders from this process only; by itself it would listen on every interface, and keep its
    token in a file. Where somebody has imported Ray before, it stays as they have it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None and "ray" not in sys.modules:
        # On Linux it has the same meaning: no other machine, so the node is 127.0.0.1.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray").setLevel(logging.ERROR)


class _Connection:
    """The one connection to Ray that a process can have; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._is_ours = False

    def open(self, address: str | None, workers: int) -> None:
        """Start a Ray of our own for so many workers, or join one.

        A process that is in one already stays there.

        Raises:
            EngineError: Ray does not start, or there is no cluster that lets us in.
        """
        with self._lock:
            prepare_ray(address)
            _check_reachable(address)
            import ray

            if not ray.is_initialized():
                settings: dict[str, Any] = {"address": address}
                if address is None:
                    settings = {"address": "local", "include_dashboard": False, "num_cpus": workers}
                with _signal_handlers_kept():
                    try:
                        ray.init(logging_level=logging.ERROR, **settings)
                    except Exception as error:  # Ray raises whatever it met
                        where = "Ray does not start" if address is None else f"no Ray at {address}"
                        raise EngineError(f"{where}: {type(error).__name__}: {error}") from error
                self._is_ours = True
            self._users += 1

    def close(self) -> None:
        """Leave the cluster, or end the Ray that was started here, once nobody uses it."""
        import ray

        with self._lock:
            self._users -= 1
            if self._users == 0 and self._is_ours:
                self._is_ours = False
                ray.shutdown()


connection = _Connection()


def _check_reachable(address: str | None) -> None:
    """Find out whether somebody listens at a cluster's address: Ray would try for many minutes.

    Raises:
        EngineError: nobody does.
    """
    if address in (None, "auto"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"no Ray at {address} (ray_address): {error}; start one there with: ray start --head "
            f"--port {port}"
        ) from error


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Undo what Ray does to the handlers of SIGINT and SIGTERM, which are a run's own."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Ray changes them in the main thread only
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _RolloutActor:
    """A `RolloutWorker` in a process of Ray's; errors of ours travel as their name and message."""

    def __init__(self) -> None:
        self._worker: RolloutWorker | None = None

    def start(self, job: Job) -> Any:
        """Get ready for a job."""

        def load() -> None:
            self._worker = RolloutWorker(job)

        return _told(load)

    def run(self, work: Work) -> Any:
        """Run some examples."""

        def do() -> list[Episode]:
            import ray

            if self._worker is None:
                raise EngineError("a rollout worker was given work before it was started")
            return self._worker.run(work, lambda: ray.get(work.reference, timeout=_FETCH_SECONDS))

        return _told(do)


def _told(work: Callable[[], Any]) -> tuple[Any, tuple[str, str] | None]:
    try:
        return work(), None
    except MarftError as error:
        kinds = (kind.__name__ for kind in type(error).__mro__)
        return None, (next(name for name in kinds if hasattr(errors, name)), str(error))


class RayWorker:
    """A rollout worker that Ray runs, as a crew uses it.

    Args:
        job: reference to the job in Ray's store.
        cpus: CPUs that Ray reserves for it.
        gpus: GPUs that Ray reserves for it.
    """

    def __init__(self, job: Any, *, cpus: float, gpus: float) -> None:
        import ray

        self._job = job
        remote: Any = ray.remote(_RolloutActor)
        self._actor = remote.options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD"
        ).remote()

    def start(self) -> Future[None]:
        """Load app and models, as soon as Ray has a place for it."""
        return _settled(self._actor.start.remote(self._job))

    def run(self, work: Work) -> Future[list[Episode]]:
        """Run some examples.

        Raises:
            DatasetError: the examples cannot be pickled.
        """
        try:
            return _settled(self._actor.run.remote(work))
        except (TypeError, PicklingError) as error:
            first_line = str(error).strip().partition("\n")[0]
            raise DatasetError(
                f"{work} cannot be sent to a rollout worker: {first_line}"
            ) from error

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        import ray
        from ray.exceptions import RayError

        if not ray.is_initialized():  # it went with its Ray, and asking would start another one
            return
        with contextlib.suppress(RayError, ValueError):  # Ray does not know it any more
            ray.kill(self._actor, no_restart=True)


def put(value: Job | Offer) -> Any:
    """A reference to something in Ray's store, which lasts as long as the reference."""
    import ray

    return ray.put(value)


def _settled(reference: Any) -> Future[Any]:
    future: Future[Any] = Future()
    reference.future().add_done_callback(functools.partial(_settle, future))
    return future


def _settle(future: Future[Any], told: Future[Any]) -> None:
    """Hand over what an actor said; of what Ray says, whether the worker is to blame."""
    from ray.exceptions import RayError, RayTaskError

    error = told.exception()
    if error is None:
        value, failure = told.result()
        if failure is None:
            future.set_result(value)
            return
        name, message = failure
        future.set_exception(getattr(errors, name)(message))
    elif isinstance(error, RayError) and not isinstance(error, RayTaskError):
        future.set_exception(WorkerLost(" ".join(str(error).split())[:_REASON]))
    else:
        future.set_exception(EngineError(f"a rollout worker failed: {error}"))
