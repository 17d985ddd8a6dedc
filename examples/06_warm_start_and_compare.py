"""Learn from what a better model said, then compare with the untrained base on held-out examples.

python examples/06_warm_start_and_compare.py
"""

import tempfile
from pathlib import Path

from marft_graph import Trainer, compare
from marft_graph.workflow import load_target

WORKFLOWS = Path(__file__).parents[1] / "workflows"
REASONER, ACTOR = "Write the calculation.", "Answer with a number."


def said(node: str, system: str, user: str, answer: str) -> dict[str, object]:
    """A recorded answer; `marft-graph trace` writes such rows for your own app."""
    texts = {"system": system, "user": user, "assistant": answer}
    return {"node": node, "messages": [{"role": r, "content": t} for r, t in texts.items()]}


def main() -> None:
    """Warm start math_duo with a teacher's answers, and say whether it got better."""
    duo = load_target(str(WORKFLOWS / "math_duo"))
    assert duo.load_data is not None
    assert duo.reward is not None
    train, held_out = duo.load_data()
    teacher = []
    for a, b in [(a, b) for a in range(1, 13) for b in range(1, 13, 4)]:
        question = f"Ann has {a} figs and buys {b}. How many?"
        teacher.append(said("reasoner", REASONER, question, f"{a}+{b}"))
        teacher.append(said("actor", ACTOR, f"{question}\n{a}+{b}", str(a + b)))
    settings = {k: v for k, v in duo.settings.items() if k != "dataset"}
    config = {**settings, "eval_examples": 24}
    with (
        tempfile.TemporaryDirectory() as folder,
        Trainer(
            duo.graph,
            train_dataset=train,
            reward=duo.reward,
            config=config,
            run_dir=Path(folder) / "run",
        ) as trainer,
    ):
        trainer.warm_start(teacher, epochs=3, batch_size=4)
        student = trainer.export(Path(folder) / "student")
        found = compare(
            duo.graph,
            {"base": "base", "student": student},
            held_out,
            reward=duo.reward,
            config=trainer.config,
        )
    for policy in found.policies:
        print(f"{policy.name}: {policy.evaluation.return_mean:.2f}")
    print(f"the student is: {found.differences['student'].verdict}")


if __name__ == "__main__":
    main()
