"""How fast does each method learn each workflow, and how reliably? Many short training runs.

    python benchmarks/learning.py --out runs/learning [--compare] [--publish]

Every run is one training as `marft-graph train` makes it, with evaluations on held-out examples on
the way. The folder gets all figures as learning.json, a Markdown table and a plot; a benchmark that
was interrupted continues there, and what is finished is read, not repeated. Runs share the
machine's cores, one thread each; seconds are those of rollouts and updates, not of evaluations.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import PrivateAttr

from marft_graph import TrainConfig, Trainer
from marft_graph.agents import agents_of
from marft_graph.engine.base import GenerationRequest, SamplingSettings
from marft_graph.engine.local import LocalEngine
from marft_graph.policy.adapters import Policy
from marft_graph.run.checkpoint import latest_checkpoint
from marft_graph.run.tracking import read_evaluations, read_metrics
from marft_graph.workflow import load_module, load_target

ROOT = Path(__file__).parents[1]
WORKFLOWS = (
    *("math_duo", "math_trio", "debate", "router"),
    *("supervisor", "tool_agent", "code_duo"),
)
GOAL = 0.85
SEEDS = range(10, 15)
"""Settings were chosen with seeds below 10."""
EVAL_EVERY = {
    "math_duo": 5,
    "math_trio": 4,
    "debate": 3,
    "router": 2,
    "supervisor": 5,
    "tool_agent": 4,
    "code_duo": 4,
}
"""Iterations between evaluations."""
METHODS: dict[str, dict[str, Any]] = {
    "group": {},
    "MARFT-A": {"advantage": "gae", "level": "action", "action_logprob": "sum"},
    "MARFT-T": {"advantage": "gae", "level": "token"},
    "reasoner-alone": {"nodes": ["reasoner"]},
    "actor-alone": {"nodes": ["actor"]},
    "shared-adapter": {
        "per_node": {"reasoner": {"adapter": "shared"}, "actor": {"adapter": "shared"}}
    },
}
"""What each method changes in a workflow's own settings; group is those settings."""
OWN = "the workflow's own settings (`advantage: group`)"
COMMAND = "make benchmark-learning LEARNING_ARGS=--publish"
COMPARED = ("group", "reasoner-alone", "actor-alone", "shared-adapter")
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#dc2626")


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """One training: a workflow, a method and a seed."""

    workflow: str
    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where the run is written."""
        return out / self.workflow / self.method / f"seed_{self.seed}"

    def settings(self, iterations: int | None) -> dict[str, Any]:
        """The workflow's own settings, the method's, and those of the benchmark."""
        own = {k: v for k, v in load_target(str(self._path)).settings.items() if k != "dataset"}
        measured = {"eval_every": EVAL_EVERY[self.workflow], "seed": self.seed}
        if iterations is not None:
            measured["iterations"] = iterations
        return own | METHODS[self.method] | measured

    def graph(self, base_model: str) -> Any:
        """The app; where one agent is trained alone, the other's own model is the base."""
        if not METHODS[self.method].get("nodes"):
            return load_target(str(self._path)).graph
        module: Any = load_module(self._path / "graph.py")
        module.model = BaseAnswers(base_model)
        return module.graph

    @property
    def _path(self) -> Path:
        return ROOT / "workflows" / self.workflow


class BaseAnswers(BaseChatModel):
    """A chat model that is the untrained base, sampled at temperature 1.

    An agent that is not trained is answered by the model that the app has for it.
    """

    _engine: LocalEngine = PrivateAttr()
    _seeds: Any = PrivateAttr(default_factory=itertools.count)

    def __init__(self, base_model: str) -> None:
        super().__init__()
        unused = agents_of(["unused"], TrainConfig(base_model=base_model))
        self._engine = LocalEngine(Policy.load(base_model, unused, device="cpu"))

    @property
    def _llm_type(self) -> str:
        return "base"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        codec = self._engine.codec(None)
        request = GenerationRequest(
            agent=None,
            prompt_ids=codec.render(messages),
            sampling=SamplingSettings(stop=tuple(stop or ())),
            seed=next(self._seeds),
        )
        answer = codec.parse(self._engine.submit(request).result().ids, stop=request.sampling.stop)
        return ChatResult(generations=[ChatGeneration(message=answer)])


def measure(run: Run, out: Path, iterations: int | None) -> dict[str, Any]:
    """The figures of a run, which is made or continued unless it was finished before.

    Raises:
        SystemExit: the folder holds the run with other settings.
    """
    path = run.folder(out) / "result.json"
    settings = run.settings(iterations)
    base_model = settings.pop("base_model")
    unrecorded = {"base_model": base_model, "checkpoint_every": settings["eval_every"]}
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            return known
        longer = settings["iterations"] > known["settings"]["iterations"]
        if not longer or known["settings"] | {"iterations": settings["iterations"]} != settings:
            raise SystemExit(f"{path} has other settings: remove it or take another --out")
    run_dir = run.folder(out) / "run"
    resume = run_dir.is_dir() and latest_checkpoint(run_dir) is not None
    torch.set_num_threads(1)
    target = load_target(str(ROOT / "workflows" / run.workflow))
    assert target.load_data is not None  # the workflows are ours
    assert target.reward is not None
    train_data, held_out = target.load_data()
    with Trainer(
        run.graph(base_model),
        train_dataset=train_data,
        eval_dataset=held_out,
        reward=target.reward,
        inputs=target.inputs,
        config=TrainConfig.from_mapping(settings | unrecorded),
        run_dir=run_dir,
        resume=resume,
        overwrite=not resume,  # what was interrupted before its first checkpoint
    ) as trainer:
        trainer.train(progress=False)
    result = dataclasses.asdict(run) | {
        "settings": settings,
        "evaluations": evaluations(run_dir),
    }
    staging = path.with_suffix(".writing")
    staging.write_text(json.dumps(result), encoding="utf-8")
    staging.replace(path)
    return result


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Held-out returns of a run, each with the episodes and seconds of training before it."""
    episodes, seconds = {0: 0}, {0: 0.0}
    for row in read_metrics(run_dir):
        now, before = row["iteration"], row["iteration"] - 1
        episodes[now] = episodes[before] + row["episodes"]
        waited = row.get("seconds_waited", row["seconds_rollout"])
        seconds[now] = seconds[before] + waited + row["seconds_update"]
    return [
        {
            "iteration": row["iteration"],
            "episodes": episodes[row["iteration"]],
            "seconds": round(seconds[row["iteration"]], 2),
            "return": row["eval_return"],
            "return_greedy": row.get("eval_return_greedy"),
        }
        for row in read_evaluations(run_dir)
    ]


def grouped(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Results by workflow and method, in the order in which those are listed above."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for workflow, method in itertools.product(WORKFLOWS, METHODS):
        own = [r for r in results if (r["workflow"], r["method"]) == (workflow, method)]
        if own:
            groups[workflow, method] = sorted(own, key=lambda result: int(result["seed"]))
    return groups


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a line for each workflow and method."""
    lines = [
        "| Workflow | Method | Seeds | Base, sampled (greedy) | Final, mean (min to max) "
        f"| Final, greedy | Reach {GOAL} | Episodes to {GOAL} | Seconds to {GOAL} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (workflow, method), runs in grouped(results).items():
        rows = [run["evaluations"] for run in runs]
        final = [row[-1]["return"] for row in rows]
        firsts = [next((e for e in row if e["return"] >= GOAL), None) for row in rows]
        reached = [first for first in firsts if first is not None]
        cells = [
            workflow,
            method,
            f"{len(runs)}",
            f"{mean(row[0]['return'] for row in rows):.2f} "
            f"({mean(row[0]['return_greedy'] for row in rows):.2f})",
            f"{mean(final):.2f} ({min(final):.2f} to {max(final):.2f})",
            f"{mean(row[-1]['return_greedy'] for row in rows):.2f}",
            f"{len(reached)} of {len(runs)}",
            f"{mean(first['episodes'] for first in reached):.0f}" if reached else "-",
            f"{mean(first['seconds'] for first in reached):.0f}" if reached else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: Iterable[float]) -> float:
    """The mean of some numbers."""
    return statistics.fmean(values)


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out return over episodes and over seconds: mean over seeds, band from min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = grouped(results)
    workflows = list(dict.fromkeys(workflow for workflow, _ in groups))
    figure, axes = plt.subplots(
        2, len(workflows), figsize=(3.4 * len(workflows), 5.8), dpi=130, sharey=True, squeeze=False
    )
    colour = dict(zip(METHODS, COLOURS, strict=True))
    for (workflow, method), runs in groups.items():
        column = workflows.index(workflow)
        for row, unit in enumerate(("episodes", "seconds")):
            # At one iteration all seeds have as many episodes; seconds are those of the mean seed.
            points = list(zip(*(run["evaluations"] for run in runs), strict=True))
            xs = [mean(e[unit] for e in point) for point in points]
            ys = [[e["return"] for e in point] for point in points]
            at = axes[row][column]
            at.plot(xs, [mean(y) for y in ys], color=colour[method], lw=2, label=method)
            at.fill_between(
                xs, [min(y) for y in ys], [max(y) for y in ys], color=colour[method], alpha=0.15
            )
            at.axhline(GOAL, color="#6b7280", lw=0.8, ls=":")
            at.set(xlabel=f"{unit} of training", ylim=(0, 1.02))
            at.grid(alpha=0.25)
            if row == 0:
                at.set_title(workflow)
            if column == 0:
                at.set_ylabel("held-out return")
    shown: dict[str, Any] = {}
    for at in axes.flat:
        at.set_xlim(left=0)  # not before: it would keep the right end where it then is
        shown |= dict(zip(*reversed(at.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=len(shown), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)
    plt.close(figure)


def wanted(options: argparse.Namespace) -> list[Run]:
    """The runs that were asked for, the first seeds of everything first."""
    pairs = list(itertools.product(options.workflows, options.methods))
    if options.compare:
        pairs = [("math_duo", method) for method in COMPARED]
    return [Run(*pair, seed) for seed in SEEDS[: options.seeds] for pair in pairs]


def main() -> None:
    """Make the runs that are missing; write what is there as JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and figures")
    parser.add_argument("--workflows", nargs="+", default=WORKFLOWS, choices=WORKFLOWS)
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS)[:3], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"so many, from {SEEDS[0]}")
    parser.add_argument("--iterations", type=int, help="of every run (default: of its workflow)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="on math_duo: joint training, one agent alone, and one adapter for both",
    )
    parser.add_argument(
        "--publish", action="store_true", help="copy the figures of all finished runs into docs/"
    )
    options = parser.parse_args()
    runs = wanted(options)
    # Spawned: a fork would share torch's threads and random state.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(measure, run, options.out, options.iterations): run for run in runs}
        for number, future in enumerate(as_completed(futures), 1):
            run, last = futures[future], future.result()["evaluations"][-1]
            print(
                f"{number}/{len(runs)}  {run.workflow} {run.method} seed {run.seed}: "
                f"{last['return']:.3f} after {last['seconds']:.0f} s",
                flush=True,
            )
    write(options.out, publish=options.publish)


def write(out: Path, *, publish: bool) -> None:
    """Figures of every finished run in a folder."""
    paths = sorted(out.glob("*/*/seed_*/result.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    print(table(results))
    places = [(out, out / "learning.png")]
    if publish:
        docs = ROOT / "docs"
        places.append((docs / "benchmarks", docs / "images" / "learning_benchmark.png"))
    for folder, picture in places:
        folder.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(result) for result in results)
        (folder / "learning.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        plot(results, picture)
        (folder / "learning.md").write_text(page(results, picture, folder), encoding="utf-8")


def page(results: Sequence[Mapping[str, Any]], picture: Path, folder: Path) -> str:
    """The table and the plot with what is needed to read and to repeat them, as Markdown."""
    image = os.path.relpath(picture, folder)
    methods = [
        f"- `{method}`: " + (", ".join(f"`{k}: {v}`" for k, v in METHODS[method].items()) or OWN)
        for method in METHODS
        if any(result["method"] == method for result in results)
    ]
    lengths = ", ".join(
        f"{Run(name, 'group', 0).settings(None)['iterations']} on {name} (evaluated every {every})"
        for name, every in EVAL_EVERY.items()
    )
    groups = grouped(results)
    counts = {
        pair: len(groups.get(pair, ())) for pair in itertools.product(WORKFLOWS, tuple(METHODS)[:3])
    }
    tried = sorted({(r["workflow"], r["seed"]) for r in results if r["seed"] < SEEDS[0]})
    lacking = [
        f"{w} {m} ({n} of {len(SEEDS)} seeds)" for (w, m), n in counts.items() if n < len(SEEDS)
    ]
    return f"""# How fast each method learns each workflow

Made by `{COMMAND}`; all figures are in [learning.json](learning.json).

{table(results)}

![Held-out return over episodes and over seconds of training]({image})

The lines are means over seeds, the bands reach from the worst seed to the best. A run has the
settings of the workflow's `config.yaml`, which were chosen with other seeds, except that math_trio
got its falling learning rate after a run with seed 10 had lost some of its return at the end.

Iterations: {lengths}. What a method changes:

{chr(10).join(methods)}

Seconds are those of rollouts and updates, each run on one thread; where other work shares the
machine they are an upper bound. Episodes and seconds to {GOAL} are means over the seeds that
reached it in an evaluation.

Runs with a seed that settings were tried with: {_listed(tried)}.

Incomplete: {", ".join(lacking) or "nothing"}.
"""


def _listed(runs: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{workflow} (seed {seed})" for workflow, seed in runs) or "none"


if __name__ == "__main__":
    main()
