"""Run an app with scripted answers: test a reward without any model.

python examples/02_dry_run.py
"""

from pathlib import Path
from typing import Any

from marft_graph import Call, Episode, FakeEngine, Reward, run_episodes
from marft_graph.workflow import load_target

WORKFLOW = load_target(str(Path(__file__).parents[1] / "workflows" / "math_duo"))
EXAMPLES = [{"question": "Ann has 7 figs and buys 5. How many?", "answer": "12"}]


def reward(example: dict[str, Any], state: dict[str, Any]) -> Reward:
    """The team is paid for the right answer, the reasoner for a short plan."""
    correct = float(state["answer"] == example["answer"])
    return Reward(outcome=correct, nodes={"reasoner": -0.01 * len(state["plan"])})


def main() -> None:
    """Play the example four times; the actor is right every other time."""
    engine = FakeEngine({"reasoner": "7+5", "actor": ["12", "75"]})
    episodes: list[Episode] = run_episodes(
        WORKFLOW.graph, EXAMPLES, engine=engine, reward=reward, group_size=4
    )
    for episode in episodes:
        print(f"{episode.status}: outcome {episode.outcome_reward}")
        calls: tuple[Call, ...] = episode.calls
        for call in calls:
            answer = call.messages[-1]["content"]
            print(f"  {call.node} after calls {call.parents}: {answer!r}, reward {call.reward}")


if __name__ == "__main__":
    main()
