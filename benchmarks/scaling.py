"""Training spread over processes and servers, against one of them with the same global batch.

    python benchmarks/scaling.py [--vllm PYTHON] [--json FILE]

A duo on the tiny base, 64 episodes of 32 tokens an answer, five iterations with a critic. Each
process has one thread of torch, as if it were a machine of its own: two processes under `accelerate
launch` (gloo) against one. With --vllm (a Python that has vLLM, see `make vllm-cpu`) two vLLM
servers of one core each against one. The seconds are those of the iterations after the first; the
ratio says how many times as fast two are, which on shared cores need not be above 1. The adapters
of two processes are those of one but for rounding, of which Adam makes a share of its step; hence
two learning rates. Servers have an arithmetic of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iteration import EPISODES, GROUP_SIZE, chain, questions, score
from rollout import VLLM
from safetensors.torch import load_file
from side_by_side import endless_base, parser, publish, ratio

from marft_graph import Trainer
from marft_graph.engine.vllm.server import ServerProcess, server_command

AGENTS, ITERATIONS = 2, 5
SETTINGS = {
    "iterations": ITERATIONS,
    "examples_per_iteration": EPISODES // GROUP_SIZE,
    "group_size": GROUP_SIZE,
    "max_new_tokens": 32,
    "eval_every": 0,
    "device": "cpu",
    "cpu_threads": 1,
}


@dataclass(frozen=True, eq=False)
class Way:
    """A way to run the same training."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    is_exact: bool = True
    """Whether it must come to the adapters of one process."""

    def run(self, base: Path, folder: Path) -> dict[str, list[float]]:
        """Train into a folder; seconds of the iterations after the first, by what they went to."""
        config = {"base_model": str(base), **SETTINGS, **self.settings}
        subprocess.run(
            [
                *_launcher(self.processes),
                __file__,
                f"--processes={self.processes}",
                *("--train", json.dumps(config), str(folder)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            timeout=1800,
        )
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        rows = [json.loads(line) for line in lines]
        return {part: [row[part] for row in rows] for part in ("seconds_rollout", "seconds_update")}


def _launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without --multi_gpu it starts a single process where there is no GPU.
    flags = f"--multi_gpu --num_processes {processes} --num_machines 1 --main_process_port {port}"
    plain = "--mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*command, *flags.split(), *plain.split()]


def compare(one: Way, two: Way, base: Path, rounds: int) -> list[dict[str, Any]]:
    """Two lines of the table."""
    seconds: dict[Way, list[float]] = {one: [], two: []}
    parts: dict[Way, list[list[float]]] = {one: [], two: []}
    adapters = {}
    for _ in range(rounds):
        for way in (one, two):
            with tempfile.TemporaryDirectory() as folder:
                found = way.run(base, Path(folder) / "run")
                adapters[way] = weights(Path(folder) / "run")
            middle = [statistics.median(values) for values in found.values()]
            seconds[way].append(sum(middle))
            parts[way].append(middle)
    difference = max(
        float((value - adapters[two][name]).abs().max()) for name, value in adapters[one].items()
    )
    return [
        {
            "where": way.name,
            "seconds an iteration": statistics.median(seconds[way]),
            "sampling": statistics.median(sampling for sampling, _ in parts[way]),
            "update": statistics.median(update for _, update in parts[way]),
            "times as fast": ratio(seconds[one], seconds[way]),
            "adapters differ by": difference if way is two and way.is_exact else "",
        }
        for way in (one, two)
    ]


def weights(run: Path) -> dict[str, Any]:
    """Every adapter's tensors at the end of a run."""
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted((run / "export" / "adapters").glob("*/adapter_model.safetensors"))
        for name, value in load_file(file).items()
    }


@contextmanager
def servers(base: Path, python: str, count: int) -> Iterator[Sequence[str]]:
    """vLLM servers on this machine, each with a core of its own; gives their URLs."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    command = server_command(
        str(base), dtype="float32", max_rank=16, adapters=AGENTS + 1, on_cpu=True, more=VLLM
    )
    started: list[ServerProcess] = []
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        for number in range(count):
            server = ServerProcess(python, command, Path(logs) / f"{number}.log")
            server.api_key = started[0].api_key if started else server.api_key
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(number)
            server.ensure_running()
            stack.callback(server.stop)
            started.append(server)
        os.environ["VLLM_API_KEY"] = started[0].api_key
        yield [server.url for server in started]


def train(config: Mapping[str, Any], folder: Path) -> None:
    """What every process of a run does."""
    with Trainer(
        chain(AGENTS),
        train_dataset=[{"text": text} for text in questions(24)],
        reward=lambda example, state: score(state["text"]),
        config=config,
        run_dir=folder,
    ) as trainer:
        trainer.train(progress=False)


def main() -> None:
    """Print the table, or with --train be one process of a run."""
    options = parser(__doc__)
    options.set_defaults(rounds=3)
    options.add_argument("--vllm", metavar="PYTHON", help="also compare servers of vLLM")
    options.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    options.add_argument("--train", nargs=2, metavar=("SETTINGS", "RUN"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.train:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != given.processes:
            raise SystemExit(f"{launched} processes were launched, not {given.processes}")
        train(json.loads(given.train[0]), Path(given.train[1]))
        return
    with endless_base() as base:
        rows = []
        for rate in (1e-4, 1e-5):
            settings = {"learning_rate": rate}
            one = Way(f"one process, learning_rate {rate:g}", settings)
            two = Way(f"two processes, learning_rate {rate:g}", settings, processes=2)
            rows += compare(one, two, base, given.rounds)
        if given.vllm:
            with servers(base, given.vllm, 2) as urls:
                on = {"engine": "vllm", "engine_timeout": 1200.0, "engine_patience": 1200.0}
                one = Way("one vLLM server", {**on, "engine_urls": urls[:1]}, is_exact=False)
                two = Way("two vLLM servers", {**on, "engine_urls": urls}, is_exact=False)
                rows += compare(one, two, base, given.rounds)
    publish(rows, given.json)


if __name__ == "__main__":
    main()
