"""Every fault in a training run: counted by reason, shown in the report, never trained on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from marft_graph import Trainer
from marft_graph.engine.base import GenerationRequest
from marft_graph.engine.local import LocalEngine
from marft_graph.episode import Episode
from marft_graph.errors import EngineError, EpisodesFailedError
from marft_graph.learn.update import Learner
from marft_graph.run.tracking import read_metrics
from tests.faults.soak import FAULTS, app
from tests.faults.soak import reward as failing_reward
from tests.training import config

TOO_LONG = "the prompt is too long " * 20  # for a context of 256 tokens


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Episode]:
    """What the learner was given; the engine fails where it is asked to, memory runs out once."""
    given: list[Episode] = []
    update, submit, forward = Learner.update, LocalEngine.submit, Learner._forward
    shortages = iter([torch.OutOfMemoryError("CUDA out of memory")])

    def noted(self: Learner, episodes: Sequence[Episode], iteration: int) -> Any:
        given[:] = episodes
        return update(self, episodes, iteration)

    def failing(self: LocalEngine, request: GenerationRequest) -> Future[Any]:
        if "engine?" not in bytes_of(self, request):
            return submit(self, request)
        future: Future[Any] = Future()
        future.set_exception(EngineError("an engine fails"))
        return future

    def short(self: Learner, *args: Any, **how: Any) -> Any:
        for error in shortages:
            raise error
        return forward(self, *args, **how)

    monkeypatch.setattr(Learner, "update", noted)
    monkeypatch.setattr(LocalEngine, "submit", failing)
    monkeypatch.setattr(Learner, "_forward", short)
    return given


def bytes_of(engine: LocalEngine, request: GenerationRequest) -> str:
    codec = engine.codec(request.agent)
    return str(codec._tokenizer.decode(request.prompt_ids))


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return failing_reward(example, state) + len(state["answer"]) % 3


def test_every_fault_is_counted_by_reason_and_shown_and_nothing_of_it_is_trained(
    make: Callable[..., Trainer],
    tiny_model: Path,
    release: threading.Event,
    trained_on: list[Episode],
) -> None:
    kinds = [*FAULTS, TOO_LONG, "none", "none"]
    settings = config(
        tiny_model,
        iterations=1,
        examples_per_iteration=len(kinds),
        group_size=2,
        eval_every=0,
        reward_errors="drop",
        max_failed_share=0.95,
        episode_timeout=5.0,
        nodes=("worker",),
    )
    examples = [{"kind": kind} for kind in kinds]
    with make(app(release), train_dataset=examples, eval_dataset=None, config=settings,
              reward=reward) as trainer:  # fmt: skip
        result = trainer.train(progress=False)
    (row,) = read_metrics(result.run_dir)
    expected = dict.fromkeys(FAULTS.values(), 2)
    expected["timeout"] = 4  # one past its deadline, one in a node that hangs, twice each
    expected["PromptTooLongError in worker"] = 2
    assert row["failed_by_reason"] == expected
    assert row["episodes"] == 2 * len(kinds) == row["episodes_failed"] + 4
    assert row["threads_hung"] >= 2
    assert row["out_of_memory"] == 1
    assert row["agents"]["worker"]["calls"] == 4
    learnt = [episode for episode in trained_on if episode.ok]
    assert [episode.example["kind"] for episode in learnt] == ["none"] * 4
    page = result.report.read_text(encoding="utf-8")
    for reason, count in expected.items():
        assert f"<td>{reason}</td><td>{count}</td>" in page
    assert "threads at once were left behind" in page
    assert "ran out of memory 1 times" in page


def test_a_run_in_which_too_many_episodes_fail_stops_with_the_top_reasons(
    make: Callable[..., Trainer], tiny_model: Path, release: threading.Event
) -> None:
    kinds = ["parser"] * 3 + ["node"] * 2 + ["none"] * 4
    settings = config(
        tiny_model,
        examples_per_iteration=len(kinds),
        advantage="gae",
        group_size=1,
        max_failed_share=0.5,
        nodes=("worker",),
    )
    examples = [{"kind": kind} for kind in kinds]
    with make(app(release), train_dataset=examples, eval_dataset=None, config=settings,
              reward=reward) as trainer:  # fmt: skip
        with pytest.raises(EpisodesFailedError) as stopped:
            trainer.train(progress=False)
        assert (
            "5 of 9 episodes of iteration 1 failed, more than max_failed_share=0.5 allows: "
            "StructuredOutputError in worker (3x), ValueError in worker (2x)"
        ) in str(stopped.value)
        assert read_metrics(trainer.run_dir) == []  # nothing was trained on the rest
        page = (trainer.run_dir / "report.html").read_text(encoding="utf-8")
    assert "The run was stopped:</b> 5 of 9 episodes" in page
    assert "StructuredOutputError in worker (3x)" in page
