"""Agents as users have them: own settings, shared adapters, several bases, continued adapters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marft_graph import TrainConfig, Trainer, bind
from marft_graph.agents import agents_of
from marft_graph.errors import ConfigError, UnknownNodeError
from marft_graph.evaluation import evaluate_export
from marft_graph.run.overlay import overlays
from marft_graph.run.tracking import read_metrics
from tests.apps import duo
from tests.support import save_random_model, weights
from tests.training import EXAMPLES, config, reward

SHARED = {"planner": {"adapter": "team"}, "actor": {"adapter": "team"}}


def moved(trainer: Trainer, before: dict[str, list[torch.Tensor]]) -> set[str]:
    after = weights(trainer)
    return {
        agent
        for agent in before
        if any(not torch.equal(a, b) for a, b in zip(before[agent], after[agent], strict=True))
    }


def test_nodes_have_lora_settings_of_their_own(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    own = {"planner": {"lora_rank": 4, "lora_targets": ["q_proj", "v_proj"], "lora_alpha": 8}}
    with make(config=config(tiny_model, per_node=own)) as trainer:
        shapes = {
            a: {min(p.shape) for p in trainer.team.parameters(a)} for a in ("planner", "actor")
        }
        result = trainer.train(progress=False)
    assert shapes == {"planner": {4}, "actor": {16}}
    assert len(trainer.team.parameters("planner")) == 2 * 2 * 2  # layers, targets, A and B
    saved = json.loads((result.export / "adapters/planner/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], set(saved["target_modules"])) == (
        4,
        8,
        {"q_proj", "v_proj"},
    )
    assert (result.export / "README.md").read_text().count("--max-lora-rank 16") == 1


def test_a_learning_rate_of_its_own_moves_a_node_by_as_much(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    own = {"planner": {"learning_rate": 1e-6}}
    with make(config=config(tiny_model, iterations=1, per_node=own)) as trainer:
        before = weights(trainer)
        trainer.train(progress=False)
        steps = {
            agent: max(
                (a - b).abs().max().item()
                for a, b in zip(before[agent], weights(trainer)[agent], strict=True)
            )
            for agent in before
        }
    # AdamW's first step is the learning rate, wherever the gradient is not 0
    assert steps["planner"] == pytest.approx(1e-6, rel=0.05)
    assert steps["actor"] == pytest.approx(1e-3, rel=0.05)


def test_nodes_that_share_an_adapter_are_one_agent_everywhere(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    with make(config=config(tiny_model, per_node=SHARED)) as trainer:
        assert trainer.team.agents == ("team",)
        assert trainer.flex_mg.agents == ("planner", "actor")  # still two nodes of the graph
        assert trainer.flex_mg.dependency("actor", "planner") == "always"
        result = trainer.train(progress=False)
        greedy = result.after_greedy
    (row, _) = read_metrics(result.run_dir)
    assert row["agents"]["team"]["calls"] == 2 * 8  # two calls an episode
    manifest = json.loads((result.export / "manifest.json").read_text())
    assert manifest["nodes"] == {"planner": "team", "actor": "team"}
    assert set(overlays(trainer.flex_mg, result.run_dir)) == {"planner", "actor"}
    again = evaluate_export(
        duo(), result.export, EXAMPLES[:4], reward=reward, config=config(tiny_model), greedy=True
    )
    assert greedy is not None
    assert again.returns == greedy.returns
    bound = bind(duo(), result.export)
    state = asyncio.run(bound.ainvoke({"question": EXAMPLES[0]["question"]}))
    assert reward({}, state) == greedy.returns[0]


def test_a_node_may_share_another_nodes_adapter() -> None:
    settings = TrainConfig(base_model="m", per_node={"critic": {"adapter": "writer"}})
    (writer, editor) = agents_of(["writer", "critic", "editor"], settings)
    assert (writer.name, writer.nodes) == ("writer", ("writer", "critic"))
    assert editor.nodes == ("editor",)


def test_nodes_of_one_adapter_that_contradict_each_other_are_refused() -> None:
    own = {"a": {"adapter": "x", "lora_rank": 4}, "b": {"adapter": "x", "lora_rank": 8}}
    with pytest.raises(
        ConfigError, match="a and b share the adapter 'x' but ask for lora_rank 4 and 8"
    ):
        agents_of(["a", "b"], TrainConfig(base_model="m", per_node=own))


def test_settings_of_a_node_that_is_not_trained_are_refused(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    with pytest.raises((ConfigError, UnknownNodeError), match=r"'actr'.*planner, actor"):
        make(config=config(tiny_model, per_node={"actr": {"lora_rank": 4}}))


def test_different_bases_are_loaded_once_each_and_serve_their_nodes(
    make: Callable[..., Trainer], tiny_model: Path, tmp_path: Path
) -> None:
    other = save_random_model(tmp_path / "other", seed=7, context=128)
    own = {"actor": {"base_model": str(other)}}
    with make(config=config(tiny_model, advantage="gae", per_node=own)) as trainer:
        assert len(trainer.team.policies) == 2
        assert trainer.team.of("actor") is not trainer.team.of("planner")
        assert trainer.team.of("actor").codec.context_length == 128
        before = weights(trainer)
        result = trainer.train(progress=False)
        assert moved(trainer, before) == {"planner", "actor"}
    rows = read_metrics(result.run_dir)
    assert all(agent["logprob_gap"] < 1e-4 for row in rows for agent in row["agents"].values())
    manifest = json.loads((result.export / "manifest.json").read_text())
    bases = {name: Path(own["base_model"]).name for name, own in manifest["adapters"].items()}
    assert bases == {"planner": tiny_model.name, "actor": "other"}
    assert (result.export / "README.md").read_text().count("vllm serve") == 2
    again = evaluate_export(
        duo(), result.export, EXAMPLES[:4], reward=reward, config=config(tiny_model), greedy=True
    )
    assert result.after_greedy is not None
    assert again.returns == result.after_greedy.returns


def test_three_agents_on_one_base_share_its_weights(tiny_model: Path) -> None:
    settings = config(tiny_model)
    from marft_graph.policy.team import Team

    team = Team.load(agents_of(["a", "b", "c"], settings), settings)
    assert len(team.policies) == 1


def test_an_adapter_of_an_earlier_run_is_continued(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    with make(run="first") as trainer:
        first = trainer.train(progress=False)
        trained = weights(trainer)
    with make(run="second", config=config(tiny_model, start_from=str(first.export))) as trainer:
        started = weights(trainer)
        assert all(
            torch.equal(a, b)
            for agent in trained
            for a, b in zip(trained[agent], started[agent], strict=True)
        )
        second = trainer.train(progress=False)
        assert moved(trainer, started) == {"planner", "actor"}
    assert first.after is not None
    assert second.before == first.after  # the second run begins where the first one ended


def test_a_continued_adapter_keeps_its_shape_and_refuses_another(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    with make(run="first", config=config(tiny_model, lora_rank=4)) as trainer:
        folder = trainer.export(trainer.run_dir.parent / "out")
    own = {"actor": {"start_from": str(folder / "adapters" / "actor")}}
    with make(run="second", config=config(tiny_model, per_node=own)) as trainer:
        assert {min(p.shape) for p in trainer.team.parameters("actor")} == {4}
        assert {min(p.shape) for p in trainer.team.parameters("planner")} == {16}
    own["actor"]["lora_rank"] = 8  # type: ignore[assignment]
    with pytest.raises(
        ConfigError, match=r"lora_rank of 'actor' is 8, but the adapter in .* has 4"
    ):
        make(run="third", config=config(tiny_model, per_node=own))


def test_a_folder_without_adapters_to_continue_is_named(
    make: Callable[..., Trainer], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no adapter for 'planner' in .*give an export folder"):
        make(config=config(tiny_model, start_from=str(tmp_path)))


def test_a_run_continues_with_prompts_that_changed(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    with make(run="first") as trainer:
        first = trainer.train(progress=False)
    longer = [{**example, "question": "Please: " + example["question"]} for example in EXAMPLES]
    settings: dict[str, Any] = {"train_dataset": longer, "eval_dataset": longer[:4]}
    again = config(tiny_model, start_from=str(first.export))
    with make(run="second", config=again, **settings) as trainer:
        assert trainer.train(progress=False).iterations == 2


def test_a_run_with_other_sharing_is_not_resumed(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    with make() as trainer:
        trainer.train(progress=False)
    with pytest.raises(ConfigError, match="per_node"):
        make(config=config(tiny_model, per_node=SHARED), resume=True)
