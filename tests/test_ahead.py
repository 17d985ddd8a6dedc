"""Rollouts beside the update: which weights sample, what is learnt, and what ends them."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from marft_graph import TrainConfig, Trainer
from marft_graph.agents import agents_of
from marft_graph.data import training_data
from marft_graph.engine.routing import local_engine
from marft_graph.episode import Call, Episode
from marft_graph.errors import ConfigError, EngineError, RewardError
from marft_graph.learn.credit import AgentBatch
from marft_graph.learn.update import Learner
from marft_graph.policy.team import Team
from marft_graph.rollout.runner import run_episodes
from marft_graph.run.stopping import Stopped
from marft_graph.run.tracking import read_metrics
from marft_graph.run.trajectories import read_traces
from marft_graph.sampling import check_staleness
from tests.apps import duo
from tests.test_recovery import poison
from tests.test_trainer import adapters, without_times
from tests.training import EXAMPLES, config, reward


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert "marft-ahead" not in {thread.name for thread in threading.enumerate()}


def sampled(run: Path) -> list[list[Episode]]:
    """The episodes of each iteration."""
    return [read_traces(file) for file in sorted((run / "traces").glob("iter_*.parquet"))]


def versions(run: Path) -> list[set[int]]:
    """Versions of the adapters that sampled each iteration's calls."""
    return [{c.adapter_version for e in episodes for c in e.calls} for episodes in sampled(run)]


def examples(run: Path) -> list[list[str]]:
    """Answers of the examples that each iteration took, in order."""
    return [
        list({e.example_index: str(e.example["answer"]) for e in episodes}.values())
        for episodes in sampled(run)
    ]


def in_turn(settings: TrainConfig, staleness: int) -> list[torch.Tensor]:
    """The adapters after a run in which nothing overlaps: old weights are put in to sample."""
    team = Team.load(agents_of(("planner", "actor"), settings), settings)
    engine = local_engine(team)
    learner = Learner(team, settings)
    data = training_data(EXAMPLES, settings.seed)
    kept = [team.copy_weights()]

    @torch.no_grad()
    def put_in(values: Mapping[Any, torch.Tensor]) -> None:
        for parameter, value in values.items():
            parameter.copy_(value)

    for iteration in range(1, settings.iterations + 1):
        version = max(0, iteration - 1 - staleness)
        put_in(kept[version])
        engine.publish(version)
        episodes = run_episodes(
            duo(),
            data.take(settings.examples_per_iteration),
            engine=engine,
            reward=reward,
            seed=settings.seed * 1_000_003 + iteration,
            group_size=settings.group_size,
            max_new_tokens=settings.max_new_tokens,
        )
        put_in(kept[-1])
        learner.update(episodes, iteration)
        kept.append(team.copy_weights())
    engine.close()
    return [p for agent in team.agents for p in team.parameters(agent)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the trainer sets it for so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "staleness",
    [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)],
)
def test_a_run_learns_what_rollouts_and_updates_in_turn_learn_bit_for_bit(
    make: Callable[..., Trainer], tiny_model: Path, one_thread: None, staleness: int
) -> None:
    settings = config(tiny_model, iterations=5, staleness=staleness, learning_rate=1e-2)
    with make(config=settings) as trainer:
        result = trainer.train(progress=False)
        own = list(adapters(trainer).values())
    expected = in_turn(settings, staleness)
    assert len(own) == len(expected) > 0
    for mine, its in zip(own, expected, strict=True):
        assert torch.equal(mine, its)
    lags = [min(staleness, iteration) for iteration in range(5)]
    assert versions(result.run_dir) == [{i - lag} for i, lag in enumerate(lags)]
    rows = read_metrics(result.run_dir)
    assert [row["staleness"] for row in rows] == lags
    stats = [row["agents"]["actor"] for row in rows]
    assert all(("importance_mean" in own) == (staleness > 0) for own in stats)


@pytest.mark.slow
def test_two_runs_with_one_seed_are_equal(make: Callable[..., Trainer], tiny_model: Path) -> None:
    settings = config(
        tiny_model, iterations=5, staleness=2, advantage="gae", filter_rounds=1, minibatches=2
    )
    runs = []
    for name in ("a", "b"):
        with make(run=name, config=settings) as trainer:
            rows = read_metrics(trainer.train(progress=False).run_dir)
            runs.append((without_times(rows), adapters(trainer)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


class Meeting:
    """Lets the update of an iteration and the next one's rollout begin only when both have."""

    def __init__(self) -> None:
        self._updates: dict[int, threading.Event] = {}
        self._rollouts: dict[int, threading.Event] = {}
        self.met: list[int] = []

    def _event(self, events: dict[int, threading.Event], iteration: int) -> threading.Event:
        return events.setdefault(iteration, threading.Event())

    def update(self, iteration: int) -> None:
        self._event(self._updates, iteration).set()
        if self._event(self._rollouts, iteration + 1).wait(30):
            self.met.append(iteration)

    async def rollout(self, iteration: int) -> None:
        self._event(self._rollouts, iteration).set()
        other = self._event(self._updates, iteration - 1)
        await asyncio.to_thread(other.wait, 30)


def test_the_next_rollout_runs_while_the_update_does(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = Meeting()
    update = Learner.update

    def meets(self: Learner, episodes: Any, iteration: int) -> Any:
        if iteration < 3:
            meeting.update(iteration)
        return update(self, episodes, iteration)

    monkeypatch.setattr(Learner, "update", meets)
    seen: list[int] = []

    async def rewarded(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        seen.append(len(seen))
        if (iteration := 1 + seen[-1] // 8) > 1:
            await meeting.rollout(iteration)
        return reward(example, state)

    settings = config(tiny_model, iterations=3, staleness=1, eval_every=0)
    with make(config=settings, reward=rewarded, eval_dataset=None) as trainer:
        rows = read_metrics(trainer.train(progress=False).run_dir)
    assert meeting.met == [1, 2]
    assert rows[1]["seconds_waited"] < rows[1]["seconds_rollout"]


def test_what_older_weights_sampled_is_weighed_by_the_ratio_of_the_policies(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """weight = min(p(token | weights that learn) / p(token | weights that sampled), 2)."""
    score = Learner._score
    seen: list[tuple[float, float]] = []

    def logprobs(self: Learner, call: Call) -> list[float]:
        policy = self._team.of(call.agent)
        ids = torch.tensor([[*call.prompt_ids, *call.completion_ids]])
        with policy.using(call.agent):
            logits = policy.model(input_ids=ids, use_cache=False).logits[0]
        first = len(call.prompt_ids) - 1
        return [
            float(logits[first + i].log_softmax(-1)[token])
            for i, token in enumerate(call.completion_ids)
        ]

    def spy(self: Learner, *args: Any, **kwargs: Any) -> AgentBatch:
        batch = score(self, *args, **kwargs)
        for index, call in enumerate(batch.calls):
            own = batch.importance_N[batch.tokens([index])].tolist()
            now = logprobs(self, call)
            for weight, new, old in zip(own, now, call.logprobs, strict=True):
                ratio = torch.tensor(new - old, dtype=torch.float64).exp().item()
                seen.append((weight, min(ratio, 2.0)))
        return batch

    monkeypatch.setattr(Learner, "_score", torch.no_grad()(spy))
    settings = config(tiny_model, iterations=3, staleness=1, learning_rate=0.05, eval_every=0)
    with make(config=settings, eval_dataset=None) as trainer:
        rows = read_metrics(trainer.train(progress=False).run_dir)
    found, expected = zip(*seen, strict=True)
    assert list(found) == pytest.approx(list(expected), rel=1e-3)
    assert max(found) == 2.0
    assert min(found) < 0.9
    first, last = (row["agents"]["actor"] for row in (rows[0], rows[-1]))
    assert first["importance_mean"] == pytest.approx(1.0, abs=1e-3)
    assert first["importance_capped_share"] == 0
    assert last["importance_capped_share"] > 0


@pytest.mark.slow
def test_an_asynchronous_run_learns(make: Callable[..., Trainer], tiny_model: Path) -> None:
    settings = config(
        tiny_model, iterations=30, staleness=1, learning_rate=1e-2, group_size=8, eval_every=0
    )
    with make(config=settings) as trainer:
        result = trainer.train(progress=False)
    assert result.before is not None
    assert result.after is not None
    assert result.after.return_mean > result.before.return_mean + 0.1


def test_a_resumed_run_is_the_uninterrupted_one(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    settings = config(tiny_model, iterations=5, staleness=2, learning_rate=1e-2)
    with make(run="whole", config=settings) as whole:
        expected = whole.train(progress=False)
    with make(run="part", config=settings.replace(iterations=3)) as part:
        part.train(progress=False)
    with make(run="part", config=settings, resume=True) as rest:
        assert rest.iteration == 3
        result = rest.train(progress=False)
    assert versions(result.run_dir) == versions(expected.run_dir) == [{0}, {0}, {0}, {1}, {2}]
    assert examples(result.run_dir) == examples(expected.run_dir)
    for name, value in adapters(whole).items():
        assert torch.equal(value, adapters(rest)[name])


@pytest.mark.slow
def test_a_resumed_run_may_be_less_stale(make: Callable[..., Trainer], tiny_model: Path) -> None:
    settings = config(tiny_model, iterations=3, staleness=2)
    with make(config=settings) as trainer:
        trainer.train(progress=False)
    fresher = settings.replace(iterations=5, staleness=1)
    with pytest.raises(ConfigError, match="staleness: 2 -> 1"):
        make(config=fresher, resume=True)
    with make(config=fresher, resume=True, accept_changes=["staleness"]) as trainer:
        result = trainer.train(progress=False)
    assert versions(result.run_dir) == [{0}, {0}, {0}, {3}, {3}]


def test_an_error_in_a_rollout_ahead_names_its_iteration_and_loses_nothing(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    calls: list[int] = []
    broken = True

    def fails(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        calls.append(len(calls))
        if broken and len(calls) > 2 * 8:  # in the third iteration
            raise KeyError("oops")
        return reward(example, state)

    settings = config(tiny_model, iterations=5, staleness=1, eval_every=0)
    with make(config=settings, reward=fails, eval_dataset=None, run="part") as trainer:
        with pytest.raises(RewardError, match=r"in the rollout of iteration 3: .*oops"):
            trainer.train(progress=False)
        assert [row["iteration"] for row in read_metrics(trainer.run_dir)] == [1, 2]
    broken = False
    with make(config=settings, reward=fails, eval_dataset=None, run="part", resume=True) as rest:
        assert rest.iteration == 2
        result = rest.train(progress=False)
    with make(config=settings, eval_dataset=None, run="whole") as whole:
        expected = whole.train(progress=False)
    assert without_times(read_metrics(result.run_dir)) == without_times(
        read_metrics(expected.run_dir)
    )
    assert examples(result.run_dir) == examples(expected.run_dir)


def test_a_stopped_run_cancels_the_rollout_ahead_and_goes_on_as_if_nothing_had_been(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    cancelled = threading.Event()
    calls: list[int] = []

    async def hangs(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        calls.append(len(calls))
        if len(calls) > 2 * 8:  # in the third iteration
            begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return reward(example, state)

    update = Learner.update

    def interrupted(self: Learner, episodes: Any, iteration: int) -> Any:
        if iteration == 2 and not cancelled.is_set():
            assert begun.wait(30)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        return update(self, episodes, iteration)

    settings = config(tiny_model, iterations=4, staleness=1, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", interrupted)
        with make(config=settings, reward=hangs, eval_dataset=None, run="part") as trainer:
            with pytest.raises(Stopped):
                trainer.train(progress=False)
            assert "marft-ahead" not in {thread.name for thread in threading.enumerate()}
    assert cancelled.is_set()
    assert [row["iteration"] for row in read_metrics(trainer.run_dir)] == [1, 2]
    with make(config=settings, eval_dataset=None, run="part", resume=True) as rest:
        result = rest.train(progress=False)
    with make(config=settings, eval_dataset=None, run="whole") as whole:
        expected = whole.train(progress=False)
    assert without_times(read_metrics(result.run_dir)) == without_times(
        read_metrics(expected.run_dir)
    )


@pytest.mark.parametrize(
    "is_stream", [pytest.param(False, marks=pytest.mark.slow), True], ids=["list", "stream"]
)
def test_after_a_collapse_the_next_examples_are_sampled_again_by_the_weights_put_back(
    make: Callable[..., Trainer],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_stream: bool,
) -> None:
    poison(monkeypatch, {3})
    data = (example for example in EXAMPLES) if is_stream else EXAMPLES
    settings = config(tiny_model, iterations=5, staleness=2, checkpoint_every=1, eval_every=0)
    with make(config=settings, train_dataset=data) as trainer:
        result = trainer.train(progress=False)
    rows = read_metrics(result.run_dir)
    assert [row["collapsed"] is None for row in rows] == [True, True, False, True, True]
    # What the dropped weights had sampled for iterations 4 and 5 is not there.
    assert versions(result.run_dir) == [{0}, {0}, {0}, {3}, {3}]
    assert [row["staleness"] for row in rows] == [0, 1, 2, 0, 1]
    order = training_data(list(EXAMPLES) if not is_stream else iter(EXAMPLES), settings.seed)
    taken = [example["answer"] for example in order.take(10)]
    assert [answer for own in examples(result.run_dir) for answer in own] == taken


@pytest.mark.slow
def test_training_that_stops_early_leaves_no_rollout_behind(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    settings = config(tiny_model, iterations=50, staleness=2, early_stop=1, learning_rate=1e-9)
    with make(config=settings) as trainer:
        result = trainer.train(progress=False)
        assert "marft-ahead" not in {thread.name for thread in threading.enumerate()}
    assert result.iterations < 50


def episode(*adapter_versions: int, status: str = "ok") -> Episode:
    calls = tuple(
        Call("actor", "actor", i, (), (0,), (1,), (0.0,), "stop", version)
        for i, version in enumerate(adapter_versions)
    )
    return Episode({}, calls, status=status)


def test_calls_of_weights_outside_of_the_bound_are_refused() -> None:
    assert check_staleness([episode(4, 5), episode(3, 5)], 5, 2) == 2
    assert check_staleness([episode(5), episode(0, status="failed: timeout")], 5, 0) == 0
    with pytest.raises(EngineError, match=r"'actor'.*version 2 .*version 5.*3 updates.*0 to 2"):
        check_staleness([episode(4), episode(5, 2)], 5, 2)
    with pytest.raises(EngineError, match=r"version 6 .*version 5"):
        check_staleness([episode(6)], 5, 2)


def test_staleness_decides_the_cap_of_importance_weights() -> None:
    assert TrainConfig().importance_cap is None
    stale = TrainConfig(staleness=1)
    assert stale.importance_cap == 2.0
    assert TrainConfig(staleness=1, importance_cap=5).importance_cap == 5.0
    assert TrainConfig().replace(staleness=1) == stale == TrainConfig.from_mapping(stale.to_dict())
    with pytest.raises(ConfigError, match=r"importance_cap is none, with staleness 1"):
        TrainConfig(staleness=1, importance_cap=None)
    with pytest.raises(ConfigError, match="staleness is -1; it must be at least 0"):
        TrainConfig(staleness=-1)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied:UserWarning")
def test_adapters_without_copies_to_sample_from_cannot_run_ahead(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    embeddings = config(tiny_model, staleness=1, lora_targets=("q_proj", "embed_tokens"))
    with pytest.raises(ConfigError, match=r"staleness is 1, with engine local.*embeddings"):
        make(config=embeddings)
    with make(config=embeddings.replace(staleness=0)):
        pass
