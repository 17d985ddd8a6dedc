"""What a rollout worker does in its process, without Ray: the job, the versions, the episodes."""

from __future__ import annotations

import dataclasses
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import marft_graph
from marft_graph import Trainer
from marft_graph.agents import adapters_of, agents_of
from marft_graph.config import TrainConfig, rollout_settings
from marft_graph.engine.routing import local_engine
from marft_graph.engine.vllm.engine import vllm_engine
from marft_graph.episode import Episode
from marft_graph.errors import ConfigError, EngineError, MarftError, RewardError, WorkflowError
from marft_graph.policy.team import Team
from marft_graph.rollout.inputs import AppInputs
from marft_graph.rollout.runner import run_episodes
from marft_graph.workers.cluster import _told
from marft_graph.workers.job import App, Job, Offer, Work, pack_app
from marft_graph.workers.worker import RolloutWorker
from tests.apps import duo
from tests.engine.vllm.test_engine import stand_in, wait_for
from tests.training import EXAMPLES, config, reward

NODES = ("planner", "actor")
FOLDER = """
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
import threading

lock = threading.Lock()

def build():
    model = ChatOpenAI(model="m", api_key="not-set")
    held = threading.Lock()  # what a client of some service might hold
    def answer(state):
        with held:
            return {"messages": [model.invoke(state["messages"])]}
    builder = StateGraph(MessagesState)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    builder.add_edge("answer", END)
    return builder.compile()

graph = build()
"""


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def team(tiny_model: Path) -> Team:
    settings = TrainConfig(base_model=str(tiny_model), device="cpu")
    team = Team.load(agents_of(NODES, settings), settings)
    torch.manual_seed(1)
    for agent in team.agents:
        for parameter in team.parameters(agent):
            torch.nn.init.normal_(parameter, std=0.1)
    return team


def job(settings: TrainConfig, **changes: Any) -> Job:
    agents = agents_of(NODES, settings)
    plain = Job(
        release=marft_graph.__version__,
        app=pack_app(duo(), reward, AppInputs(), None),
        nodes=NODES,
        adapters=adapters_of(agents),
        agents=agents,
        config=settings,
        servers=None,
    )
    return replace(plain, **changes)


def offered(team: Team, name: str = "v3-a", version: int = 3) -> Offer:
    weights = {agent: save(team.of(agent).adapter_weights(agent)) for agent in team.agents}
    return Offer(name, version, weights)


def work(first: int, last: int, offer: str = "v3-a", **changes: Any) -> Work:
    part = tuple(EXAMPLES[first : last + 1])
    return replace(Work(offer, None, part, first, 2, 7, greedy=False), **changes)


def sampled(episodes: list[Episode]) -> list[Any]:
    return [
        (e.example_index, e.seed, e.outcome_reward, [(c.node, c.completion_ids) for c in e.calls])
        for e in episodes
    ]


@pytest.fixture
def worker(tiny_model: Path) -> Iterator[RolloutWorker]:
    worker = RolloutWorker(pickle.loads(pickle.dumps(job(config(tiny_model)))))
    yield worker
    worker.close()


def test_portions_of_workers_are_the_episodes_of_one_process(
    worker: RolloutWorker, team: Team, tiny_model: Path
) -> None:
    engine = local_engine(team)
    engine.publish(3)
    whole = run_episodes(
        duo(),
        EXAMPLES[:5],
        engine=engine,
        reward=reward,
        nodes=NODES,
        seed=7,
        group_size=2,
        **dataclasses.asdict(rollout_settings(config(tiny_model))),
    )
    engine.close()
    offer = offered(team)
    parts = [e for a, b in ((0, 1), (2, 2), (3, 4)) for e in worker.run(work(a, b), lambda: offer)]
    assert [e.error for e in parts] == [""] * 10
    assert sampled(parts) == sampled(whole)
    pairs = [
        (own, other)
        for one, two in zip(parts, whole, strict=True)
        for a, b in zip(one.calls, two.calls, strict=True)
        for own, other in zip(a.logprobs, b.logprobs, strict=True)
    ]
    assert max(abs(own - other) for own, other in pairs) < 1e-4
    assert {call.adapter_version for episode in parts for call in episode.calls} == {3}
    assert [episode.state for episode in parts] == [None] * 10


def test_a_worker_fetches_a_version_once_and_samples_from_no_other(
    worker: RolloutWorker, team: Team
) -> None:
    fetched = []

    def fetch() -> Offer:
        fetched.append(offer.name)
        return offer

    offer = offered(team)
    first = worker.run(work(0, 1), fetch)
    assert sampled(worker.run(work(0, 1), fetch)) == sampled(first)
    assert fetched == ["v3-a"]
    with pytest.raises(EngineError, match="was to sample from v4-b, and was given v3-a"):
        worker.run(work(0, 1, "v4-b"), fetch)
    with torch.no_grad():
        team.parameters("actor")[0].add_(1.0)
    offer = offered(team, "v4-b", 4)
    later = worker.run(work(0, 1, "v4-b"), fetch)
    assert {call.adapter_version for episode in later for call in episode.calls} == {4}
    assert sampled(later) != sampled(first)


def test_weights_of_another_rank_are_refused(worker: RolloutWorker, tiny_model: Path) -> None:
    settings = TrainConfig(base_model=str(tiny_model), device="cpu", lora_rank=2)
    other = Team.load(agents_of(NODES, settings), settings)
    with pytest.raises(MarftError, match=r"v3-a was made with another .* rank"):
        worker.run(work(0, 0), lambda: offered(other))
    with pytest.raises(EngineError, match="was to sample from v3-a, and was given v2"):
        worker.run(work(0, 0), lambda: offered(other, "v2"))  # it is left without a version


def test_another_release_on_the_workers_machine_is_refused(tiny_model: Path) -> None:
    with pytest.raises(EngineError, match=r"and the learner 0\.0\.1; install the same version"):
        RolloutWorker(job(config(tiny_model), release="0.0.1"))


def test_errors_arrive_with_their_class_and_message() -> None:
    class Special(RewardError):
        """One that the other side does not know."""

    def fail() -> None:
        raise Special("the reward function raised KeyError: 'a'")

    assert _told(fail) == (None, ("RewardError", "the reward function raised KeyError: 'a'"))


# The user's code


def holding_a_lock() -> Any:
    spaces: dict[str, Any] = {}
    exec(FOLDER, spaces)
    return spaces["graph"]


def test_a_graph_that_cannot_be_pickled_is_refused_and_told_what_would_do(
    make: Callable[..., Trainer], tiny_model: Path, tmp_path: Path
) -> None:
    told = r"the graph cannot be sent .*cannot pickle '_thread.lock'.*Give `target`.*file.py:variab"
    with pytest.raises(WorkflowError, match=told):
        make(holding_a_lock(), config=config(tiny_model, rollout_workers=1))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()
    with pytest.raises(WorkflowError, match="the reward cannot be sent"):
        pack_app(duo(), lambda example, state: lock.locked(), AppInputs(), None)


def test_with_a_target_the_worker_imports_what_cannot_be_pickled(tmp_path: Path) -> None:
    (tmp_path / "graph.py").write_text(FOLDER, encoding="utf-8")
    (tmp_path / "task.py").write_text(
        "def reward(example, state):\n    return 0.25\n"
        "def inputs(example):\n    return {'messages': [example['question']]}\n",
        encoding="utf-8",
    )
    graph, rewarded, given = pack_app(
        holding_a_lock(), threading.Lock().locked, AppInputs(), str(tmp_path)
    ).load()
    assert "answer" in graph.nodes
    assert rewarded({}, {}) == 0.25
    assert given.inputs is not None
    assert given.inputs({"question": "q"}) == {"messages": ["q"]}


def test_what_the_app_is_called_with_travels_to_the_worker() -> None:
    given = AppInputs(
        context={"user": "ada"},
        configurable=lambda example: {"lang": example["lang"]},
        store={("mem",): {"k": {"v": 1}}},
        on_interrupt=lambda example, state, interrupt: "yes",
    )
    loaded = pickle.loads(pickle.dumps(pack_app(duo(), reward, given, None))).load()[2]
    assert loaded.context == {"user": "ada"}
    assert loaded.configurable({"lang": "de"}) == {"lang": "de"}
    assert loaded.store == {("mem",): {"k": {"v": 1}}}
    assert loaded.on_interrupt({}, {}, None) == "yes"


def test_what_a_target_does_not_have_is_unpickled_or_missed(tmp_path: Path) -> None:
    file = tmp_path / "app.py"
    file.write_text(FOLDER, encoding="utf-8")
    packed = pack_app(holding_a_lock(), reward, AppInputs(), f"{file}:graph")
    assert packed.load()[1] is reward
    with pytest.raises(WorkflowError, match=r"app\.py:graph has no reward"):
        replace(packed, parts={}).load()


def test_a_module_that_the_workers_machine_does_not_have_is_named() -> None:
    packed = App(None, {"graph": b"cno_such_module\nthing\n.", "reward": pickle.dumps(reward)})
    with pytest.raises(
        WorkflowError, match=r"the graph does not load .*no_such_module.*PYTHONPATH"
    ):
        packed.load()


# Servers


def test_a_worker_asks_servers_for_the_version_that_the_learner_published(
    team: Team, tiny_model: Path, tmp_path: Path
) -> None:
    server = stand_in(tiny_model)
    settings = config(
        tiny_model, engine="vllm", engine_urls=[server.url], engine_patience=2, rollout_workers=1
    )
    learner = vllm_engine(team, agents_of(team.agents, settings), settings, tmp_path)
    learner.publish(1)
    servers = pickle.loads(pickle.dumps(learner.for_workers()))
    worker = RolloutWorker(job(settings, servers=servers))

    def offer() -> Offer:
        with learner.held() as held:
            return pickle.loads(pickle.dumps(Offer("first", held.version, held)))

    first = offer()
    try:
        loads = list(server.adapters)
        episodes = worker.run(work(0, 1, "first"), lambda: first)
        assert {call.adapter_version for e in episodes for call in e.calls} == {1}
        assert all(episode.ok for episode in episodes)
        assert list(server.adapters) == loads
        assert {request["model"].partition("-")[0] for request in server.requests} == {
            "planner@v1",
            "actor@v1",
        }
        learner.publish(2)
        second = replace(offer(), name="second")
        later = worker.run(work(0, 1, "second"), lambda: second)
        assert {call.adapter_version for e in later for call in e.calls} == {2}
        stale = replace(first, name="stale")
        with pytest.raises(EngineError, match=r"does not have .*@v1-.*which this run's learner"):
            worker.run(work(0, 1, "stale"), lambda: stale)
        worker.close()
        assert len(server.adapters) == 2
    finally:
        worker.close()
        learner.close()
        server.kill()


def test_a_version_stays_at_the_servers_while_a_rollout_uses_it(
    team: Team, tiny_model: Path, tmp_path: Path
) -> None:
    server = stand_in(tiny_model)
    settings = config(tiny_model, engine="vllm", engine_urls=[server.url], engine_patience=30)
    learner = vllm_engine(team, agents_of(team.agents, settings), settings, tmp_path)
    try:
        learner.publish(1)
        with learner.held() as held:
            used = {adapter.name for adapter in held.own_adapters()}
            learner.publish(2)
            learner.publish(3)
            wait_for(lambda: not any("@v2-" in name for name in server.adapters))
            assert used < set(server.adapters)
        wait_for(lambda: not used & set(server.adapters))
    finally:
        learner.close()
        server.kill()


# Settings


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ray_address": "auto"}, "ray_address needs rollout_workers"),
        ({"worker_gpus": 1.0}, "worker_gpus needs rollout_workers"),
        ({"rollout_workers": 1, "ray_address": "ray://h:1"}, "ray_address is 'ray://h:1'.*gpu-1:6"),
        (
            {
                "rollout_workers": 1,
                "worker_gpus": 1.0,
                "engine": "vllm",
                "engine_urls": ["http://h:1"],
            },
            "worker_gpus needs engine local",
        ),
        (
            {
                "rollout_workers": 1,
                "engine": "vllm",
                "ray_address": "auto",
                "vllm_python": "python3",
            },
            "only this machine can reach.*engine_urls",
        ),
        ({"rollout_workers": -1}, "rollout_workers is -1; it must be between 0 and 65536"),
    ],
)
def test_settings_that_cannot_go_together_are_refused_before_anything_is_written(
    make: Callable[..., Trainer],
    tiny_model: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    told: str,
) -> None:
    with pytest.raises(ConfigError, match=told):
        make(config=config(tiny_model, **settings))
    assert not (tmp_path / "run").exists()


def test_no_cluster_is_an_error_that_names_the_address(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = config(tiny_model, rollout_workers=1, ray_address=address)
    with make(config=settings) as trainer, pytest.raises(EngineError, match=f"no Ray at {address}"):
        trainer.train(progress=False)


def test_without_ray_the_extra_is_named(
    make: Callable[..., Trainer], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ConfigError, match=r"pip install 'marft-graph\[ray\]'"):
        make(config=config(tiny_model, rollout_workers=1))
