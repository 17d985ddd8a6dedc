"""Time of an iteration whose episodes wait for the outside, with and without rollouts ahead.

The duo of math_duo with a tool between its nodes that takes a while, as a search or an API does.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from side_by_side import endless_base, in_turn, parser, publish

from marft_graph import TrainConfig, Trainer
from marft_graph.run.tracking import read_metrics

EXAMPLES = [{"question": f"What is {n} plus {7 * n % 40}?"} for n in range(64)]


class State(TypedDict, total=False):
    """What the nodes write."""

    question: str
    plan: str
    answer: str


def app(wait: float) -> Any:
    """Two nodes that call a model, and one between them that waits."""
    model = ChatOpenAI(model="any", api_key="not-used")

    async def reasoner(state: State) -> State:
        return {"plan": (await model.ainvoke([HumanMessage(state["question"])])).text}

    async def tool(state: State) -> State:
        await asyncio.sleep(wait)
        return {}

    async def actor(state: State) -> State:
        prompt = f"{state['question']} {state['plan']}"
        return {"answer": (await model.ainvoke([HumanMessage(prompt)])).text}

    builder = StateGraph(State)
    for name, node in (("reasoner", reasoner), ("tool", tool), ("actor", actor)):
        builder.add_node(name, node)
    for before, after in ((START, "reasoner"), ("reasoner", "tool"), ("tool", "actor")):
        builder.add_edge(before, after)
    builder.add_edge("actor", END)
    return builder.compile()


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """Something that differs from episode to episode."""
    return sum(char < "k" for char in state["answer"]) / 10


def train(base: Path, wait: float, iterations: int, staleness: int) -> list[dict[str, float]]:
    """The seconds of each iteration of a run."""
    settings = TrainConfig(
        base_model=str(base),
        iterations=iterations,
        staleness=staleness,
        importance_cap=2.0,  # in both, so that updates do the same work
        examples_per_iteration=8,
        group_size=8,
        max_new_tokens=24,
        advantage="group",
        epochs=2,
        eval_every=0,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        options = {"train_dataset": EXAMPLES, "reward": reward, "config": settings}
        with Trainer(app(wait), **options, run_dir=Path(folder) / "run") as trainer:
            trainer.train(progress=False)
            return read_metrics(trainer.run_dir)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--wait", type=float, default=2.0, help="seconds that the tool takes")
    options.add_argument("--iterations", type=int, default=6, help="iterations of each run")
    given = options.parse_args()
    rows: dict[int, list[dict[str, float]]] = {}
    with endless_base() as base:

        def run(staleness: int) -> None:
            # The first iterations fill the pipeline.
            rows.setdefault(staleness, []).extend(
                train(base, given.wait, given.iterations, staleness)[1 + staleness :]
            )

        works = {f"staleness {s}": lambda s=s: run(s) for s in (0, 1, 2)}
        in_turn(works, given.rounds, warm_up=False)
    whole = {
        s: [row["seconds_waited"] + row["seconds_update"] for row in own] for s, own in rows.items()
    }
    publish(
        [
            {
                "staleness": s,
                "rollout s": statistics.median(row["seconds_rollout"] for row in own),
                "waited s": statistics.median(row["seconds_waited"] for row in own),
                "update s": statistics.median(row["seconds_update"] for row in own),
                "iteration s": statistics.median(whole[s]),
                "times as fast": statistics.median(whole[0]) / statistics.median(whole[s]),
            }
            for s, own in rows.items()
        ],
        given.json,
    )


if __name__ == "__main__":
    main()
