"""Environments and profiles become apps: loops until done, an environment for every episode."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from marft_graph import FakeEngine, Trainer, compile_graph, run_episodes
from marft_graph.environments import workflow_from_env, workflow_from_profiles
from marft_graph.errors import ConfigError, GraphError
from tests.training import config

AGENTS = {"scout": "Look.", "guesser": "Guess."}


class Guess:
    """Gymnasium's form: guess a number from 0 to 9, told whether it is higher or lower."""

    made = 0

    def __init__(self) -> None:
        Guess.made += 1
        self.tries = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self.number = random.Random(seed).randrange(10)
        return f"guess, {(options or {}).get('hint', 'no hint')}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.tries += 1
        guess = int(action)
        word = "lower" if guess > self.number else "higher"
        is_right = guess == self.number
        return word, 1.0 if is_right else -0.1, is_right, False, {}


def test_an_episode_goes_round_until_the_environment_is_done() -> None:
    workflow = workflow_from_env(Guess, AGENTS, max_steps=30)
    number = random.Random(4).randrange(10)
    turns = iter(range(10))

    def answer(agent: str, messages: Any) -> str:
        return "go on" if agent == "scout" else str(next(turns))

    engine = FakeEngine(answer)
    (episode,) = run_episodes(
        workflow.graph,
        [{"seed": 4, "hint": "small"}],
        engine=engine,
        reward=workflow.reward,
        inputs=workflow.inputs,
    )
    engine.close()
    assert episode.ok, episode.error
    assert [call.node for call in episode.calls] == ["scout", "guesser"] * (number + 1)
    assert episode.total_reward == pytest.approx(1.0 - 0.1 * number)
    assert episode.calls[0].messages[1]["content"] == "guess, small"
    assert episode.calls[1].messages[1]["content"] == "guess, small\nscout: go on"
    assert episode.calls[2].messages[1]["content"] == "higher"
    # A turn's scout sees what the last turn's guess led to.
    assert 1 in episode.calls[2].parents


def test_the_agents_are_compiled_in_their_order() -> None:
    flex_mg = compile_graph(workflow_from_env(Guess, AGENTS).graph)
    assert flex_mg.agents == ("scout", "guesser")
    assert flex_mg.dependency("guesser", "scout") != "never"
    assert flex_mg.dependency("scout", "guesser") != "never"  # by way of the environment


def test_every_episode_has_its_own_environment_and_ends_after_max_steps() -> None:
    workflow = workflow_from_env(Guess, {"guesser": "Guess."}, max_steps=3)
    before = Guess.made
    engine = FakeEngine("77")
    examples = [{"seed": seed} for seed in range(6)]
    episodes = run_episodes(
        workflow.graph,
        examples,
        engine=engine,
        reward=workflow.reward,
        inputs=workflow.inputs,
        group_size=2,
    )
    engine.close()
    assert Guess.made - before == 12
    assert len({id(episode.state["env"]) for episode in episodes}) == 12
    assert all(episode.state["env"].tries == len(episode.calls) == 3 for episode in episodes)
    numbers = [episode.state["env"].number for episode in episodes]
    assert numbers[::2] == numbers[1::2]  # a group's episodes begin alike


def test_a_long_episode_meets_no_recursion_limit() -> None:
    workflow = workflow_from_env(Guess, AGENTS, max_steps=60)
    engine = FakeEngine("77")
    (episode,) = run_episodes(workflow.graph, [{"seed": 0}], engine=engine, inputs=workflow.inputs)
    engine.close()
    assert episode.ok, episode.error
    assert len(episode.calls) == 120


class Paper:
    """The MARFT paper's form: an observation, a reward and a `done` for each agent."""

    def reset(self) -> list[str]:
        return ["problem for the first", "problem for the second"]

    def transition(self, actions: list[str]) -> None:
        self.said = actions

    def step(self, actions: list[str]) -> tuple[list[str], list[float], list[bool], dict[str, Any]]:
        self.transition(actions)
        return ["a", "b"], [0.0, float(actions == ["plan", "act"])], [True, True], {}


def test_an_environment_of_the_paper_gets_all_actions() -> None:
    workflow = workflow_from_env(Paper, {"first": "1.", "second": "2."})
    engine = FakeEngine({"first": "plan", "second": "act"})
    (episode,) = run_episodes(
        workflow.graph,
        [{"seed": 1}],
        engine=engine,
        reward=workflow.reward,
        inputs=workflow.inputs,
    )
    engine.close()
    assert episode.total_reward == 1.0
    assert episode.calls[0].messages[1]["content"] == "problem for the first"
    assert episode.calls[1].messages[1]["content"] == "problem for the second\nfirst: plan"


PROFILES = [
    {"role": "planner", "prompt": "<|im_start|>system: Plan in {{}}.<|im_end|>\n"},
    {"role": "actor", "prompt": "Act.", "with_answer": True},
    {"role": "checker", "prompt": "Check.", "with_answer": False},
]


def test_profiles_become_a_chain_of_agents(tmp_path: Path) -> None:
    path = tmp_path / "trio.json"
    path.write_text(json.dumps(PROFILES))
    workflow = workflow_from_profiles(path)
    engine = FakeEngine({"planner": "add", "actor": "12", "checker": "right"})
    (episode,) = run_episodes(workflow.graph, [{"question": "7+5?"}], engine=engine)
    engine.close()
    assert episode.state["answer"] == "12"
    assert episode.state["answers"] == ["12"]
    assert episode.calls[0].messages[0]["content"] == "Plan in {}."
    assert episode.calls[2].messages[1]["content"] == "7+5?\nplanner: add\nactor: 12"
    assert compile_graph(workflow.graph).agents == ("planner", "actor", "checker")
    # The same profiles give an environment its agents.
    assert compile_graph(workflow_from_env(Paper, path).graph).agents == (
        "planner",
        "actor",
        "checker",
    )


def test_an_environment_is_trained_like_any_app(tiny_model: Path, tmp_path: Path) -> None:
    class Letters:
        """Rewards low letters, for two steps."""

        def reset(self, seed: int | None = None) -> str:
            self.steps = 0
            return "q" * (1 + (seed or 0) % 4)

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            self.steps += 1
            return "more", sum(c < "k" for c in action) / 10, self.steps == 2, False, {}

    workflow = workflow_from_env(Letters, {"writer": "W.", "editor": "E."}, held_out_episodes=4)
    assert workflow.load_data is not None
    assert workflow.reward is not None
    train, held_out = workflow.load_data()
    assert not {row["seed"] for row in train} & {row["seed"] for row in held_out}
    with Trainer(
        workflow.graph,
        train_dataset=train,
        eval_dataset=held_out,
        reward=workflow.reward,
        inputs=workflow.inputs,
        config=config(tiny_model),
        run_dir=tmp_path / "run",
    ) as trainer:
        assert trainer.nodes == ("writer", "editor")
        result = trainer.train(progress=False)
    assert result.after is not None
    assert result.after.episodes_failed == 0


def test_without_adapters_the_app_says_that_it_has_no_model() -> None:
    workflow = workflow_from_env(Guess, AGENTS)
    with pytest.raises(GraphError, match="has no model of its own"):
        workflow.graph.invoke({"seed": 1})


def test_a_step_that_returns_something_else_fails_the_episode() -> None:
    class Odd(Guess):
        def step(self, action: str) -> Any:
            return "only text"

    workflow = workflow_from_env(Odd, {"guesser": "Guess."})
    engine = FakeEngine("1")
    (episode,) = run_episodes(workflow.graph, [{"seed": 1}], engine=engine, inputs=workflow.inputs)
    engine.close()
    assert episode.status == "failed: GraphError in environment"
    assert "step returned 'only text'; it must return" in episode.error


@pytest.mark.parametrize(
    ("env", "agents", "more", "why"),
    [
        (Guess(), AGENTS, {}, "env is a Guess; give what makes one"),
        (Guess, {}, {}, "there is no agent"),
        (Guess, [{"role": "a"}], {}, "needs `role` and `prompt`"),
        (Guess, [{"role": "a", "prompt": ""}] * 2, {}, "two profiles have the role 'a'"),
        (Guess, {"environment": "x"}, {}, "is the environment's name"),
        (Guess, AGENTS, {"max_steps": 0}, "max_steps is 0; it must be at least 1"),
        (Guess, "missing.json", {}, "cannot read profiles"),
    ],
)
def test_what_makes_no_app_is_refused(env: Any, agents: Any, more: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        workflow_from_env(env, agents, **more)
