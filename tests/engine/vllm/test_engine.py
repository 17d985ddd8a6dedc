"""The vLLM engine against a stand-in server: versions, their adapters, and training through it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from safetensors.torch import load_file

from marft_graph import Trainer
from marft_graph.agents import agents_of
from marft_graph.config import TrainConfig
from marft_graph.engine.base import GenerationRequest, SamplingSettings
from marft_graph.engine.vllm.engine import VllmEngine, base_probe, vllm_engine
from marft_graph.errors import ConfigError, EngineError, EpisodesFailedError, PromptTooLongError
from marft_graph.policy.team import Team
from marft_graph.run.tracking import read_metrics
from tests.engine.vllm.stand_in import StandIn
from tests.training import config

WAIT = 60


def stand_in(model: Path) -> StandIn:
    """A server that says of itself that it serves a model."""
    settings = TrainConfig(base_model=str(model), device="cpu")
    probe = base_probe(Team.load(agents_of(["actor"], settings), settings).policies[0])
    order = sorted(range(len(probe.logprobs)), key=lambda token: -probe.logprobs[token])
    server = StandIn()
    server.likeliest = {token: probe.logprobs[token] for token in order[:5]}
    return server


@pytest.fixture
def server(tiny_model: Path) -> Iterator[StandIn]:
    started = stand_in(tiny_model)
    yield started
    started.thaw()
    started.may_answer.set()
    started.kill()


@pytest.fixture
def team(tiny_model: Path) -> Team:
    settings = TrainConfig(base_model=str(tiny_model), device="cpu")
    team = Team.load(agents_of(["reasoner", "actor"], settings), settings)
    torch.manual_seed(1)
    for agent in team.agents:
        for parameter in team.parameters(agent):
            torch.nn.init.normal_(parameter, std=0.1)
    return team


@pytest.fixture
def engine(team: Team, server: StandIn, tiny_model: Path, tmp_path: Path) -> Iterator[VllmEngine]:
    settings = config(tiny_model, engine="vllm", engine_urls=[server.url], engine_patience=30)
    engine = vllm_engine(team, agents_of(team.agents, settings), settings, tmp_path)
    yield engine
    engine.close()


def ask(engine: VllmEngine, agent: str | None = "actor", **changes: Any) -> GenerationRequest:
    ids = engine.codec(agent).render([HumanMessage("word")])
    settings = {"sampling": SamplingSettings(max_tokens=8), "seed": 1, **changes}
    return GenerationRequest(agent, ids, **settings)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def versions(server: StandIn) -> set[str]:
    return {name.partition("-")[0] for name in server.adapters}


def test_a_completion_says_the_version_that_was_published(
    engine: VllmEngine, server: StandIn
) -> None:
    engine.publish(3)
    assert versions(server) == {"reasoner@v3", "actor@v3"}
    completion = engine.submit(ask(engine)).result(WAIT)
    assert completion.adapter_version == 3
    assert len(completion.ids) == len(completion.logprobs) > 0
    assert server.requests[-1]["model"].startswith("actor@v3-")
    assert server.requests[-1]["stop_token_ids"] == sorted(engine._policy.end_ids)


def test_the_servers_get_the_weights_as_they_were_published(
    engine: VllmEngine, server: StandIn, team: Team
) -> None:
    engine.publish(1)
    (folder,) = [Path(p) for n, p in server.adapters.items() if n.startswith("actor@")]
    assert folder.is_absolute()
    saved = load_file(folder / "adapter_model.safetensors")
    own = team.parameters("actor")
    mine = sorted(parameter.detach().flatten()[:3].tolist() for parameter in own)
    assert sorted(weight.flatten()[:3].tolist() for weight in saved.values()) == mine
    with torch.no_grad():
        for parameter in own:
            parameter.add_(1.0)
    again = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_the_servers_get_copies_of_the_weights_where_copies_are_published(
    engine: VllmEngine, server: StandIn, team: Team
) -> None:
    copies = {parameter: parameter.detach() + 1 for parameter in team.parameters("actor")}
    engine.publish(1, copies)
    (folder,) = [Path(p) for n, p in server.adapters.items() if n.startswith("actor@")]
    saved = load_file(folder / "adapter_model.safetensors")
    expected = sorted(copy.flatten()[:3].tolist() for copy in copies.values())
    assert sorted(weight.flatten()[:3].tolist() for weight in saved.values()) == expected


def test_an_old_version_is_unloaded_once_nobody_asks_for_it(
    engine: VllmEngine, server: StandIn
) -> None:
    engine.publish(1)
    old = [Path(path) for path in server.adapters.values()]
    server.may_answer.clear()
    future = engine.submit(ask(engine))
    wait_for(lambda: server.running == 1)
    engine.publish(2)
    later = engine.submit(ask(engine))
    assert versions(server) == {"reasoner@v1", "actor@v1", "reasoner@v2", "actor@v2"}
    assert all(path.is_dir() for path in old)
    server.may_answer.set()
    assert future.result(WAIT).adapter_version == 1
    assert later.result(WAIT).adapter_version == 2
    wait_for(lambda: versions(server) == {"reasoner@v2", "actor@v2"})
    wait_for(lambda: not any(path.exists() for path in old))


def test_a_version_published_again_is_another_model(engine: VllmEngine, server: StandIn) -> None:
    engine.publish(5)
    first = set(server.adapters)
    engine.publish(5)
    wait_for(lambda: len(server.adapters) == 2)
    assert not first & set(server.adapters)


def test_an_answer_from_another_version_is_an_error(engine: VllmEngine, server: StandIn) -> None:
    engine.publish(1)
    stale = next(iter(server.adapters))
    engine.publish(2)
    server.fault = lambda answer: {**answer, "model": stale}
    with pytest.raises(EngineError, match=f"from model 'actor@v2-.*, not from '{stale}'"):
        engine.submit(ask(engine)).result(WAIT)


def test_the_base_is_asked_as_an_adapter_that_changes_nothing(
    engine: VllmEngine, server: StandIn
) -> None:
    engine.publish(1)
    engine.submit(ask(engine, agent=None)).result(WAIT)
    asked = server.requests[-1]["model"]
    assert asked.startswith("base@")
    saved = load_file(Path(server.adapters[asked]) / "adapter_model.safetensors")
    assert not any(weight.any() for weight in saved.values())


def test_what_cannot_be_asked_is_refused_at_once(engine: VllmEngine) -> None:
    with pytest.raises(EngineError, match="call publish"):
        engine.submit(ask(engine))
    engine.publish(1)
    with pytest.raises(EngineError, match=r"no adapter 'critic'.*reasoner, actor"):
        engine.submit(GenerationRequest("critic", (1,), SamplingSettings()))
    with pytest.raises(PromptTooLongError, match="has 256 tokens"):
        engine.submit(GenerationRequest("actor", (1,) * 256, SamplingSettings()))
    with pytest.raises(ConfigError, match="constrain_output"):
        engine.submit(ask(engine, grammar="{}"))
    for temperature in (0.001, 2.5):
        with pytest.raises(ConfigError, match=r"between 0\.01 and 2"):
            engine.submit(ask(engine, sampling=SamplingSettings(temperature)))


def test_closing_unloads_and_removes_what_was_published(
    engine: VllmEngine, server: StandIn, tmp_path: Path
) -> None:
    engine.publish(1)
    engine.close()
    assert server.adapters == {}
    assert not (tmp_path / "served_adapters").exists()
    with pytest.raises(EngineError, match="closed"):
        engine.publish(2)
    with pytest.raises(EngineError, match="closed"):
        engine.submit(ask(engine))


def test_an_engine_that_nobody_holds_ends_its_thread(
    team: Team, server: StandIn, tiny_model: Path, tmp_path: Path
) -> None:
    settings = config(tiny_model, engine="vllm", engine_urls=[server.url])
    engine = vllm_engine(team, agents_of(team.agents, settings), settings, tmp_path)
    engine.publish(1)
    thread = engine._pool._thread
    assert thread.is_alive()
    del engine
    thread.join(WAIT)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"engine_urls": ["http://h:1"]}, "engine_urls needs engine vllm"),
        ({"engine": "vllm", "engine_urls": ["h:1"]}, "like http://127.0.0.1:8000"),
        ({"engine": "vllm", "engine_urls": ["http://h:1"] * 2}, "names a server twice"),
        ({"engine": "vllm", "vllm_python": "no/python"}, "vllm_python is 'no/python'"),
        ({"engine": "vllm", "quantization": "4bit"}, "quantization is 4bit"),
        (
            {"engine": "vllm", "engine_urls": ["http://h:1"], "constrain_output": True},
            "constrain_output is not supported with engine vllm",
        ),
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


def test_several_base_models_are_refused(make: Callable[..., Trainer], tiny_model: Path) -> None:
    other = tiny_model.parent / "." / tiny_model.name / ".." / tiny_model.name
    settings = {"engine": "vllm", "engine_urls": ["http://h:1"]}
    with pytest.raises(ConfigError, match="2 base models"):
        make(config=config(tiny_model, per_node={"actor": {"base_model": f"{other}"}}, **settings))


@pytest.mark.parametrize("staleness", [0, 1])
def test_training_samples_every_iteration_from_the_version_before_it(
    make: Callable[..., Trainer],
    tiny_model: Path,
    server: StandIn,
    tmp_path: Path,
    staleness: int,
) -> None:
    """Or from the one that is so many updates older."""
    settings = config(
        tiny_model,
        iterations=2 + staleness,
        staleness=staleness,
        eval_every=0,
        engine="vllm",
        engine_urls=[server.url],
    )
    with make(config=settings, eval_dataset=None) as trainer:
        trainer.train(progress=False)
    asked = [request["model"].partition("-")[0] for request in server.requests]
    assert asked == sorted(asked, key=lambda name: name[-1])
    assert set(asked) == {"planner@v0", "actor@v0", "planner@v1", "actor@v1"}
    rows = read_metrics(tmp_path / "run")
    assert [row["engine"]["servers_up"] for row in rows] == [1] * (2 + staleness)
    assert [row["staleness"] for row in rows] == [0, *[staleness] * (1 + staleness)]
    assert not (tmp_path / "run" / "served_adapters").exists()


def test_training_goes_on_and_says_so_when_one_of_two_servers_dies(
    make: Callable[..., Trainer],
    tiny_model: Path,
    server: StandIn,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = stand_in(tiny_model)
    asked = []

    def dies_at_the_tenth(answer: dict[str, Any]) -> dict[str, Any] | None:
        asked.append(answer)
        if len(asked) == 10:
            other.kill()
        return answer if len(asked) < 10 else None

    other.fault = dies_at_the_tenth
    urls = [server.url, other.url]
    settings = config(tiny_model, iterations=4, eval_every=0, engine="vllm", engine_urls=urls)
    with (
        caplog.at_level(logging.WARNING, "marft_graph"),
        make(config=settings, eval_dataset=None) as trainer,
    ):
        trainer.train(progress=False)
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 4
    assert sum(row["episodes_failed"] for row in rows) == 0
    assert rows[-1]["engine"]["servers_lost"] == 1
    assert f"a vLLM server cannot be used (1 of 2 can): {other.url}" in caplog.text


def test_training_stops_with_the_reason_when_no_server_is_left(
    make: Callable[..., Trainer], tiny_model: Path, server: StandIn
) -> None:
    server.fault = lambda answer: server.kill()
    settings = config(tiny_model, engine="vllm", engine_urls=[server.url], engine_patience=1)
    with (
        make(config=settings, eval_dataset=None) as trainer,
        pytest.raises(EpisodesFailedError) as caught,
    ):
        trainer.train(progress=False)
    assert "no vLLM server has answered for 1 seconds" in str(caught.value)
    assert server.url in str(caught.value)


def test_a_run_whose_server_is_not_there_stops_with_the_reason(
    make: Callable[..., Trainer], tiny_model: Path, server: StandIn
) -> None:
    server.kill()
    settings = config(tiny_model, engine="vllm", engine_urls=[server.url], engine_patience=1)
    told = f"{server.url}/health: ConnectError"
    with make(config=settings) as trainer, pytest.raises(EngineError, match=told):
        trainer.train(progress=False)
