"""A long training run, in which half of the faults of `soak` occur; prints its use of the machine.

    python -m tests.faults.soak_training --iterations 60

Trains a tiny model on an app whose nodes fail, hang and run past their deadline in some episodes of
every iteration, with evaluations and checkpoints on the way, and prints threads, open handles and
resident memory after each iteration as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from marft_graph import TrainConfig, Trainer
from marft_graph.run.tracking import MetricsLog
from tests.faults.soak import app, measured
from tests.faults.soak import reward as failing_reward
from tests.support import save_random_model

KINDS = ["none", "node", "none", "reward", "none", "deadline", "none", "hung"]


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return failing_reward(example, state) + len(state["answer"]) % 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--timeout", type=float, default=3.0, help="of an episode, in seconds")
    options = parser.parse_args()
    release = threading.Event()
    rows: list[Mapping[str, Any]] = []
    measures: list[dict[str, float]] = []
    write = MetricsLog.write

    def measuring(self: MetricsLog, row: Mapping[str, Any]) -> None:
        write(self, row)
        rows.append({name: row[name] for name in ("episodes", "episodes_failed", "threads_hung")})
        release.set()  # what hangs would hang for ever: let it go, as the app's own deadline would
        measures.append(measured())
        release.clear()

    MetricsLog.write = measuring  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="marft-soak-") as place:
        settings = TrainConfig(
            base_model=str(save_random_model(Path(place) / "model")),
            iterations=options.iterations,
            examples_per_iteration=len(KINDS),
            group_size=2,
            max_new_tokens=8,
            learning_rate=1e-3,
            lora_rank=4,
            nodes=("worker",),
            advantage="gae",
            eval_every=5,
            eval_examples=4,
            checkpoint_every=2,
            keep_checkpoints=2,
            episode_timeout=options.timeout,
            reward_errors="drop",
            max_failed_share=0.9,
            device="cpu",
        )
        with Trainer(
            app(release),
            train_dataset=[{"kind": kind} for kind in KINDS],
            eval_dataset=[{"kind": "none"}] * 4,
            reward=reward,
            config=settings,
            run_dir=Path(place) / "run",
        ) as trainer:
            trainer.train(progress=False)
            release.set()
    json.dump({"rows": rows, "measures": measures}, sys.stdout)


if __name__ == "__main__":
    main()
