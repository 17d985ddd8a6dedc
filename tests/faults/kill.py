"""kill -9 at random instants of small runs: each, resumed, must end as if nothing had happened.

    python -m tests.faults.kill --times 100

Every run is a process of its own, forked from this one, which has imported everything and started
no thread. Every other run is killed at a random time, the others at a random change of a file in
the run folder, half of these in its checkpoints, so that many die while one is written. Some are
killed again while they resume. Prints what it did; exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # forked processes need one thread

import torch

from marft_graph import TrainConfig, Trainer
from marft_graph.run.checkpoint import verify
from marft_graph.run.tracking import read_evaluations, read_metrics
from marft_graph.run.trajectories import read_traces
from tests.apps import duo
from tests.support import save_random_model
from tests.training import EXAMPLES, reward

LIMIT_SECONDS = 400.0
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def settings(model: Path) -> TrainConfig:
    return TrainConfig(
        base_model=str(model),
        iterations=3,
        examples_per_iteration=2,
        group_size=2,
        max_new_tokens=4,
        learning_rate=1e-3,
        lora_rank=4,
        eval_every=2,
        eval_examples=2,
        checkpoint_every=1,
        keep_checkpoints=2,
        update_order="alternating",
        device="cpu",
    )


def train(model: Path, run: Path, *, die: int | None = None) -> None:
    """Begin or continue the run, whichever it needs; `die` is the change of a file that kills."""
    if die is not None:
        die_at(die, run)
    with Trainer(
        duo(),
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES[:2],
        reward=reward,
        config=settings(model),
        run_dir=run,
        resume=(run / "config.yaml").exists(),
    ) as trainer:
        trainer.train(progress=False)


def on_change(run: Path, do: Callable[[str], None]) -> None:
    """Call a function right before each change of a file in a folder, with the file's path."""

    def audit(event: str, args: tuple[Any, ...]) -> None:
        is_change = event in _CHANGES or (event == "open" and int(args[2]) & _WRITES)
        if is_change and isinstance(args[0], str | os.PathLike) and str(run) in str(args[0]):
            do(str(args[0]))

    sys.addaudithook(audit)


def die_at(change: int, run: Path) -> None:
    """Kill this process with SIGKILL right before that change of a file in its run folder."""
    seen: list[str] = []

    def count(path: str) -> None:
        seen.append(path)
        if len(seen) > change:
            os.kill(os.getpid(), signal.SIGKILL)

    on_change(run, count)


def forked(work: Callable[[], None], log: Path) -> int:
    """The id of a process that does the work and ends with 0, or with 1 where it raised."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a", buffering=1) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            work()
            code = 0
    except BaseException:  # noqa: BLE001 - reported by the exit code and the log
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, after: float = LIMIT_SECONDS) -> int:
    """Exit status of a process, which is killed after so many seconds; -9 for one that was."""
    deadline = time.monotonic() + after
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            deadline += LIMIT_SECONDS
        time.sleep(0.001)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return value


def outcome(run: Path) -> dict[str, Any]:
    """All that must be the same: weights, optimizers, state, metrics and the data's order."""
    steps = sorted((run / "checkpoints").iterdir(), key=lambda path: path.name)
    files = {
        f"{step.name}/{path.relative_to(step)}": path.read_bytes()
        for step in steps
        for path in step.rglob("*")
        if path.is_file() and path.suffix != ".md"
    }
    exported = {
        f"export/{path.relative_to(run / 'export')}": path.read_bytes()
        for path in (run / "export").rglob("*.safetensors")
    }
    order = {
        path.name: [
            (episode.example, episode.seed, [call.completion_ids for call in episode.calls])
            for episode in read_traces(path)
        ]
        for path in sorted((run / "traces").iterdir())
    }
    return {
        **files,
        **exported,
        "metrics": [without_times(row) for row in read_metrics(run)],
        "evaluations": read_evaluations(run),
        "data order": order,
    }


def problems(run: Path, expected: dict[str, Any]) -> list[str]:
    """What differs from the uninterrupted run, and what was left behind."""
    found = [str(p.relative_to(run)) for p in run.rglob("*") if p.suffix in (".tmp", ".old")]
    found += [str(p.relative_to(run)) for p in run.rglob("*.deleted")]
    for step in (run / "checkpoints").iterdir():
        verify(step)
    got = outcome(run)
    return found + [name for name in {**expected, **got} if expected.get(name) != got.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=None, help="of the instants; default: by time")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time())
    rng = random.Random(seed)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="marft-faults-"))
    model = folder / "model"
    if sys.platform == "linux" and len(os.listdir("/proc/self/task")) != 1:
        print("there is a thread beside this one; a forked process may then hang")
        return 1
    ended(forked(lambda: save_random_model(model) and None, folder / "model.log"))
    whole, changed = folder / "whole", folder / "changed.json"

    def uninterrupted() -> None:
        paths: list[str] = []
        on_change(whole, paths.append)
        train(model, whole)
        changed.write_text(json.dumps(paths))

    started = time.monotonic()
    if ended(forked(uninterrupted, folder / "whole.log")) != 0:
        print((folder / "whole.log").read_text())
        return 1
    seconds = time.monotonic() - started
    paths, expected = json.loads(changed.read_text()), outcome(whole)
    in_checkpoints = [at for at, path in enumerate(paths) if "checkpoints" in path]
    print(
        f"seed {seed}; a whole run takes {seconds:.1f} s and changes files {len(paths)} times, "
        f"{len(in_checkpoints)} times in checkpoints"
    )
    tally: Counter[str] = Counter()
    for number in range(options.times):
        run, log = folder / f"run_{number}", folder / f"run_{number}.log"
        for _ in range(1 + (rng.random() < 0.25)):
            if number % 2:
                at = rng.choice(in_checkpoints if number % 4 == 1 else range(len(paths)))
                status = ended(forked(partial(train, model, run, die=at), log))
            else:
                status = ended(forked(partial(train, model, run), log), rng.random() * seconds)
            tally["killed" if status == -signal.SIGKILL else "had ended before"] += 1
            beside = list((run / "checkpoints").glob("*.*")) if run.exists() else []
            tally["of these inside the writing or deleting of a checkpoint"] += bool(beside)
        status = ended(forked(partial(train, model, run), log))
        wrong = problems(run, expected) if status == 0 else [f"exit status {status}"]
        if wrong:
            tally["BROKEN"] += 1
            print(f"run {number}: {', '.join(wrong)}; see {log}")
            continue
        tally["bit-identical after resuming"] += 1
        shutil.rmtree(run)
    for what, times in tally.items():
        print(f"{times:4}  {what}")
    if not tally["BROKEN"]:
        shutil.rmtree(folder)
    return 1 if tally["BROKEN"] else 0


if __name__ == "__main__":
    sys.exit(main())
