"""Several processes that train together do what one process does with all the episodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from marft_graph.config import TrainConfig
from marft_graph.errors import ConfigError, DistributedError
from marft_graph.ranks import Ranks, check_ranks

# What every process runs; the settings come as JSON.
SCRIPT = """
import hashlib, itertools, json, sys, torch
from pathlib import Path
from marft_graph import Trainer
from marft_graph.learn import update
from marft_graph.errors import MarftError
from tests.apps import duo
from tests.training import EXAMPLES, config, reward

given = json.loads(sys.argv[1])
fails_in = given.pop("fails_in", None)
resume = given.pop("resume", False)
settings = config(Path(given.pop("base_model")), **given["settings"])

def checked(example, state):
    if fails_in is not None and trainer._ranks.index == fails_in:
        raise KeyError("oops")
    return reward(example, state)

trainer = Trainer(
    duo(), train_dataset=EXAMPLES, eval_dataset=EXAMPLES[:4], reward=checked, config=settings,
    run_dir=given["run_dir"], resume=resume,
)
if (wrong := given.get("wrong")) and trainer._ranks.index == 1:  # once, in one process
    owner = {"score": update, "clip_grad_norm_": torch.nn.utils}.get(wrong["in"], update.Learner)
    right, turns = getattr(owner, wrong["in"]), itertools.count(1)

    def fails(*args, **kwargs):
        if next(turns) == wrong["turn"]:
            raise {"short": torch.OutOfMemoryError, "bug": LookupError}[wrong["kind"]]("on purpose")
        return right(*args, **kwargs)

    setattr(owner, wrong["in"], fails)

try:
    with trainer:
        trainer.train(progress=False)
        weights = [w.detach().numpy().tobytes()
                   for a in trainer.team.agents for w in trainer.team.parameters(a)]
        print("adapters:", hashlib.sha256(b"".join(weights)).hexdigest(), flush=True)
        print("microbatches:", trainer._learner.microbatch_tokens, flush=True)
except MarftError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    raise SystemExit(3)
"""


def launch(count: int, **given: Any) -> list[tuple[int, str]]:
    """Run the script in so many processes, as `accelerate launch` does; exit codes and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    one = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)} if count > 1 else {}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(given)],
            env={**shared, **one, **({"RANK": str(i), "LOCAL_RANK": str(i)} if one else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def adapters(run_dir: Path) -> dict[str, Any]:
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted((run_dir / "export" / "adapters").glob("*/adapter_model.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("advantage", [pytest.param("group", marks=pytest.mark.slow), "gae"])
def test_two_processes_train_what_one_trains(
    tmp_path: Path, tiny_model: Path, advantage: str
) -> None:
    settings = {
        "iterations": 5,
        "advantage": advantage,
        "learning_rate": 1e-4,
        "eval_every": 0,
        "examples_per_iteration": 3,  # two for one process, one for the other
        "minibatches": 2,
    }
    runs = {}
    for count in (1, 2):
        runs[count] = tmp_path / f"run_{count}"
        given = {"settings": settings, "base_model": str(tiny_model), "run_dir": str(runs[count])}
        done = launch(count, **given)
        assert [code for code, _ in done] == [0] * count, "\n".join(text for _, text in done)
    alone, together = adapters(runs[1]), adapters(runs[2])
    assert alone.keys() == together.keys() != set()
    for name, value in alone.items():
        assert (value - together[name]).abs().max() < 1e-6
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs.values()
    ]
    for own, other in zip(*rows, strict=True):
        assert own["return_mean"] == pytest.approx(other["return_mean"])
        assert own["episodes"] == other["episodes"] == 3 * 4


def test_a_run_of_two_processes_is_resumed_by_two(tmp_path: Path, tiny_model: Path) -> None:
    given = {"base_model": str(tiny_model), "run_dir": str(tmp_path / "run")}
    for iterations, resume in ((1, False), (2, True)):
        settings = {"iterations": iterations, "eval_every": 0}
        done = launch(2, settings=settings, resume=resume, **given)
        assert [code for code, _ in done] == [0, 0], "\n".join(text for _, text in done)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["iteration"] for row in rows] == [1, 2]


def test_an_error_in_one_process_ends_all(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"iterations": 1, "eval_every": 0}
    given = {"base_model": str(tiny_model), "run_dir": str(tmp_path / "run"), "fails_in": 1}
    (first, told), (second, own) = launch(2, settings=settings, **given)
    assert (first, second) == (3, 3)
    assert "DistributedError: process 1 failed: RewardError" in told
    assert "RewardError" in own
    assert "oops" in own


def lines_of(output: str, name: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(name)]


SHORT_RUN = {
    "iterations": 2,
    "advantage": "gae",
    "eval_every": 0,
    "minibatches": 2,
    "learning_rate": 1e-4,
    "microbatch_tokens": 256,
}


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """Adapters of two processes that have enough memory."""
    run = tmp_path_factory.mktemp("untroubled") / "run"
    done = launch(2, settings=SHORT_RUN, base_model=str(tiny_model), run_dir=str(run))
    assert [code for code, _ in done] == [0, 0], "\n".join(text for _, text in done)
    return adapters(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        {"in": "score", "turn": 2},  # the second pass, of the base
        {"in": "_policy_loss", "turn": 2},  # the second pass of a step
        {"in": "_update_critic", "turn": 2},  # where nothing is exchanged
        {"in": "clip_grad_norm_", "turn": 5},  # between the exchange and the step
    ],
    ids=lambda wrong: wrong["in"],
)
def test_memory_that_one_process_lacks_makes_all_try_again(
    tmp_path: Path, tiny_model: Path, untroubled: dict[str, Any], wrong: dict[str, Any]
) -> None:
    given = {"settings": SHORT_RUN, "base_model": str(tiny_model)}
    short = {**wrong, "kind": "short"}
    done = launch(2, run_dir=str(tmp_path / "short"), wrong=short, **given)
    told = "\n".join(text for _, text in done)
    assert [code for code, _ in done] == [0, 0], told
    first, second = (lines_of(text, "adapters:") for _, text in done)
    assert first == second != []
    assert [lines_of(text, "microbatches:") for _, text in done] == [["microbatches: 128"]] * 2
    assert "process 1 failed: OutOfMemoryError: on purpose" in told
    rows = (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["out_of_memory"] for row in rows] == [1, 0]
    for name, value in adapters(tmp_path / "short").items():
        assert (value - untroubled[name]).abs().max() < 1e-6


@pytest.mark.slow
def test_an_error_in_one_process_in_the_middle_of_an_update_ends_all(
    tmp_path: Path, tiny_model: Path
) -> None:
    wrong = {"in": "score", "turn": 2, "kind": "bug"}
    settings = {"iterations": 2, "eval_every": 0}
    (first, told), (second, own) = launch(
        2, settings=settings, base_model=str(tiny_model), run_dir=str(tmp_path / "run"), wrong=wrong
    )
    assert first == 3
    assert "DistributedError: process 1 failed: LookupError: on purpose" in told
    assert second == 1
    assert "LookupError: on purpose" in own


class Two(Ranks):
    """The second of three processes, as far as arithmetic goes."""

    def __init__(self) -> None:
        self.index, self.count = 1, 3


def test_shares_are_neighbours_and_leave_nothing_out() -> None:
    ranks = Two()
    shares = []
    for ranks.index in range(3):
        shares.append(list(ranks.share(8)))
    assert shares == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_servers_are_for_one_process() -> None:
    with pytest.raises(ConfigError, match=r"engine is 'vllm', with 3 processes"):
        check_ranks(Two(), TrainConfig(base_model="m", engine="vllm"))
    with pytest.raises(ConfigError, match=r"staleness is 1, with 3 processes.*staleness to 0"):
        check_ranks(Two(), TrainConfig(base_model="m", staleness=1))


def test_one_process_exchanges_nothing() -> None:
    ranks = Ranks()
    assert (ranks.index, ranks.count, ranks.is_main) == (0, 1, True)
    assert ranks.together(lambda: [1, 2]) == [1, 2]
    assert ranks.one_after_another(lambda: 7) == 7
    assert not ranks.any(False)
    assert issubclass(DistributedError, RuntimeError)
