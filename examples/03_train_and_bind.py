"""Train an app, measure it, and put the adapters back: the whole road in one script.

python examples/03_train_and_bind.py --iterations 40
"""

import argparse
import tempfile
from pathlib import Path

from marft_graph import Evaluation, TrainConfig, Trainer, bind
from marft_graph.workflow import load_target

WORKFLOWS = Path(__file__).parents[1] / "workflows"


def main() -> None:
    """Train math_duo, evaluate, export, bind, and ask the bound app a question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=40)
    iterations = parser.parse_args().iterations

    workflow = load_target(str(WORKFLOWS / "math_duo"))
    assert workflow.load_data is not None
    assert workflow.reward is not None
    train, held_out = workflow.load_data()
    config = TrainConfig(
        base_model=str(WORKFLOWS / "tiny_base"),
        iterations=iterations,
        learning_rate=5e-4,
        advantage="group",
        max_new_tokens=24,
        eval_examples=64,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            workflow.graph,
            train_dataset=train,
            eval_dataset=held_out,
            reward=workflow.reward,
            config=config,
            run_dir=Path(folder) / "run",
        )
        with trainer:
            trainer.train()
            evaluation: Evaluation = trainer.evaluate(greedy=True)
            print(f"greedy return on {evaluation.episodes} problems: {evaluation.return_mean:.2f}")
            adapters = trainer.export(Path(folder) / "adapters")
        app = bind(workflow.graph, adapters)
        print(app.invoke({"question": "Ann has 7 figs and buys 5. How many?"}))


if __name__ == "__main__":
    main()
