"""Does the demo learn, whatever the seed? Trains a workflow with several seeds, one after another.

    python benchmarks/seeds.py --out runs/seeds [--seeds 5] [--plot docs/images/learning_curve.png]

Prints a Markdown table: held-out return before and after, sampled and greedy, and seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from marft_graph import TrainConfig, Trainer
from marft_graph.run.curves import plot_learning_curves
from marft_graph.workflow import load_target

WORKFLOW = Path(__file__).parents[1] / "workflows" / "math_duo"
COLUMNS = (
    "Seed",
    "Before, sampled",
    "Before, greedy",
    "After, sampled",
    "After, greedy",
    "Seconds",
)


def train(workflow: str, seed: int, run_dir: Path) -> list[float]:
    """One run as `marft-graph train` makes it; the four returns and the seconds of training."""
    target = load_target(workflow)
    if target.load_data is None or target.reward is None:
        raise SystemExit(f"{workflow} is no workflow folder with a task.py")
    settings = {k: v for k, v in target.settings.items() if k != "dataset"}
    train_data, held_out = target.load_data()
    with Trainer(
        target.graph,
        train_dataset=train_data,
        eval_dataset=held_out,
        reward=target.reward,
        inputs=target.inputs,
        config=TrainConfig.from_mapping(settings | {"seed": seed}),
        run_dir=run_dir,
    ) as trainer:
        started = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - started
    measured = (result.before, result.before_greedy, result.after, result.after_greedy)
    return [*(evaluation.return_mean for evaluation in measured if evaluation), seconds]


def main() -> None:
    """Train with seeds 0, 1, ...; print the table; draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workflow", default=str(WORKFLOW))
    parser.add_argument("--out", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="write the learning curves to this PNG")
    options = parser.parse_args()
    runs = [options.out / f"seed_{seed}" for seed in range(options.seeds)]
    rows = [train(options.workflow, seed, run) for seed, run in enumerate(runs)]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for seed, row in enumerate(rows):
        print(f"| {seed} | {' | '.join(f'{value:.3f}' for value in row[:4])} | {row[4]:.0f} |")
    columns = list(zip(*rows, strict=True))
    means = [f"{statistics.fmean(column):.3f}" for column in columns[:4]]
    spreads = [f"{statistics.pstdev(column):.3f}" for column in columns[:4]]
    cells = [f"{mean} ± {spread}" for mean, spread in zip(means, spreads, strict=True)]
    print(f"| mean ± deviation | {' | '.join(cells)} | {statistics.fmean(columns[4]):.0f} |")
    if options.plot is not None:
        print(f"wrote {plot_learning_curves(runs, options.plot)}")


if __name__ == "__main__":
    main()
