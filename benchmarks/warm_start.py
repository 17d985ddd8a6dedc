"""Does a teacher help? RL alone against warm start and RL, at equal numbers of episodes.

    python benchmarks/warm_start.py --out runs/warm_start

A scripted teacher plays workflows/supervisor as an API model would; its calls are recorded with
`run_episodes(engine=None)`, as `marft-graph trace` does. The student imitates them, and is then
trained with fewer iterations than RL alone gets: the teacher's episodes count as episodes.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from marft_graph import TrainConfig, Trainer, run_episodes
from marft_graph.workflow import load_module, load_target

WORKFLOW = Path(__file__).parents[1] / "workflows" / "supervisor"


class Teacher(BaseChatModel):
    """Does each role of the supervisor workflow as it ought to be done."""

    @property
    def _llm_type(self) -> str:
        return "teacher"

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        answer = AIMessage(reply(messages[0].text, messages[-1].text))
        return ChatResult(generations=[ChatGeneration(message=answer)])


def reply(role: str, task: str) -> str:
    r"""What is right to say.

    >>> reply("Who is next?", "Ann has 7 figs and buys 5. How many?\nDone: reasoner")
    'actor'
    >>> reply("Write the calculation.", "Of 9 figs Ann hides 3. How many are left?")
    '9-3'
    """
    question, _, more = task.partition("\n")
    if role == "Who is next?":
        return {"nothing": "reasoner", "reasoner": "actor"}.get(
            more.removeprefix("Done: "), "FINISH"
        )
    a, b = re.findall(r"\d+", question)[:2]
    is_difference = re.search("sells|lost|hides", question)
    if role == "Write the calculation.":
        return f"{a}{'-' if is_difference else '+'}{b}"
    return str(int(a) - int(b) if is_difference else int(a) + int(b))


def main() -> None:
    """Both ways for some seeds; prints and writes the returns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=12, help="of RL alone")
    parser.add_argument("--teacher", type=int, default=128, help="episodes of the teacher")
    parser.add_argument("--seeds", type=int, default=5, help="so many, from --first-seed")
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    results = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for is_warm in (False, True):
            results.append(measure(args.out, seed, args.iterations, args.teacher if is_warm else 0))
            print(json.dumps(results[-1]), flush=True)
    (args.out / "warm_start.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


def measure(out: Path, seed: int, iterations: int, teacher: int) -> dict[str, Any]:
    """Held-out returns of one training; `teacher` episodes replace as many of its own."""
    target = load_target(str(WORKFLOW))
    assert target.load_data is not None
    assert target.reward is not None
    train, held_out = target.load_data()
    settings = {k: v for k, v in target.settings.items() if k != "dataset"}
    config = TrainConfig.from_mapping(
        settings | {"iterations": iterations, "seed": seed, "eval_every": 0, "device": "cpu"}
    )
    config = config.replace(iterations=iterations - teacher // config.episodes_per_iteration)
    run = out / f"{'warm' if teacher else 'alone'}_{seed}"
    with Trainer(
        target.graph,
        train_dataset=train,
        eval_dataset=held_out,
        reward=target.reward,
        config=config,
        run_dir=run,
        overwrite=run.exists(),
    ) as trainer:
        base = trainer.evaluate()
        if teacher:
            app: Any = load_module(WORKFLOW / "graph.py")
            app.model = Teacher()
            shown = [train[i] for i in range(teacher)]
            trainer.warm_start(run_episodes(app.graph, shown, engine=None, reward=target.reward))
        result = trainer.train(progress=False)
    assert result.before is not None
    assert result.after is not None
    return {
        "way": "warm start, then RL" if teacher else "RL alone",
        "seed": seed,
        "episodes": teacher + config.iterations * config.episodes_per_iteration,
        "base": round(base.return_mean, 3),
        "before RL": round(result.before.return_mean, 3),
        "after": round(result.after.return_mean, 3),
    }


if __name__ == "__main__":
    main()
