"""What a run does when learning goes wrong, gets no better, or has nothing to learn from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from marft_graph import Trainer
from marft_graph.errors import TrainingCollapsedError
from marft_graph.evaluation import Evaluation
from marft_graph.learn.update import Learner
from marft_graph.run.tracking import read_metrics
from tests.support import weights
from tests.training import EXAMPLES, config, reward


def poison(monkeypatch: pytest.MonkeyPatch, iterations: set[int]) -> None:
    """Advantages of some iterations become NaN, as an overflow somewhere would make them."""
    update = Learner._update_adapter

    def poisoned(self: Learner, agent: str, batch: Any, iteration: int) -> dict[str, float]:
        if iteration in iterations and agent == "actor":
            batch.advantages_N = batch.advantages_N * float("nan")
        return update(self, agent, batch, iteration)

    monkeypatch.setattr(Learner, "_update_adapter", poisoned)


def saved(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step_{step}" / "adapters"
    return {p.parent.name: p.read_bytes() for p in folder.glob("*/adapter_model.safetensors")}


def test_a_loss_that_is_not_finite_puts_the_last_good_checkpoint_back(
    make: Callable[..., Trainer],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    poison(monkeypatch, {3})
    settings = config(tiny_model, iterations=4, checkpoint_every=1, keep_checkpoints=9)
    with make(config=settings) as trainer, caplog.at_level(logging.WARNING):
        result = trainer.train(progress=False)
        assert all(bool(torch.isfinite(p).all()) for own in weights(trainer).values() for p in own)
    rows = read_metrics(result.run_dir)
    assert [row["collapsed"] is None for row in rows] == [True, True, False, True]
    assert "the policy loss is nan" in rows[2]["collapsed"]
    assert saved(result.run_dir, 3) == saved(result.run_dir, 2)  # back to where it was
    assert rows[3]["agents"]["actor"]["learning_rate"] == pytest.approx(0.5e-3)
    assert rows[1]["agents"]["actor"]["learning_rate"] == pytest.approx(1e-3)
    (warning,) = [r.message for r in caplog.records if "collapsed" in r.message]
    assert "put step_2 back, learning rates now times 0.5 (1 of 3)" in warning


def test_a_collapse_before_the_first_checkpoint_goes_back_to_the_start(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1})
    with make(config=config(tiny_model, iterations=2)) as trainer:
        result = trainer.train(progress=False)
    rows = read_metrics(result.run_dir)
    assert rows[0]["collapsed"] is not None
    assert rows[1]["agents"]["planner"]["kl"] < 1e-8  # fresh adapters again


def test_it_gives_up_after_so_many_recoveries_and_says_what_was_wrong(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2, 3, 4, 5})
    settings = config(tiny_model, iterations=9, max_recoveries=2, checkpoint_every=1)
    with make(config=settings) as trainer:
        with pytest.raises(
            TrainingCollapsedError,
            match=r"iteration 4: actor: the policy loss is nan.*max_recoveries=2.*step_3",
        ):
            trainer.train(progress=False)
        assert (trainer.run_dir / "report.html").exists()


def test_a_collapse_in_the_value_head_does_not_keep_a_run_from_being_resumed(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that are not finite are null in the metrics, which a resumed run reads again."""
    fit = Learner._update_critic

    def poisoned(self: Learner, agent: str, batch: Any) -> dict[str, float]:
        stats = fit(self, agent, batch)
        return stats | ({"loss_value": float("nan")} if poisoning else {})

    poisoning = True
    monkeypatch.setattr(Learner, "_update_critic", poisoned)
    settings = config(tiny_model, iterations=1, advantage="gae")
    with make(config=settings) as trainer:
        trainer.train(progress=False)
    assert "loss_value of" in read_metrics(trainer.run_dir)[0]["collapsed"]
    poisoning = False
    with make(config=settings.replace(iterations=2), resume=True) as trainer:
        assert trainer.train(progress=False).iterations == 2


def test_a_resumed_run_starts_its_window_of_returns_after_a_collapse(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2})
    with make(config=config(tiny_model, iterations=3, return_floor=0.01)) as trainer:
        trainer.train(progress=False)
        whole = list(trainer._health._recent)
    assert len(whole) == 1  # the third iteration's, after the collapse in the second
    with make(config=config(tiny_model, iterations=4, return_floor=0.01), resume=True) as trainer:
        assert list(trainer._health._recent) == whole


def test_recoveries_survive_a_resume(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2})
    with make(config=config(tiny_model, iterations=3, checkpoint_every=1)) as trainer:
        trainer.train(progress=False)
    with make(config=config(tiny_model, iterations=4), resume=True) as trainer:
        result = trainer.train(progress=False)
    row = read_metrics(result.run_dir)[-1]
    assert row["agents"]["actor"]["learning_rate"] == pytest.approx(0.5e-3)


def test_a_kl_over_its_ceiling_is_a_collapse(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    settings = config(tiny_model, iterations=3, learning_rate=0.05, kl_ceiling=1e-4)
    with make(config=settings) as trainer:
        result = trainer.train(progress=False)
    rows = read_metrics(result.run_dir)
    assert rows[0]["collapsed"] is None  # before the first step the KL is 0
    assert "above kl_ceiling=0.0001" in rows[1]["collapsed"]


def scripted_evaluations(monkeypatch: pytest.MonkeyPatch, returns: list[float]) -> None:
    values = iter(returns)

    def evaluate(self: Trainer, *, greedy: bool = False, name: str | None = None) -> Evaluation:
        value = 0.0 if greedy else next(values)
        return Evaluation(value, 0.0, (value,), 1, 0, {}, greedy)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


def test_the_checkpoint_of_the_best_held_out_return_stays_and_can_be_the_result(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_evaluations(monkeypatch, [0.1, 0.9, 0.2, 0.3, 0.4, 0.5])
    settings = config(
        tiny_model, iterations=5, keep_checkpoints=1, checkpoint_every=1, load_best=True
    )
    with make(config=settings) as trainer:
        result = trainer.train(progress=False)
    kept = {path.name for path in (result.run_dir / "checkpoints").iterdir()}
    assert kept == {"step_1", "step_5"}
    assert saved(result.run_dir, 5) == saved(result.run_dir, 1)
    state = json.loads((result.run_dir / "checkpoints/step_5/state.json").read_text())
    assert (state["best_iteration"], state["best_return"]) == (1, 0.9)


def test_a_best_checkpoint_that_is_damaged_is_named_and_not_put_back(
    make: Callable[..., Trainer],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scripted_evaluations(monkeypatch, [0.1, 0.9, 0.2, 0.3])
    with make(config=config(tiny_model, iterations=3, load_best=True)) as trainer:
        put_back = trainer._put_back_best

        def damaged() -> None:
            path = trainer.run_dir / "checkpoints" / "step_1" / "adapters" / "actor"
            (path / "adapter_model.safetensors").write_bytes(b"")
            put_back()

        monkeypatch.setattr(trainer, "_put_back_best", damaged)
        result = trainer.train(progress=False)
    assert result.iterations == 3
    assert any("step_1 is damaged" in record.message for record in caplog.records)


def test_a_run_resumed_at_its_start_still_has_its_whole_patience(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_evaluations(monkeypatch, [0.5, 0.5, 0.5, 0.6])
    with make(config=config(tiny_model, iterations=0)) as trainer:
        trainer.train(progress=False)
    with make(config=config(tiny_model, iterations=1, early_stop=1), resume=True) as trainer:
        assert trainer.train(progress=False).iterations == 1


def test_without_a_better_return_training_stops_early(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_evaluations(monkeypatch, [0.1, 0.9, 0.8, 0.7, 0.6, 0.5])
    with make(config=config(tiny_model, iterations=9, early_stop=2)) as trainer:
        result = trainer.train(progress=False)
    assert result.iterations == 3


def test_dynamic_filtering_learns_only_from_examples_that_tell_choices_apart(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[set[str]] = []
    differing: list[bool] = []
    update = Learner.update

    def spy(self: Learner, episodes: Any, iteration: int) -> Any:
        learnt.append({episode.example["answer"] for episode in episodes})
        groups: dict[int, list[Any]] = {}
        for episode in episodes:
            groups.setdefault(episode.example_index, []).append(episode)
        for group in groups.values():
            assert len({episode.example["answer"] for episode in group}) == 1  # no mixed rounds
            differing.append(len({episode.total_reward for episode in group}) > 1)
        return update(self, episodes, iteration)

    monkeypatch.setattr(Learner, "update", spy)

    def even_only(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        return 1.0 if int(example["answer"]) % 2 else reward(example, state)

    settings = config(tiny_model, iterations=2, examples_per_iteration=4, filter_rounds=4)
    with make(config=settings, reward=even_only) as trainer:
        result = trainer.train(progress=False)
    assert all(int(answer) % 2 == 0 for answers in learnt for answer in answers)
    assert differing
    assert all(differing)
    rows = read_metrics(result.run_dir)
    assert all(row["episodes"] > 16 for row in rows)  # further rollouts filled the places
    assert all(row["zero_advantage_groups"] > 0 for row in rows)


def test_an_iteration_without_anything_to_learn_from_changes_nothing(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    settings = config(tiny_model, iterations=1, filter_rounds=1)
    with make(config=settings, reward=lambda example, state: 1.0) as trainer:
        before = weights(trainer)
        result = trainer.train(progress=False)
        after = weights(trainer)
    assert all(torch.equal(a, b) for k in before for a, b in zip(before[k], after[k], strict=True))
    (row,) = read_metrics(result.run_dir)
    assert row["episodes"] == row["episodes_filtered"] == 2 * 2 * 4


def test_a_resumed_run_takes_the_examples_that_come_next(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    with make(
        run="whole", config=config(tiny_model, iterations=4), train_dataset=iter(EXAMPLES)
    ) as trainer:
        whole = read_metrics(trainer.train(progress=False).run_dir)
    with make(
        run="parts", config=config(tiny_model, iterations=2), train_dataset=iter(EXAMPLES)
    ) as trainer:
        trainer.train(progress=False)
    with make(
        run="parts",
        config=config(tiny_model, iterations=4),
        train_dataset=iter(EXAMPLES),
        resume=True,
    ) as trainer:
        parts = read_metrics(trainer.train(progress=False).run_dir)
    assert [row["return_mean"] for row in parts] == [row["return_mean"] for row in whole]
