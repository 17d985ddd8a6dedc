"""`accelerate launch` with FSDP: the base is divided among processes, the training is the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.vllm.test_engine import stand_in
from tests.test_ranks import SCRIPT, adapters

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate"

# Before each optimizer step and each rollout a process notes what it holds of the base's layers.
WATCHED = (
    """
import atexit, os
from torch.distributed.tensor import DTensor
from marft_graph.learn.update import Learner
from marft_graph import sampling

noted = {"step": [], "rollout": []}

def note(kind, policy):
    named = policy._decoder.layers.named_parameters()
    layers = [weight for name, weight in named if "lora_" not in name]
    own = [w.to_local() if isinstance(w, DTensor) else w for w in layers]
    noted[kind].append([sum(w.numel() for w in own), sum(w.numel() for w in layers)])

step, run = Learner._step, sampling.run_episodes

def watched_step(self, agent, batch, indices):
    note("step", self._team.of(agent))
    return step(self, agent, batch, indices)

def watched_run(*args, **kwargs):
    note("rollout", kwargs["engine"]._policy)
    return run(*args, **kwargs)

Learner._step, sampling.run_episodes = watched_step, watched_run

def tell():
    rank = os.environ.get("RANK", "0")
    Path(given["run_dir"] + f"-held-{rank}.json").write_text(json.dumps(noted))

atexit.register(tell)
"""
    + SCRIPT
)


def launch(folder: Path, config: Path | None, given: dict[str, Any], **env: str) -> str:
    """Train in one process, or as `accelerate launch` does with a config file; what it printed."""
    script = folder / "script.py"
    script.write_text(WATCHED, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher: list[Any] = ["-m", "accelerate.commands.launch", "--config_file", config]
    launcher += ["--main_process_port", str(port), "--num_cpu_threads_per_process", "1"]
    done = subprocess.run(
        [sys.executable, *(launcher if config else []), script, json.dumps(given)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def held(run_dir: Path, rank: int, kind: str) -> list[float]:
    """The share of the layers' weights that a process held before each step or rollout."""
    noted = json.loads(Path(f"{run_dir}-held-{rank}.json").read_text(encoding="utf-8"))[kind]
    assert all(whole == noted[0][1] > 0 for _, whole in noted)
    return [own / whole for own, whole in noted]


SETTINGS = {
    "iterations": 2,
    "advantage": "gae",
    "learning_rate": 1e-4,
    "eval_every": 0,
    "examples_per_iteration": 3,  # two for one process, one for the other
    "minibatches": 2,
    "microbatch_tokens": 100,  # an odd number of micro-batches, now and then
}

ROLLOUTS = 2 + 4
"""Iterations, and evaluations: before and after, sampled and greedy."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    given = {"settings": SETTINGS, "base_model": str(tiny_model), "run_dir": str(folder / "run")}
    launch(folder, None, given)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "more", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"]
)
@pytest.mark.parametrize("config", ["fsdp.yaml", "ddp.yaml"])
def test_accelerate_launch_trains_what_one_process_trains(
    tmp_path: Path, tiny_model: Path, alone: Path, config: str, more: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    settings = {**SETTINGS, **more}
    given = {"settings": settings, "base_model": str(tiny_model), "run_dir": str(run)}
    launch(tmp_path, CONFIGS / config, given)
    one, two = adapters(alone), adapters(run)
    assert one.keys() == two.keys() != set()
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6
    steps = 2 * 2 * 2  # iterations, agents, minibatches
    assert held(alone, 0, "step") == [1.0] * steps
    for rank in (0, 1):
        assert held(run, rank, "step") == [0.5 if config == "fsdp.yaml" else 1.0] * steps
        assert held(run, rank, "rollout") == [1.0] * ROLLOUTS  # decoding takes whole layers


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_stage_3_divides_the_layers(tmp_path: Path, tiny_model: Path, alone: Path) -> None:
    run = tmp_path / "run"
    given = {"settings": SETTINGS, "base_model": str(tiny_model), "run_dir": str(run)}
    # What accelerate's launcher sets for deepspeed.yaml; it wants DeepSpeed's package for that.
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    launch(tmp_path, CONFIGS / "ddp.yaml", given, **zero)
    one, two = adapters(alone), adapters(run)
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6
    assert held(run, 0, "step") == held(run, 1, "step") == [0.5] * 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_servers_sample_for_all_processes_and_layers_stay_divided(
    tmp_path: Path, tiny_model: Path
) -> None:
    server = stand_in(tiny_model)
    more = {"engine": "vllm", "engine_urls": [server.url]}
    run = tmp_path / "run"
    settings = {**SETTINGS, **more}
    given = {"settings": settings, "base_model": str(tiny_model), "run_dir": str(run)}
    try:
        launch(tmp_path, CONFIGS / "fsdp.yaml", given)
    finally:
        server.kill()
    asked = [request["model"] for request in server.requests if request["model"] != "base"]
    versions = [name.partition("-")[0] for name in set(asked)]
    # Both processes ask for the same adapters: each version has one name.
    assert sorted(versions) == [f"{agent}@v{v}" for agent in ("actor", "planner") for v in range(3)]
    assert len(asked) == 2 * (2 * 12 + 4 * 4)  # calls, of iterations' and evaluations' episodes
    assert not server.adapters
    for rank in (0, 1):
        assert held(run, rank, "step") == [0.5] * 8
        assert held(run, rank, "rollout") == [0.5] * ROLLOUTS
