"""Trackers that a user asked for: a run's figures go to TensorBoard, W&B, MLflow or Trackio too.

accelerate's trackers do the writing, each in a thread of its own: a service that is slow or away
holds up no training and ends no run. Without a name in `trackers` nothing here contacts anything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import math
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from marft_graph.errors import CheckpointError, ConfigError
from marft_graph.names import agent_of_adapter
from marft_graph.run.folder import write_text_atomically
from marft_graph.secret import hiding, without_secrets

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
RUNS = "trackers.json"
"""Which of a tracker's runs is this one, so that a resumed run goes on in it."""
START_TIMEOUT = 120.0
"""Seconds that a tracker has to begin."""
FINISH_TIMEOUT = 60.0
"""Seconds that all trackers have at the end to send what they still hold."""
_GROUPS = {"agents": "agent", "rewards": "reward"}
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_LONGEST_NAME = 200


def require_tracker_packages(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: with what to install.
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise ConfigError(
            f"trackers has {', '.join(missing)}, which is not installed here: "
            f"pip install {' '.join(missing)}"
        )


@contextlib.contextmanager
def tracking(
    names: Sequence[str], run_dir: Path, *, project: str, settings: Row, iteration: int
) -> Iterator[Callable[[Row], None]]:
    """What a run's rows are given to while it goes on; at the end all trackers are closed.

    A row that a tracker cannot take is left out, with one warning for each tracker.

    Args:
        names: of `trackers`; none: the rows go nowhere.
        run_dir: the run's folder. TensorBoard's files are in its `tensorboard/`.
        project: project or experiment at the service.
        settings: of the run, stored when it begins; secrets are left out.
        iteration: the last one that is done.

    Raises:
        ConfigError: a tracker does not begin, say for want of a login.
        CheckpointError: the run folder is damaged or not writable.
    """
    runs = _read_runs(run_dir) if names else {}
    threads: list[_TrackerThread] = []
    try:
        for name in names:
            is_new = name not in runs
            tracker = _make(name, run_dir, project, runs.setdefault(name, _new_id(name)), iteration)
            threads.append(_TrackerThread(name, tracker, flat_settings(settings) if is_new else {}))
            threads[-1].begin()
            if isinstance(tracker, MLflowTracker):
                runs[name] = tracker.tracker.info.run_id
        if names:
            _write_runs(run_dir, runs)

        def track(row: Row) -> None:
            figures = flat_figures(row)
            for thread in threads:
                thread.log(figures, row["iteration"])

        yield track
    finally:
        _finish(threads)


def flat_figures(row: Row) -> dict[str, float]:
    """A row's finite numbers by name, without its iteration.

    >>> flat_figures({"iteration": 3, "agents": {"actor": {"kl": 0.1}}, "collapsed": None})
    {'agent/actor/kl': 0.1}
    """
    hide = hiding()
    return {
        _name(hide, path): value
        for path, value in _leaves(row)
        if path != ("iteration",) and _is_figure(value)
    }


def flat_settings(settings: Row) -> dict[str, str | int | float | bool]:
    """Settings as plain values by name, without the environment's secrets and users in URLs.

    >>> flat_settings({"nodes": ["a", "b"], "engine_urls": ["http://me:pw@host/v1"]})
    {'nodes': 'a, b', 'engine_urls': 'http://host/v1'}
    """
    hide = hiding()

    def plain(value: Any) -> str | int | float | bool:
        if isinstance(value, bool | int | float):
            return value
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return _USER_IN_URL.sub("", hide(text))

    return {_name(hide, path): plain(value) for path, value in _leaves(settings)}


class _TrackerThread(threading.Thread):
    """The one thread that uses a tracker: some keep their run by thread, all may block."""

    def __init__(self, name: str, tracker: GeneralTracker, settings: Row) -> None:
        super().__init__(name=f"tracker-{name}", daemon=True)
        self._name_of_tracker = name
        self._tracker = tracker
        self._settings = settings
        self._rows: queue.SimpleQueue[tuple[Row, int] | None] = queue.SimpleQueue()
        self._has_begun = threading.Event()
        self._problem: BaseException | None = None
        self._has_warned = False

    def begin(self) -> None:
        """Start the tracker; a ConfigError where that fails or takes too long."""
        self.start()
        in_time = self._has_begun.wait(START_TIMEOUT)
        if not in_time or self._problem is not None:
            problem = f"no answer in {START_TIMEOUT:g} s" if not in_time else repr(self._problem)
            raise ConfigError(
                f"trackers: {self._name_of_tracker} cannot begin: {without_secrets(problem)} (log "
                "in there, or leave it out of trackers)"
            ) from self._problem

    def log(self, figures: Row, step: int) -> None:
        """Hand over one row; returns at once."""
        self._rows.put((figures, step))

    def stop(self) -> None:
        """Let the tracker close once it has written what it was given; returns at once."""
        self._rows.put(None)

    def run(self) -> None:
        try:
            self._tracker.start()
            if self._settings:
                self._tracker.store_init_configuration(dict(self._settings))
        except BaseException as error:  # noqa: BLE001 - raised again by `begin`
            self._problem = error
        self._has_begun.set()
        if self._problem is not None:
            return
        while (item := self._rows.get()) is not None:
            figures, step = item
            self._try(functools.partial(self._tracker.log, figures, step=step))
        self._try(self._tracker.finish)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever a service does, the run goes on
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "the tracker %s failed, and training goes on (further failures are not "
                    "shown): %s",
                    self._name_of_tracker,
                    without_secrets(repr(error)),
                )


def _finish(threads: Sequence[_TrackerThread]) -> None:
    for thread in threads:
        thread.stop()
    deadline = time.monotonic() + FINISH_TIMEOUT
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            logger.warning(
                "%s did not finish in %g s: figures may be missing",
                thread.name,
                FINISH_TIMEOUT,
            )


def _make(name: str, run_dir: Path, project: str, run_id: str, iteration: int) -> GeneralTracker:
    label = run_dir.resolve().name
    if name == "tensorboard":
        # What an earlier part of the run wrote after its last checkpoint is not shown twice.
        return TensorBoardTracker(
            name, logging_dir=run_dir, purge_step=iteration + 1 if iteration else None
        )
    if name == "wandb":
        return WandBTracker(project, name=label, id=run_id, resume="allow", dir=str(run_dir))
    if name == "mlflow":
        return MLflowTracker(project, run_id=run_id or None, run_name=label)
    return TrackioTracker(project, name=f"{label}-{run_id[:6]}", resume="allow")


def _is_installed(package: str) -> bool:
    """A folder `wandb`, as W&B leaves it in the working directory, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _new_id(name: str) -> str:
    """MLflow and TensorBoard choose their own."""
    return uuid.uuid4().hex if name in ("wandb", "trackio") else ""


def _read_runs(run_dir: Path) -> dict[str, str]:
    path = run_dir / RUNS
    if not path.exists():
        return {}
    try:
        return {str(name): str(run) for name, run in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: {error!r}") from error


def _write_runs(run_dir: Path, runs: Mapping[str, str]) -> None:
    try:
        write_text_atomically(run_dir / RUNS, json.dumps(runs, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {run_dir / RUNS}: {error}") from error


def _leaves(values: Row, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name(hide: Callable[[str], str], path: tuple[str, ...]) -> str:
    """A name that every service accepts: letters, digits, `_`, `-`, `.`, spaces and `/`."""
    first, *rest = path
    if first == "agents" and rest:
        rest[0] = agent_of_adapter(rest[0])
    parts = (re.sub(r"[^\w.\- ]", "_", hide(part)) for part in (_GROUPS.get(first, first), *rest))
    return "/".join(parts)[:_LONGEST_NAME]
