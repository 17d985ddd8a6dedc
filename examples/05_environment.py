"""Agents in a text environment: reset and step become a LangGraph loop that can be trained.

python examples/05_environment.py
"""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from marft_graph import FakeEngine, run_episodes, workflow_from_env, workflow_from_profiles


class Doors:
    """One of three doors is open; a step tries a door."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        """Begin: which door is open follows the seed."""
        self.open = random.Random(seed).choice(["red", "green", "blue"])
        return "Doors: red, green, blue.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Try a door."""
        is_open = action.strip() == self.open
        return f"The {action} door is shut.", float(is_open), is_open, False, {}


PROFILES = [
    {"role": "thinker", "prompt": "Think."},
    {"role": "speaker", "prompt": "Answer.", "with_answer": True},
]


def main() -> None:
    """Play with scripted answers; a `Trainer` trains the same graph with the same reward."""
    agents = {"scout": "Say which door to try.", "walker": "Name one door."}
    workflow = workflow_from_env(Doors, agents, max_steps=3)
    engine = FakeEngine({"scout": "try another", "walker": ["red", "green", "blue"]})
    episodes = run_episodes(
        workflow.graph,
        [{"seed": seed} for seed in range(4)],
        engine=engine,
        reward=workflow.reward,
        inputs=workflow.inputs,
        concurrency=1,
    )
    for episode in episodes:
        print(f"{len(episode.calls)} calls, return {episode.total_reward}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "duo.json"
        path.write_text(json.dumps(PROFILES))
        duo = workflow_from_profiles(path)
    engine = FakeEngine({"thinker": "It is a sum.", "speaker": "12"})
    print(run_episodes(duo.graph, [{"question": "7+5?"}], engine=engine)[0].state["answer"])


if __name__ == "__main__":
    main()
