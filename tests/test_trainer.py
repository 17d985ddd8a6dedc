"""The whole path on a random model: train, evaluate, export, resume, stop, and refuse bad input."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.language_models.chat_models import BaseChatModel

from marft_graph import Trainer, bind
from marft_graph.deploy.export import export_run
from marft_graph.engine.local import LocalEngine
from marft_graph.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    EpisodesFailedError,
    ExportError,
    GraphError,
    ModelError,
    RewardError,
    UnknownNodeError,
)
from marft_graph.learn.update import Learner
from marft_graph.run.stopping import Stopped
from marft_graph.run.tracking import read_evaluations, read_metrics
from tests.apps import duo, solo, voters
from tests.support import save_random_model, weights
from tests.training import config, reward


def adapters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{agent}/{i}": parameter.detach().clone()
        for agent, parameters in weights(trainer).items()
        for i, parameter in enumerate(parameters)
    }


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def test_a_run_leaves_what_the_readme_promises(make: Callable[..., Trainer]) -> None:
    trainer = make()
    result = trainer.train(progress=False)
    names = {path.name for path in result.run_dir.iterdir()}
    assert {
        "config.yaml",
        "graph.json",
        "metrics.jsonl",
        "checkpoints",
        "traces",
        "report.html",
        "export",
    } <= names
    rows = read_metrics(result.run_dir)
    assert [row["iteration"] for row in rows] == [1, 2]
    for row in rows:
        assert row["episodes"] == 8
        assert row["episodes_failed"] == 0
        assert row["tokens_sampled"] > 0
        assert row["return_mean"] is not None
        for agent in ("planner", "actor"):
            assert {"kl", "entropy", "clip_fraction", "loss_policy"} <= set(row["agents"][agent])
            assert row["agents"][agent]["logprob_gap"] < 1e-4
    assert "eval_return" in rows[-1]
    assert result.after is not None
    assert rows[-1]["eval_return"] == result.after.return_mean
    assert [row["iteration"] for row in read_evaluations(result.run_dir)] == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_metrics(
    make: Callable[..., Trainer], tiny_model: Path, threads: int
) -> None:
    runs = []
    settings = {"advantage": "gae", "iterations": 3, "cpu_threads": threads}
    for name in ("a", "b"):
        trainer = make(run=name, config=config(tiny_model, **settings))
        runs.append(without_times(read_metrics(trainer.train(progress=False).run_dir)))
    assert runs[0] == runs[1]
    other = make(run="c", config=config(tiny_model, **settings, seed=1))
    assert without_times(read_metrics(other.train(progress=False).run_dir)) != runs[0]


@pytest.mark.usefixtures("untouched_langchain")
def test_training_changes_nothing_of_langchain_and_nothing_of_the_app(
    make: Callable[..., Trainer],
) -> None:
    before = dict(vars(BaseChatModel))
    graph = duo()
    nodes = dict(graph.nodes)
    make(graph).train(progress=False)
    assert dict(vars(BaseChatModel)) == before
    assert dict(graph.nodes) == nodes


def test_voters_with_one_prompt_are_all_trained(make: Callable[..., Trainer]) -> None:
    trainer = make(voters())
    row = read_metrics(trainer.train(progress=False).run_dir)[0]
    assert row["agents"]["voter"]["calls"] == 3 * 8
    assert row["agents"]["aggregator"]["calls"] == 8


def test_only_the_nodes_asked_for_are_trained(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from langchain_core.language_models.fake_chat_models import FakeListChatModel

    import tests.apps

    monkeypatch.setattr(tests.apps, "model", FakeListChatModel(responses=["own"]))
    trainer = make(config=config(tiny_model, nodes=("actor",)))
    assert trainer.team.agents == ("actor",)
    assert set(read_metrics(trainer.train(progress=False).run_dir)[0]["agents"]) == {"actor"}


def test_resuming_gives_the_uninterrupted_run(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    for advantage in ("group", "gae"):
        whole = make(
            run=f"{advantage}1", config=config(tiny_model, iterations=4, advantage=advantage)
        )
        expected = whole.train(progress=False)
        part = config(tiny_model, iterations=2, advantage=advantage)
        make(run=f"{advantage}2", config=part).train(progress=False)
        rest = make(
            run=f"{advantage}2",
            config=config(tiny_model, iterations=4, advantage=advantage),
            resume=True,
        )
        assert rest.iteration == 2
        result = rest.train(progress=False)
        for name, expected_weights in adapters(whole).items():
            assert torch.equal(expected_weights, adapters(rest)[name])
        last = [without_times(read_metrics(r.run_dir))[-1] for r in (expected, result)]
        assert last[0] == last[1]


def test_resuming_with_other_mathematics_is_refused(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    make().train(progress=False)
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.001 -> 0\.01"):
        make(config=config(tiny_model, learning_rate=1e-2), resume=True)
    with pytest.raises(CheckpointError, match="another graph"):
        make(voters(), resume=True)


def test_a_run_with_a_schedule_keeps_its_length_when_resumed(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    falling = config(tiny_model, learning_rate_schedule="linear", checkpoint_every=1)
    with make(config=falling) as trainer:
        trainer.train(progress=False)
    longer = config(tiny_model, learning_rate_schedule="linear", checkpoint_every=1, iterations=3)
    with pytest.raises(ConfigError, match="iterations: 2 -> 3"):
        make(config=longer, resume=True)


def test_a_used_run_folder_is_never_overwritten_unasked(make: Callable[..., Trainer]) -> None:
    result = make().train(progress=False)
    with pytest.raises(CheckpointError, match="not empty"):
        make()
    make(overwrite=True)
    assert not (result.run_dir / "metrics.jsonl").exists()


def test_overwrite_refuses_a_folder_that_is_no_run(
    make: Callable[..., Trainer], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="no run folder"):
        make(overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_ctrl_c_ends_with_a_checkpoint(make: Callable[..., Trainer], tiny_model: Path) -> None:
    asked = threading.Event()

    def interrupting(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        if trainer.iteration == 2 and not asked.is_set():
            asked.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return reward(example, state)

    trainer = make(reward=interrupting, config=config(tiny_model, iterations=50))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(progress=False)
    assert (trainer.run_dir / "checkpoints" / "step_2" / "manifest.json").exists()
    assert (trainer.run_dir / "report.html").exists()
    assert make(config=config(tiny_model, iterations=50), resume=True).iteration == 2


def hanging_in(iteration: int, trainer: list[Trainer], *signals: signal.Signals) -> Any:
    """A reward that sends signals in an iteration, and takes a minute from then on."""

    async def hangs(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        if trainer and trainer[0].iteration == iteration:
            for signum in signals if not trainer[1:] else ():
                trainer.append(trainer[0])
                signal.pthread_kill(threading.main_thread().ident or 0, signum)
                await asyncio.sleep(0.2)  # signals that arrive at once have no order
            await asyncio.sleep(60)
        return reward(example, state)

    return hangs


def test_a_step_past_the_deadline_is_interrupted_and_the_one_before_it_saved(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    made: list[Trainer] = []
    settings = config(tiny_model, iterations=5, eval_every=0, stop_timeout=0.3)
    trainer = make(config=settings, reward=hanging_in(3, made, signal.SIGTERM), run="stopped")
    made.append(trainer)
    started = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        trainer.train(progress=False)
    assert time.monotonic() - started < 50
    assert stopped.value.signum == signal.SIGTERM
    assert [row["iteration"] for row in read_metrics(trainer.run_dir)] == [1, 2]
    assert (trainer.run_dir / "checkpoints" / "step_2" / "manifest.json").exists()
    assert (trainer.run_dir / "report.html").exists()
    resumed = make(config=settings, run="stopped", resume=True)
    result = resumed.train(progress=False)
    whole = make(config=settings, run="whole").train(progress=False)
    assert without_times(read_metrics(result.run_dir)) == without_times(read_metrics(whole.run_dir))


def test_a_second_signal_stops_at_once(make: Callable[..., Trainer], tiny_model: Path) -> None:
    made: list[Trainer] = []
    hangs = hanging_in(2, made, signal.SIGTERM, signal.SIGINT)
    trainer = make(config=config(tiny_model, iterations=5, eval_every=0), reward=hangs)
    made.append(trainer)
    started = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        trainer.train(progress=False)
    assert time.monotonic() - started < 50
    assert stopped.value.signum == signal.SIGINT
    assert not (trainer.run_dir / "checkpoints" / "step_1").exists()
    assert make(resume=True, config=config(tiny_model, iterations=5, eval_every=0)).iteration == 0


def test_what_was_learnt_before_an_error_is_saved(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    broken = True

    def fails(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        if broken and trainer.iteration == 3:
            raise KeyError("oops")
        return reward(example, state)

    settings = config(tiny_model, iterations=4, eval_every=0)
    trainer = make(config=settings, reward=fails)
    with pytest.raises(RewardError, match="oops"):
        trainer.train(progress=False)
    broken = False
    resumed = make(config=settings, resume=True)
    assert resumed.iteration == 2
    result = resumed.train(progress=False)
    whole = make(config=settings, run="whole").train(progress=False)
    assert without_times(read_metrics(result.run_dir)) == without_times(read_metrics(whole.run_dir))


def test_changes_that_the_user_accepts_do_not_keep_a_run_from_being_resumed(
    make: Callable[..., Trainer], tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make().train(progress=False)
    changed = config(tiny_model, learning_rate=1e-2, temperature=0.9)
    with pytest.raises(ConfigError, match=r"temperature: None -> 0\.9.*accept_changes"):
        make(config=changed, resume=True, accept_changes=["learning_rate"])
    make(config=changed, resume=True, accept_changes=["learning_rate", "temperature"])
    assert "going on with another learning_rate: 0.001 -> 0.01" in caplog.text
    make(duo(sync=True), resume=True)  # the same graph, written otherwise
    with pytest.raises(CheckpointError, match="actor"):
        make(solo(), resume=True)
    assert make(solo(), resume=True, accept_changes=["graph"]).iteration == 2
    with pytest.raises(ConfigError, match="'learning_rat' is no setting"):
        make(resume=True, accept_changes=["learning_rat"])


def test_a_base_model_that_changed_under_its_name_is_noticed(
    make: Callable[..., Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_random_model(tmp_path / "base")
    longer = config(base, iterations=3)
    result = make(config=config(base)).train(progress=False)
    save_random_model(base, seed=1)
    with pytest.raises(CheckpointError, match=r"another base model.*another model\.safetensors \("):
        make(config=longer, resume=True)
    with pytest.raises(ExportError, match=r"another base model.*another model\.safetensors now"):
        bind(duo(), result.export)
    with pytest.raises(ExportError, match="another base model"):
        export_run(result.run_dir, tmp_path / "merged", merged=True)
    bind(duo(), result.export, base_model=str(base))
    assert "were trained on another base model" in caplog.text
    make(config=longer, resume=True, accept_changes=["base_model"]).train(progress=False)
    assert "going on with another base model" in caplog.text
    make(config=longer, resume=True)  # what was accepted is now the run's
    bind(duo(), result.export)


def test_a_run_that_recorded_no_base_model_can_be_resumed(make: Callable[..., Trainer]) -> None:
    result = make().train(progress=False)
    (result.run_dir / "base_models.json").unlink()
    make(resume=True).train(progress=False)
    assert (result.run_dir / "base_models.json").exists()


def test_export_writes_peft_folders_and_a_manifest(
    make: Callable[..., Trainer], tmp_path: Path
) -> None:
    folder = make().export(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["nodes"] == {"planner": "planner", "actor": "actor"}
    assert [own["path"] for own in manifest["adapters"].values()] == [
        "adapters/planner",
        "adapters/actor",
    ]
    for name in ("planner", "actor"):
        assert (folder / "adapters" / name / "adapter_model.safetensors").exists()
        assert (folder / "adapters" / name / "adapter_config.json").exists()
    assert "vllm serve" in (folder / "README.md").read_text()


# Bad input: each message names the cause and what would be right


def test_an_unknown_node_is_named(make: Callable[..., Trainer], tiny_model: Path) -> None:
    with pytest.raises(UnknownNodeError, match=r"'actr'.*did you mean 'actor'.*planner, actor"):
        make(config=config(tiny_model, nodes=("actr",)))


def test_an_empty_data_set_is_named(make: Callable[..., Trainer]) -> None:
    with pytest.raises(DatasetError, match="train_dataset is empty"):
        make(train_dataset=[])
    with pytest.raises(DatasetError, match="eval_dataset is empty"):
        make(eval_dataset=[])


def test_a_data_set_without_the_graphs_keys_is_named(make: Callable[..., Trainer]) -> None:
    with pytest.raises(DatasetError, match=r"'query'.*'question'"):
        make(train_dataset=[{"query": "x"}])


def test_a_model_path_that_does_not_exist_is_named(make: Callable[..., Trainer]) -> None:
    with pytest.raises(ModelError, match=r"no/such/model.*no such folder.*hub id"):
        make(config=config(Path("no/such/model")))


def test_an_object_that_is_no_graph_is_named(make: Callable[..., Trainer]) -> None:
    with pytest.raises(GraphError, match="str"):
        make("not a graph")


def test_a_prompt_longer_than_the_context_is_named(make: Callable[..., Trainer]) -> None:
    long = [{"question": "x" * 400, "answer": "1"}]
    with pytest.raises(
        EpisodesFailedError, match=r"planner.*prompt of 4\d\d tokens.*context is 256"
    ):
        make(train_dataset=long, eval_dataset=None).train(progress=False)


def test_a_reward_that_raises_stops_the_run_with_its_example(make: Callable[..., Trainer]) -> None:
    def broken(example: Mapping[str, Any], state: Any) -> float:
        raise KeyError("gold")

    with pytest.raises(RewardError, match=r"gold.*question"):
        make(reward=broken).train(progress=False)


def test_nodes_that_raise_are_dropped_and_counted(make: Callable[..., Trainer]) -> None:
    graph = duo()
    calls = iter(range(10_000))

    def sometimes(state: dict[str, Any]) -> dict[str, Any]:
        if next(calls) % 4 == 0:
            raise ValueError("flaky parser")
        return {"answer": state["answer"]}

    builder = graph.builder
    builder.add_node("check", sometimes)
    builder.add_edge("actor", "check")
    row = read_metrics(make(builder.compile()).train(progress=False).run_dir)[0]
    assert row["episodes"] == 8
    assert row["episodes_failed"] == 2
    assert list(row["failed_by_reason"].values()) == [2]
    assert "ValueError" in next(iter(row["failed_by_reason"]))


def test_greedy_nodes_are_told_of_before_anything_is_sampled(
    make: Callable[..., Trainer], tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make(duo(greedy=["planner"])):
        assert "planner cannot learn" in caplog.text
    with pytest.raises(ConfigError, match="planner, actor cannot learn"):
        make(duo(greedy=["planner", "actor"]), run="none")
    caplog.clear()
    sampled = config(tiny_model, temperature=1.0)
    with make(duo(greedy=["planner", "actor"]), run="sampled", config=sampled):
        assert "cannot learn" not in caplog.text


def test_a_node_that_the_app_makes_greedy_is_warned_of_and_not_trained(
    make: Callable[..., Trainer], tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make(duo(greedy=["planner"])) as trainer:
        before = adapters(trainer)
        trainer.train(progress=False)
        after = adapters(trainer)
    (warning,) = [r.message for r in caplog.records if "planner cannot learn" in r.message]
    assert "temperature 0 there. Set temperature to 1.0 to sample in training" in warning
    assert warning.endswith("the other nodes are trained")
    moved = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"actor"}


def test_an_app_that_is_greedy_everywhere_is_refused_with_what_to_set(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    app = duo(greedy=["planner", "actor"])
    with pytest.raises(ConfigError, match=r"Set temperature to 1\.0 to sample"):
        make(app)
    with make(app, config=config(tiny_model, temperature=1.0), run="sampled") as trainer:
        trainer.train(progress=False)


@pytest.mark.parametrize(
    ("settings", "in_updates", "in_rollouts"),
    [({}, 2, 1), ({"cpu_threads": 3}, 3, 3), ({"staleness": 1}, 1, 1)],
)
def test_decode_steps_of_a_small_base_run_on_one_thread_and_its_updates_on_all(
    make: Callable[..., Trainer],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, int],
    in_updates: int,
    in_rollouts: int,
) -> None:
    seen: dict[str, set[int]] = {"update": set(), "step": set()}

    def watch(kind: str, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[kind].add(torch.get_num_threads())
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch("update", Learner, "_step")
    watch("step", LocalEngine, "_turn")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with make(config=config(tiny_model, **settings)) as trainer:
            trainer.train(progress=False)
        assert seen == {"update": {in_updates}, "step": {in_rollouts}}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_run_without_held_out_data_goes_to_its_end_and_says_so_once(
    make: Callable[..., Trainer], tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tiny_model, iterations=3, eval_every=1, group_size=2)
    with make(config=settings, eval_dataset=None) as trainer:
        result = trainer.train(progress=False)
    assert result.iterations == 3
    assert result.before is result.after is None
    assert caplog.text.count("there is no eval_dataset") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"early_stop": 2}, "early_stop is 2, but there is no eval_dataset"),
        ({"load_best": True}, "load_best is True, but there is no eval_dataset"),
        ({"temperature": 0.0}, "temperature is 0; training learns from samples"),
        ({"lora_targets": ["q_proj", "v_porj"]}, "has 'v_porj', which no module.*q_proj"),
        ({"per_node": {"editor": {"lora_rank": 2}}}, "per_node names 'editor'"),
        ({"update_order": "alternating", "alternate_order": ["editor"]}, "names 'editor'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_run_begins(
    make: Callable[..., Trainer],
    tiny_model: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(ConfigError, match=said):
        make(config=config(tiny_model, **changes), eval_dataset=None)
    assert not (tmp_path / "run").exists()


def test_a_reward_with_other_arguments_is_refused_before_the_run_begins(
    make: Callable[..., Trainer],
) -> None:
    for function in (lambda state: 1.0, lambda example, state, weights: 1.0):
        for given in (function, [function], {function: 0.5}):
            with pytest.raises(ConfigError, match=r"called as reward\(example, state\)"):
                make(reward=given)


def test_a_run_folder_that_cannot_be_made_is_refused_before_models_are_loaded(
    make: Callable[..., Trainer], tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match="file is a file"):
        make(run="file/run", config=config(tiny_model, quantization="none"))


@pytest.mark.parametrize("value", [1e308, -1e20, 1.1e12])
def test_a_reward_that_is_too_large_to_learn_from_is_refused(
    make: Callable[..., Trainer], value: float
) -> None:
    with (
        make(reward=lambda example, state: value, eval_dataset=None) as trainer,
        pytest.raises(RewardError, match=r"between -1e\+12 and 1e\+12: divide by"),
    ):
        trainer.train(progress=False)


def test_a_large_reward_is_learnt_from(make: Callable[..., Trainer], tiny_model: Path) -> None:
    """The same but for a constant: the same advantages, so the same gradients but for rounding."""
    steps = []
    for run, offset in (("small", 0.0), ("large", 1e9)):
        with make(
            run=run,
            reward=lambda example, state, offset=offset: offset + reward(example, state),
            config=config(tiny_model, iterations=1),
            eval_dataset=None,
        ) as trainer:
            (row,) = read_metrics(trainer.train(progress=False).run_dir)
        steps.append([stats["grad_norm"] for stats in row["agents"].values()])
    assert all(norm > 0 for norm in steps[0])
    assert steps[1] == pytest.approx(steps[0], rel=1e-3)
