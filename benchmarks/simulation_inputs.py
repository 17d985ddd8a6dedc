"""Measure again what `simulation.py` needs and any machine can tell.

    python benchmarks/simulation_inputs.py [--vllm PYTHON]

Writes into `simulation_inputs.json`, next to the assumptions. With --vllm (a Python that has vLLM,
see `make vllm-cpu`) also what a call costs the process that runs the app; without, that figure
stays as it is. Processor times do not depend on other work much, those of the disk are the best of
three.
"""

from __future__ import annotations

import json
import pickle
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import random_base
from rollout import examples, through
from scaling import servers
from side_by_side import endless_base, machine, parser
from simulation import INPUTS

from marft_graph.agents import agents_of
from marft_graph.config import TrainConfig
from marft_graph.engine.vllm.engine import vllm_engine
from marft_graph.episode import Call, Episode
from marft_graph.learn.batches import token_offsets
from marft_graph.learn.credit import AgentBatch, assign_advantages
from marft_graph.learn.update import Learner
from marft_graph.policy.team import Team
from marft_graph.run.checkpoint import write_folder_atomically
from marft_graph.run.state import RunState, write_state
from marft_graph.run.trajectories import write_traces

PROMPT, ANSWER, CALLS, EPISODES = 1000, 400, 3, 256


def made_episodes() -> list[Episode]:
    """Episodes with as many tokens as the simulation assumes."""
    rng = random.Random(0)

    def call(number: int) -> Call:
        return Call(
            agent=f"agent_{number}",
            node=f"agent_{number}",
            index=number,
            parents=(number - 1,) if number else (),
            prompt_ids=tuple(rng.choices(range(150_000), k=PROMPT)),
            completion_ids=tuple(rng.choices(range(150_000), k=ANSWER)),
            logprobs=tuple(-rng.random() for _ in range(ANSWER)),
            finish_reason="stop",
            adapter_version=1,
            messages=(
                {"role": "user", "content": "four letters a token" * (PROMPT // 5)},
                {"role": "assistant", "content": "four letters a token" * (ANSWER // 5)},
            ),
        )

    return [
        Episode({}, tuple(map(call, range(CALLS))), rng.random(), example_index=number // 8)
        for number in range(EPISODES)
    ]


def processor_seconds(work: Callable[[], object], times: int = 3) -> float:
    """Least processor time of a few runs."""
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def wall_seconds(work: Callable[[], object], times: int = 3) -> float:
    """Least time of a few runs."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def of_episodes() -> dict[str, float]:
    """What episodes cost once they are there."""
    episodes = made_episodes()
    packed = pickle.dumps(episodes)
    tokens, calls = EPISODES * CALLS * (PROMPT + ANSWER), EPISODES * CALLS
    settings = TrainConfig(base_model="m", advantage="group")
    batches = {f"agent_{number}": batch_of(episodes, number) for number in range(CALLS)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traces.parquet"
        traces = processor_seconds(lambda: write_traces(path, episodes, iteration=1, phase="train"))
    credit = processor_seconds(lambda: assign_advantages(episodes, batches, settings))
    return {
        "token_bytes": len(packed) / tokens,
        "pack_token": processor_seconds(lambda: pickle.dumps(episodes)) / tokens,
        "unpack_token": processor_seconds(lambda: pickle.loads(packed)) / tokens,
        "credit_call": credit / calls,
        "trace_call": traces / calls,
    }


def batch_of(episodes: list[Episode], number: int) -> AgentBatch:
    """One agent's calls as the learner has them."""
    calls = [episode.calls[number] for episode in episodes]
    offsets = token_offsets(calls)
    empty = [torch.zeros(offsets[-1]) for _ in range(6)]
    places = [(index, number) for index in range(len(episodes))]
    return AgentBatch(calls, places, offsets, empty[0], empty[1], None, *empty[2:])


def of_files() -> dict[str, float]:
    """Seconds for each byte of adapters and of checkpoints."""
    names = [f"agent_{number}" for number in range(CALLS)]
    with random_base() as base, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = TrainConfig(
            base_model=str(base), device="cpu", advantage="group", lora_rank=256, lora_alpha=256.0
        )
        team = Team.load(agents_of(names, settings), settings)
        learner = Learner(team, settings)
        for name, optimizer in learner.optimizers.items():
            for parameter in team.parameters(name):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()

        def adapters() -> None:
            for name in names:
                team.of(name).save_adapter(name, folder / "adapters" / name)

        def checkpoint() -> None:
            write_folder_atomically(
                folder / "step_1", lambda staged: write_state(staged, team, learner, RunState())
            )

        return {
            "adapter_write": wall_seconds(adapters) / size(folder / "adapters"),
            "checkpoint_write": wall_seconds(checkpoint) / size(folder / "step_1"),
        }


def size(folder: Path) -> int:
    """Bytes in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def of_driver(python: str) -> dict[str, float]:
    """Processor time of the process that runs the app, by calls and by tokens."""
    lengths = (16, 256)
    per_call = []
    with (
        endless_base() as base,
        servers(base, python, 1) as urls,
        tempfile.TemporaryDirectory() as folder,
    ):
        settings = TrainConfig(
            base_model=str(base), device="cpu", engine="vllm", engine_urls=urls,
            engine_timeout=1200.0, engine_patience=1200.0,
        )  # fmt: skip
        agents = agents_of(("reasoner", "actor"), settings)
        engine = vllm_engine(Team.load(agents, settings), agents, settings, Path(folder))
        engine.publish(1)
        for length in lengths:
            data = [{**example, "lengths": [length] * 2} for example in examples(ragged=False)]
            through(engine, data)
            seconds = processor_seconds(lambda: through(engine, data))  # noqa: B023
            per_call.append(seconds / (2 * len(data)))
        engine.close()
    slope = (per_call[1] - per_call[0]) / (lengths[1] - lengths[0])
    return {"driver_call": per_call[0] - slope * lengths[0], "driver_token": slope}


def adapter_bytes() -> float:
    """An adapter of rank 16 on every linear layer of Qwen2.5-7B."""
    hidden, inner, keys, layers, rank = 3584, 18_944, 512, 28, 16
    shapes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    return 4.0 * layers * rank * sum(wide + high for wide, high in shapes)


def main() -> None:
    """Measure, write, and print what was measured."""
    options = parser(__doc__)
    options.add_argument("--vllm", metavar="PYTHON", help="also measure a call through vLLM")
    given = options.parse_args()
    found = {"adapter_bytes": adapter_bytes(), **of_episodes(), **of_files()}
    if given.vllm:
        found |= of_driver(given.vllm)
    stored: dict[str, Any] = json.loads(INPUTS.read_text(encoding="utf-8"))
    stored["machine"] = machine()
    for name, value in found.items():
        stored["figures"][name]["value"] = value
        print(f"{name}: {value:.3g} {stored['figures'][name]['unit']}")
    entries = [f"  {json.dumps(n)}: {json.dumps(e)}" for n, e in stored["figures"].items()]
    figures = ",\n".join(entries)
    text = f' "machine": {json.dumps(stored["machine"])},\n "figures": {{\n{figures}\n }}'
    INPUTS.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
