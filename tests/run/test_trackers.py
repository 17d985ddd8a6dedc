"""Trackers: what is logged reaches them, and nothing that happens there reaches the run."""

from __future__ import annotations

import functools
import importlib.machinery
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from marft_graph import TrainConfig
from marft_graph.errors import ConfigError, RewardError
from marft_graph.ranks import Ranks
from marft_graph.run import trackers
from marft_graph.run.trackers import flat_figures, flat_settings, require_tracker_packages
from marft_graph.run.tracking import MetricsLog, read_metrics
from tests.run.test_report import training_row
from tests.training import config

SETTINGS = {"learning_rate": 0.001, "nodes": ["writer"], "per_node": {"writer": {"lora_rank": 4}}}


@pytest.fixture
def tracking() -> Callable[..., Any]:
    """`tracking` as a trainer calls it: accelerate knows the processes."""
    Ranks()
    return functools.partial(
        trackers.tracking, project="marft-test", settings=SETTINGS, iteration=0
    )


class Recorder:
    """A tracker of a user's worst dreams, or a good one."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.problem: Exception | None = None
        self.start_problem: Exception | None = None
        self.free = threading.Event()
        self.free.set()
        self.is_finished = False

    def start(self) -> None:
        if self.start_problem is not None:
            raise self.start_problem

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int) -> None:
        self.free.wait(30)
        if self.problem is not None:
            raise self.problem
        self.seen.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(trackers, "_make", lambda *args: found)
    return found


def test_a_tracker_gets_every_row_and_every_evaluation(
    tracking: Callable[..., Any], recorder: Recorder, tmp_path: Path
) -> None:
    with tracking(["wandb"], tmp_path) as track:
        log = MetricsLog(tmp_path, track)
        log.write_evaluation({"iteration": 0, "eval_return": 0.25})
        log.write(training_row(1, 0.5))
        log.write_evaluation({"iteration": 1, "eval_return": 0.75})
    assert recorder.is_finished
    assert [step for step, _ in recorder.seen] == [0, 1, 1]
    assert recorder.seen[0][1] == {"eval_return": 0.25}
    assert recorder.seen[1][1]["return_mean"] == 0.5
    assert recorder.seen[1][1]["agent/writer/kl"] == 0.01
    assert "iteration" not in recorder.seen[1][1]
    assert recorder.settings["per_node/writer/lora_rank"] == 4


def test_a_tracker_that_fails_is_told_of_once_and_ends_nothing(
    tracking: Callable[..., Any],
    recorder: Recorder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret")
    with tracking(["wandb"], tmp_path) as track, caplog.at_level(logging.WARNING):
        recorder.problem = ConnectionError("no network for sk-very-secret")
        for iteration in (1, 2, 3):
            track(training_row(iteration, 0.5))
        _wait(lambda: bool(caplog.records))
        recorder.problem = None
        track(training_row(4, 0.5))  # it is back: what comes now is stored
    assert [step for step, _ in recorder.seen] == [4]
    (record,) = caplog.records
    assert "wandb failed, and training goes on" in record.message
    assert "no network for [SOME_API_KEY]" in record.message


def test_a_tracker_that_hangs_holds_nothing_up(
    tracking: Callable[..., Any],
    recorder: Recorder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "FINISH_TIMEOUT", 0.2)
    with tracking(["wandb"], tmp_path) as track:
        recorder.free.clear()
        track(training_row(1, 0.5))
        assert recorder.seen == []
    assert "did not finish in 0.2 s" in caplog.text
    assert not recorder.is_finished
    recorder.free.set()


def test_a_tracker_that_cannot_begin_is_an_error_at_once(
    tracking: Callable[..., Any], recorder: Recorder, tmp_path: Path
) -> None:
    recorder.start_problem = RuntimeError("you are not logged in")
    with (
        pytest.raises(ConfigError, match=r"wandb cannot begin: .*you are not logged in"),
        tracking(["wandb"], tmp_path),
    ):
        pass


def test_a_run_that_an_error_ends_closes_its_trackers(
    tracking: Callable[..., Any], recorder: Recorder, tmp_path: Path
) -> None:
    for error in (RewardError("bad"), KeyboardInterrupt()):
        recorder.is_finished = False
        with pytest.raises(type(error)), tracking(["wandb"], tmp_path):
            raise error
        assert recorder.is_finished


def test_without_a_name_nothing_is_started(
    tracking: Callable[..., Any], recorder: Recorder, tmp_path: Path
) -> None:
    threads = threading.active_count()
    with tracking((), tmp_path) as track:
        track(training_row(1, 0.5))
        assert threading.active_count() == threads
    assert recorder.seen == []
    assert list(tmp_path.iterdir()) == []
    assert TrainConfig(base_model="m").trackers == ()


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    left_behind = importlib.machinery.ModuleSpec("wandb", None)  # a folder `wandb`, as W&B leaves
    found = {"wandb": left_behind, "mlflow": None}
    monkeypatch.setattr(trackers.importlib.util, "find_spec", found.get)
    with pytest.raises(ConfigError, match="pip install wandb mlflow"):
        require_tracker_packages(["wandb", "mlflow"])


@pytest.mark.parametrize("names", [["tensorbord"], ["wandb", "wandb"], "all"])
def test_other_trackers_are_refused(names: Any) -> None:
    with pytest.raises(ConfigError, match="trackers"):
        TrainConfig(base_model="m", trackers=names)


def test_figures_have_names_that_every_service_accepts() -> None:
    row = {
        "iteration": 1,
        "rewards": {"a<b>:c": 1.0},
        "collapsed": "text",
        "return_mean": None,
        "agents": {"actor": {"kl": float("nan"), "calls": 8}},
        "is_last": True,
    }
    assert flat_figures(row) == {"reward/a_b__c": 1.0, "agent/actor/calls": 8}


def test_settings_are_stored_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-very-secret")
    told = flat_settings(
        {"vllm_args": ["--api-key", "sk-very-secret"], "engine_urls": ["http://me:pass@host:1/v1"]}
    )
    assert told == {"vllm_args": "--api-key, [VLLM_API_KEY]", "engine_urls": "http://host:1/v1"}


@pytest.mark.slow
def test_tensorboard_files_have_what_the_metrics_have(tiny_model: Path, make: Any) -> None:
    pytest.importorskip("tensorboard")
    settings = config(tiny_model, trackers=["tensorboard"])
    run_dir = make(config=settings).train(progress=False).run_dir
    scalars = _tensorboard(run_dir)
    rows = read_metrics(run_dir)
    for name, values in (
        ("return_mean", [row["return_mean"] for row in rows]),
        ("agent/actor/kl", [row["agents"]["actor"]["kl"] for row in rows]),
    ):
        assert [step for step, _ in scalars[name]] == [1, 2]
        assert [value for _, value in scalars[name]] == pytest.approx(values)
    assert [step for step, _ in scalars["eval_return"]] == [0, 1, 2]
    (stored,) = (run_dir / "tensorboard").glob("*/hparams.yml")
    assert yaml.safe_load(stored.read_text())["examples_per_iteration"] == 2


def test_a_resumed_run_goes_on_in_the_same_tensorboard(
    tracking: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    _two_parts(tracking, "tensorboard", tmp_path)
    assert _tensorboard(tmp_path)["return_mean"] == [
        (1, pytest.approx(0.1)),
        (2, pytest.approx(0.2)),
        (3, pytest.approx(0.5)),  # what was logged after the checkpoint is replaced
    ]
    assert len(list((tmp_path / "tensorboard").glob("*/hparams.yml"))) == 1


@pytest.mark.slow
def test_mlflow_gets_one_run_for_both_parts(
    tracking: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    _two_parts(tracking, "mlflow", tmp_path)
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'marft-test'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["per_node/writer/lora_rank"] == "4"
    history = client.get_metric_history(run.info.run_id, "agent/writer/kl")
    assert sorted({metric.step for metric in history}) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_works_offline_has_one_run_for_both_parts(
    name: str, tracking: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    _two_parts(tracking, name, tmp_path)
    run_id = json.loads((tmp_path / "trackers.json").read_text())[name]
    if name == "wandb":
        parts = list((tmp_path / "wandb").glob("offline-run-*"))
        assert len(parts) == 2
        assert all(part.name.endswith(run_id) for part in parts)
        assert b"agent/writer/kl" in b"".join(f.read_bytes() for f in parts[0].glob("*.wandb"))


def _two_parts(tracking: Callable[..., Any], name: str, run_dir: Path) -> None:
    """Three iterations; the third is done again after a stop."""
    with tracking([name], run_dir) as track:
        for iteration in (1, 2, 3):
            track(training_row(iteration, 0.1 * iteration))
    with tracking([name], run_dir, iteration=2) as track:
        track(training_row(3, 0.5))


def _tensorboard(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def _wait(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(500):
        if is_so():
            return
        pause.wait(0.01)
    raise AssertionError("it never was so")
