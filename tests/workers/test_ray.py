"""Rollouts on Ray: two nodes on this machine, workers and nodes that die, whole training runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from marft_graph import Trainer, run_episodes
from marft_graph.agents import agents_of
from marft_graph.config import TrainConfig, rollout_settings
from marft_graph.engine.routing import local_engine
from marft_graph.episode import Episode
from marft_graph.errors import DatasetError, RewardError
from marft_graph.policy.team import Team
from marft_graph.rollout.inputs import AppInputs
from marft_graph.run.tracking import read_metrics
from marft_graph.workers.job import pack_app
from marft_graph.workers.rollouts import RolloutWorkers
from tests.apps import duo
from tests.training import EXAMPLES, config, reward

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
NODES = ("planner", "actor")
WAIT = 300
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
# What each of several processes runs that train together.
RANK = """
import sys
from pathlib import Path
from marft_graph import Trainer
from tests.apps import duo
from tests.training import EXAMPLES, config, reward

model, run, workers = sys.argv[1:]
settings = config(
    Path(model), eval_every=0, examples_per_iteration=3, rollout_workers=int(workers)
)
with Trainer(
    duo(), train_dataset=EXAMPLES, reward=reward, config=settings, run_dir=run
) as trainer:
    trainer.train(progress=False)
"""


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of two nodes with a CPU each; the node that this process belongs to has none."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # What `make setup` puts on the path of every process, here for the nodes' workers.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for cpus in (0, 1, 1):
        cluster.add_node(num_cpus=cpus, include_dashboard=False)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def team(tiny_model: Path) -> Team:
    settings = TrainConfig(base_model=str(tiny_model), device="cpu")
    team = Team.load(agents_of(NODES, settings), settings)
    torch.manual_seed(1)
    for agent in team.agents:
        for parameter in team.parameters(agent):
            torch.nn.init.normal_(parameter, std=0.1)
    return team


def workers(team: Team, settings: TrainConfig, rewarded: Callable[..., float]) -> RolloutWorkers:
    app = pack_app(duo(), rewarded, AppInputs(), None)
    agents = agents_of(NODES, settings)
    return RolloutWorkers(app, NODES, team, agents, settings, None)


def rollout(crew: RolloutWorkers) -> list[Episode]:
    return crew.run(EXAMPLES[:8], first_example=0, group_size=2, seed=7, greedy=False)


def undisturbed(team: Team, settings: TrainConfig) -> list[Episode]:
    engine = local_engine(team)
    engine.publish(1)
    try:
        return run_episodes(
            duo(),
            EXAMPLES[:8],
            engine=engine,
            reward=reward,
            nodes=NODES,
            seed=7,
            group_size=2,
            **dataclasses.asdict(rollout_settings(settings)),
        )
    finally:
        engine.close()


def sampled(episodes: list[Episode]) -> list[Any]:
    return [
        (e.example_index, e.seed, e.status, e.outcome_reward, [c.completion_ids for c in e.calls])
        for e in episodes
    ]


def logprobs(episodes: list[Episode]) -> torch.Tensor:
    return torch.tensor([x for e in episodes for c in e.calls for x in c.logprobs])


def test_a_worker_killed_in_the_middle_loses_no_episode(
    cluster: Any,
    team: Team,
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = tmp_path / "killed"
    rewards = tmp_path / "rewards"
    rewards.mkdir()

    def deadly(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        import os
        import signal

        (rewards / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        if example["answer"] == "3" and not told.exists():
            told.write_text(str(os.getpid()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        return reward(example, state)

    settings = config(tiny_model, rollout_workers=2, ray_address=cluster.address)
    crew = workers(team, settings, deadly)
    try:
        crew.publish(1)
        with caplog.at_level(logging.WARNING):
            found = rollout(crew)
        assert crew.stats() == {"workers": 2, "workers_lost": 1}
        again = rollout(crew)  # nobody is killed now
        assert crew.stats() == {"workers": 2, "workers_lost": 1}
        with pytest.raises(DatasetError, match=r"examples 0 to 0 cannot be sent to a rollout wor"):
            crew.run(
                [{"question": threading.Lock()}],
                first_example=0,
                group_size=1,
                seed=7,
                greedy=False,
            )
    finally:
        crew.close()
    assert "a rollout worker was lost: The actor died unexpectedly" in caplog.text
    expected = undisturbed(team, settings)
    assert sampled(found) == sampled(again) == sampled(expected)
    assert [e.example_index for e in found] == [i for i in range(8) for _ in range(2)]
    assert torch.equal(logprobs(found), logprobs(again))
    assert (logprobs(found) - logprobs(expected)).abs().max() < 1e-4
    pids = {path.name.partition("-")[0] for path in rewards.iterdir()}
    assert told.read_text(encoding="utf-8") in pids
    assert str(os.getpid()) not in pids
    assert 2 <= len(pids) <= 3  # two, and the one after the one that was killed, if it came in time


def test_a_node_that_goes_away_loses_no_episode(
    cluster: Any, team: Team, tiny_model: Path, tmp_path: Path
) -> None:
    here = tmp_path / "node"

    def lingering(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        import ray

        if example["answer"] == "3" and not here.exists():
            own = here.with_suffix(f".{threading.get_ident()}")  # two episodes may come at once
            own.write_text(ray.get_runtime_context().get_node_id())
            own.rename(here)
            time.sleep(WAIT)
        return reward(example, state)

    settings = config(
        tiny_model, rollout_workers=2, ray_address=cluster.address, reward_timeout=WAIT
    )
    crew = workers(team, settings, lingering)

    def remove() -> None:
        deadline = time.monotonic() + WAIT
        while not here.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (node,) = [n for n in cluster.list_all_nodes() if n.node_id == here.read_text()]
        cluster.remove_node(node, allow_graceful=False)

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        crew.publish(1)
        found = rollout(crew)
        # Two where Ray places the new worker on the node before it knows that this one is dead.
        assert 1 <= crew.stats()["workers_lost"] <= 2
    finally:
        crew.close()
        remover.join(WAIT)
    assert sampled(found) == sampled(undisturbed(team, settings))


def test_training_with_workers_is_training_without(
    make: Callable[..., Trainer], tiny_model: Path, tmp_path: Path
) -> None:
    """Also: an error of the reward arrives as it is, and Ray and our signal handlers are left."""
    import ray

    returns = {}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for count in (0, 2):
        settings = config(tiny_model, rollout_workers=count)
        with make(run=f"run_{count}", config=settings) as trainer:
            trainer.train(progress=False)
        rows = read_metrics(tmp_path / f"run_{count}")
        returns[count] = [(row["return_mean"], row["tokens_sampled"]) for row in rows]
    assert rows[-1]["engine"] == {"workers": 2, "workers_lost": 0}
    assert returns[0] == returns[2]
    assert not ray.is_initialized()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers

    def failing(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        raise KeyError("oops")

    settings = config(tiny_model, rollout_workers=1)
    with (
        make(run="failing", config=settings, reward=failing) as trainer,
        pytest.raises(RewardError, match="the reward function raised KeyError: 'oops'"),
    ):
        trainer.train(progress=False)


def cli(run: Path, **options: Any) -> subprocess.Popen[str]:
    given = {
        "rollout_workers": 2,
        "iterations": 2,
        "examples_per_iteration": 4,
        "group_size": 4,
        "minibatches": 1,
        "eval_every": 0,
        "eval_examples": 8,
        **options,
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "marft_graph", "train", "workflows/math_duo", "--run-dir", run]
    return subprocess.Popen(
        [*command, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_of(session: int) -> dict[int, str]:
    """Command lines of a session's processes, by their ids."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            is_dead = process.status() == psutil.STATUS_ZOMBIE  # nobody has asked for its end yet
            if os.getsid(process.pid) == session and not is_dead:
                found[process.pid] = " ".join(process.cmdline())
    return found


def listening(pid: int) -> set[str]:
    """Addresses at which a process takes connections."""
    with contextlib.suppress(psutil.Error):
        open_ones = psutil.Process(pid).net_connections(kind="tcp")
        return {one.laddr.ip for one in open_ones if one.status == psutil.CONN_LISTEN}
    return set()


def test_the_command_line_trains_math_duo_with_workers(tmp_path: Path) -> None:
    process = cli(tmp_path / "run")
    output = process.communicate(timeout=WAIT)[0]
    assert process.returncode == 0, output
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["episodes"], row["episodes_failed"]) for row in rows] == [(16, 0), (16, 0)]
    assert [row["engine"] for row in rows] == [{"workers": 2, "workers_lost": 0}] * 2
    assert (tmp_path / "run" / "export" / "manifest.json").is_file()


def test_sigterm_saves_the_run_and_ends_its_ray(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = cli(run, iterations=100_000, checkpoint_every=0)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + WAIT
    while not (metrics.is_file() and metrics.read_text().count("\n") > 1):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert any("raylet" in command for command in processes_of(process.pid).values())
    assert {address for pid in processes_of(process.pid) for address in listening(pid)} <= LOOPBACK
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=WAIT)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    done = len(metrics.read_text().splitlines())
    assert (run / "checkpoints" / f"step_{done}").is_dir()
    deadline = time.monotonic() + WAIT
    while left := processes_of(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    own = [path for path in run.rglob("*") if "ray" in path.name]
    assert own == []  # Ray keeps its own logs elsewhere


def test_a_learner_that_is_killed_leaves_no_worker_behind(tmp_path: Path) -> None:
    process = cli(tmp_path / "run", iterations=100_000)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + WAIT
    while not metrics.is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=WAIT)
    deadline = time.monotonic() + WAIT  # Ray's agents notice after a while that it is gone
    while left := processes_of(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def launch(count: int, *words: object) -> None:
    """Run the script in so many processes, as `accelerate launch` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    one = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)} if count > 1 else {}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, words)],
            cwd=ROOT,
            env={**shared, **one, **({"RANK": str(i), "LOCAL_RANK": str(i)} if one else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=WAIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)


def test_two_processes_with_a_worker_each_train_what_one_trains(
    tiny_model: Path, tmp_path: Path
) -> None:
    launch(1, tiny_model, tmp_path / "alone", 0)
    launch(2, tiny_model, tmp_path / "both", 1)
    rows = [read_metrics(tmp_path / run) for run in ("alone", "both")]
    for own, other in zip(*rows, strict=True):
        assert own["return_mean"] == pytest.approx(other["return_mean"])
        assert own["tokens_sampled"] == other["tokens_sampled"]
        assert other["episodes"] == 3 * 4
    alone, both = (
        {
            f"{file.parent.name}/{name}": value
            for file in sorted((tmp_path / run / "export").rglob("adapter_model.safetensors"))
            for name, value in load_file(file).items()
        }
        for run in ("alone", "both")
    )
    assert alone.keys() == both.keys() != set()
    assert max((alone[name] - both[name]).abs().max() for name in alone) < 1e-5
