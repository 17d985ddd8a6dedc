"""LangChain callbacks of the user's app, LangSmith's too, see training as they see the app."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from uuid import UUID

import langsmith
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers import LangChainTracer

from marft_graph import FakeEngine, Trainer, run_episodes
from tests.apps import duo
from tests.training import EXAMPLES, config, reward


class Seen(BaseCallbackHandler):
    """Every run that starts, by its id: its kind, name and parent; and what the models said."""

    def __init__(self) -> None:
        self.runs: dict[UUID, tuple[str, str, UUID | None]] = {}
        self.said: list[str] = []

    def on_chain_start(self, serialized: Any, inputs: Any, **found: Any) -> None:
        self.runs[found["run_id"]] = ("chain", str(found.get("name")), found["parent_run_id"])

    def on_chat_model_start(self, serialized: Any, messages: Any, **found: Any) -> None:
        self.runs[found["run_id"]] = ("model", str(found.get("name")), found["parent_run_id"])

    def on_llm_end(self, response: Any, **found: Any) -> None:
        self.said.append(response.generations[0][0].text)

    def paths(self) -> list[tuple[str, ...]]:
        """From each model call up to its root: kinds of models, names of chains."""
        paths = []
        for kind, _, parent in self.runs.values():
            if kind != "model":
                continue
            path = ["model"]
            while parent is not None:
                _, name, parent = self.runs[parent]
                path.append(name)
            paths.append(tuple(path))
        return paths


ROOT = ("LangGraph",)
TREE = [("model", "planner", *ROOT), ("model", "actor", *ROOT)]


def test_callbacks_of_the_app_see_the_rollouts_calls_under_their_nodes() -> None:
    seen = Seen()
    app = duo().with_config(callbacks=[seen])
    engine = FakeEngine(lambda agent, messages: f"from {agent}")
    (episode,) = run_episodes(app, [{"question": "q"}], engine=engine)
    engine.close()
    assert episode.ok, episode.error
    assert seen.paths() == TREE
    assert seen.said == ["from planner", "from actor"]


def test_callbacks_fire_for_every_episode_of_a_training_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    seen = Seen()
    with Trainer(
        duo().with_config(callbacks=[seen]),
        train_dataset=EXAMPLES,
        reward=reward,
        config=config(tiny_model, iterations=1),
        run_dir=tmp_path / "run",
    ) as trainer:
        trainer.train(progress=False)
    paths = seen.paths()
    assert len(paths) >= 16  # eight episodes of two calls; more where the graph was tried first
    assert set(paths) == set(TREE)
    assert paths.count(TREE[0]) == paths.count(TREE[1])
    assert len(seen.said) == len(paths)


def test_langsmith_gets_the_run_tree() -> None:
    client = MagicMock(spec=langsmith.Client)
    client.tracing_queue = None
    tracer = LangChainTracer(project_name="mine", client=client)
    app = duo().with_config(callbacks=[tracer])
    engine = FakeEngine(lambda agent, messages: f"from {agent}")
    run_episodes(app, [{"question": "q"}], engine=engine)
    engine.close()
    tracer.wait_for_futures()
    runs = {str(call.kwargs["id"]): call.kwargs for call in client.create_run.call_args_list}
    models = [run for run in runs.values() if run["run_type"] == "llm"]
    tree = []
    for run in models:
        path, parent = ["model"], run["parent_run_id"]
        while parent is not None:
            path.append(runs[str(parent)]["name"])
            parent = runs[str(parent)].get("parent_run_id")
        tree.append(tuple(path))
        assert run["session_name"] == "mine"
    assert sorted(tree) == sorted(TREE)
    ended = [str(call.kwargs.get("outputs")) for call in client.update_run.call_args_list]
    assert any("from actor" in text for text in ended)
