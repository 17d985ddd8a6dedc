"""A pool of vLLM servers: a server's fault leads to another's answer, or to an error with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marft_graph.engine.base import SamplingSettings
from marft_graph.engine.vllm.endpoint import Adapter, Endpoint, Probe, Prompt, ServerRefusal
from marft_graph.engine.vllm.fleet import Server
from marft_graph.engine.vllm.pool import ServerPool
from marft_graph.errors import CallTimeoutError, ConfigError, EngineError, PromptTooLongError
from tests.engine.vllm.stand_in import StandIn

ACTOR = Adapter("actor@v1", Path("/adapters/actor"))
PROBE = Probe((1, 2, 3), [-1.0 - k for k in range(262)])  # as the stand-in says
WAIT = 60
Make = Callable[..., ServerPool]


def prompt(seed: int = 0, *, length: int = 3, temperature: float = 1.0, limit: int = 8) -> Prompt:
    sampling = SamplingSettings(temperature, limit)
    return Prompt(tuple(range(1, length + 1)), sampling, seed, (256,), 262)


@pytest.fixture
def servers() -> Iterator[list[StandIn]]:
    started = [StandIn(), StandIn()]
    yield started
    for server in started:
        server.thaw()
        server.may_answer.set()
        server.kill()


@pytest.fixture
def make() -> Iterator[Make]:
    pools = []

    def build(
        servers: list[StandIn], *, timeout: float = 20.0, key: str = "", **settings: Any
    ) -> ServerPool:
        endpoints = [Endpoint(s.url, api_key=key, timeout=timeout) for s in servers]
        settings = {"patience": 30.0, "probe_seconds": 0.5, **settings}
        pools.append(ServerPool([Server(endpoint) for endpoint in endpoints], **settings))
        pools[-1].start(PROBE)
        return pools[-1]

    yield build
    for pool in pools:
        pool.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_call_past_its_own_deadline_fails_alone(servers: list[StandIn], make: Make) -> None:
    pool = make(servers[:1], in_flight=2)
    servers[0].may_answer.clear()
    asked, waiting, patient = (
        pool.submit(ACTOR, prompt(1), 0.3),
        pool.submit(ACTOR, prompt(2), 0.3),
        pool.submit(ACTOR, prompt(3), WAIT),
    )
    for late in (asked, waiting):
        with pytest.raises(CallTimeoutError, match=r"actor@v1 .* within 0.3 seconds"):
            late.result(WAIT)
    wait_for(lambda: servers[0].running == 1)  # the late calls were taken back
    servers[0].may_answer.set()
    assert patient.result(WAIT).ids
    assert pool.stats()["calls_retried"] == 0


def test_calls_are_spread_over_the_servers(servers: list[StandIn], make: Make) -> None:
    pool = make(servers)
    pool.load([ACTOR])
    wait_for(lambda: pool.stats()["servers_up"] == 2)
    for server in servers:
        server.may_answer.clear()
    futures = [pool.submit(ACTOR, prompt(seed)) for seed in range(10)]
    wait_for(lambda: [server.running for server in servers] == [5, 5])
    for server in servers:
        server.may_answer.set()
    assert all(len(future.result(WAIT).ids) > 0 for future in futures)


def test_a_server_gets_no_more_calls_at_once_than_allowed(
    servers: list[StandIn], make: Make
) -> None:
    pool = make(servers[:1], in_flight=3)
    pool.load([ACTOR])
    servers[0].may_answer.clear()
    futures = [pool.submit(ACTOR, prompt(seed)) for seed in range(20)]
    wait_for(lambda: servers[0].running == 3)
    servers[0].may_answer.set()
    for future in futures:
        future.result(WAIT)
    assert servers[0].most_running == 3


FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "http 500": lambda answer: 500,
    "no json": lambda answer: "<html>gateway</html>",
    "closed connection": lambda answer: None,
    "another model": lambda answer: {**answer, "model": "actor@v0"},
    "no token ids": lambda answer: {
        **answer,
        "choices": [{**answer["choices"][0], "token_ids": None}],
    },
    "no choices": lambda answer: {**answer, "choices": []},
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_one_server_answers_wrongly_another_answers(
    servers: list[StandIn], make: Make, name: str
) -> None:
    pool = make(servers)
    pool.load([ACTOR])
    wait_for(lambda: pool.stats()["servers_up"] == 2)
    servers[0].fault = FAULTS[name]
    futures = [pool.submit(ACTOR, prompt(seed)) for seed in range(12)]
    for future in futures:
        assert 0 < len(future.result(WAIT).ids) <= 8
    assert pool.stats()["calls_retried"] >= 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("http 500", "answered HTTP 500: .*an injected fault"),
        ("no json", "should have answered JSON; it was <html>gateway</html>"),
        ("closed connection", "/v1/completions: RemoteProtocolError"),
        ("another model", "should have answered from model 'actor@v1', not from 'actor@v0'"),
        ("no token ids", "should have answered token_ids, 1 to 8"),
    ],
)
def test_where_no_server_answers_rightly_the_error_names_it_and_what_it_said(
    servers: list[StandIn], make: Make, name: str, told: str
) -> None:
    pool = make(servers[:1])
    pool.load([ACTOR])
    servers[0].fault = FAULTS[name]
    with pytest.raises(EngineError, match=told) as caught:
        pool.submit(ACTOR, prompt()).result(WAIT)
    assert servers[0].url in str(caught.value)
    assert "actor@v1" in str(caught.value)


def test_a_server_that_keeps_answering_wrongly_is_left_alone_for_a_while(
    servers: list[StandIn], make: Make
) -> None:
    pool = make(servers)
    pool.load([ACTOR])
    wait_for(lambda: pool.stats()["servers_up"] == 2)
    servers[0].fault = FAULTS["no json"]
    while pool.stats()["servers_lost"] == 0:
        assert len(servers[0].requests) < 3
        pool.submit(ACTOR, prompt()).result(WAIT)
    assert len(servers[0].requests) == 3


def test_a_server_that_is_killed_is_told_of_once_and_the_other_goes_on(
    servers: list[StandIn], make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make(servers)
    pool.load([ACTOR])
    wait_for(lambda: pool.stats()["servers_up"] == 2)
    for server in servers:
        server.may_answer.clear()
    futures = [pool.submit(ACTOR, prompt(seed)) for seed in range(12)]
    wait_for(lambda: servers[0].running + servers[1].running == 12)
    with caplog.at_level(logging.WARNING, "marft_graph"):
        servers[0].kill()
        servers[1].may_answer.set()
        for future in futures:
            future.result(WAIT)
        wait_for(lambda: pool.stats()["servers_lost"] == 1)
        time.sleep(1.2)  # some looks later
    lost = [r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage()]
    assert len(lost) == 1
    assert servers[0].url in lost[0]
    assert "(1 of 2 can)" in lost[0]


def test_a_server_that_hangs_loses_its_calls_to_the_other(
    servers: list[StandIn], make: Make
) -> None:
    pool = make(servers, timeout=600.0)
    pool.load([ACTOR])
    wait_for(lambda: pool.stats()["servers_up"] == 2)
    servers[0].freeze()
    futures = [pool.submit(ACTOR, prompt(seed)) for seed in range(8)]
    for future in futures:
        future.result(WAIT)
    assert pool.stats()["servers_up"] == 1
    servers[0].thaw()
    wait_for(lambda: pool.stats()["servers_up"] == 2)


def test_a_call_that_is_never_answered_ends_with_its_deadline(
    servers: list[StandIn], make: Make
) -> None:
    pool = make(servers[:1], timeout=0.3)
    pool.load([ACTOR])
    servers[0].may_answer.clear()
    with pytest.raises(EngineError, match=r"did not answer within 0\.3 seconds"):
        pool.submit(ACTOR, prompt()).result(WAIT)


def test_a_server_that_was_restarted_gets_its_adapters_again(
    servers: list[StandIn], make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make(servers[:1])
    pool.load([ACTOR])
    with caplog.at_level(logging.WARNING, "marft_graph"):
        servers[0].kill()
        future = pool.submit(ACTOR, prompt())
        wait_for(lambda: pool.stats()["servers_lost"] == 1)
        servers[0].start()
        assert len(future.result(WAIT).ids) > 0
    assert servers[0].adapters == {"actor@v1": "/adapters/actor"}
    assert f"the vLLM server {servers[0].url} is back" in caplog.text


def test_a_server_that_forgot_its_adapters_unseen_gets_them_again(
    servers: list[StandIn], make: Make
) -> None:
    pool = make(servers[:1])
    pool.load([ACTOR])
    servers[0].adapters.clear()
    assert len(pool.submit(ACTOR, prompt()).result(WAIT).ids) > 0
    assert servers[0].adapters == {"actor@v1": "/adapters/actor"}


def test_when_all_servers_stay_away_calls_fail_with_every_reason(
    servers: list[StandIn], make: Make
) -> None:
    pool = make(servers, patience=1.0)
    pool.load([ACTOR])
    for server in servers:
        server.kill()
    with pytest.raises(EngineError, match="no vLLM server has answered for 1 seconds") as caught:
        pool.submit(ACTOR, prompt()).result(WAIT)
    assert all(server.url in str(caught.value) for server in servers)
    with pytest.raises(EngineError, match="no vLLM server has answered"):
        pool.load([ACTOR])


def test_after_a_verdict_a_server_that_comes_back_is_used(
    servers: list[StandIn], make: Make
) -> None:
    pool = make(servers[:1], patience=0.5)
    pool.load([ACTOR])
    servers[0].kill()
    with pytest.raises(EngineError, match="no vLLM server has answered"):
        pool.submit(ACTOR, prompt()).result(WAIT)
    servers[0].start()
    wait_for(lambda: pool.stats()["servers_up"] == 1)
    assert len(pool.submit(ACTOR, prompt()).result(WAIT).ids) > 0


def test_a_cancelled_call_takes_its_request_back(servers: list[StandIn], make: Make) -> None:
    pool = make(servers[:1], in_flight=1)
    pool.load([ACTOR])
    servers[0].may_answer.clear()
    first, second = pool.submit(ACTOR, prompt(1)), pool.submit(ACTOR, prompt(2))
    wait_for(lambda: servers[0].running == 1)
    assert first.cancel()
    wait_for(lambda: servers[0].abandoned == 1)
    servers[0].may_answer.set()
    assert len(second.result(WAIT).ids) > 0
    assert pool.stats()["calls_retried"] == 0


def test_a_cancelled_call_that_waits_gives_its_place_on(servers: list[StandIn], make: Make) -> None:
    pool = make(servers[:1], in_flight=1)
    pool.load([ACTOR])
    servers[0].may_answer.clear()
    futures = [pool.submit(ACTOR, prompt(seed)) for seed in range(6)]
    wait_for(lambda: servers[0].running == 1)
    for future in futures[1:5]:
        assert future.cancel()
    servers[0].may_answer.set()
    assert len(futures[0].result(WAIT).ids) > 0
    assert len(futures[5].result(WAIT).ids) > 0


def test_closing_fails_what_waits(servers: list[StandIn], make: Make) -> None:
    pool = make(servers[:1])
    pool.load([ACTOR])
    servers[0].may_answer.clear()
    future = pool.submit(ACTOR, prompt())
    wait_for(lambda: servers[0].running == 1)
    pool.close()
    with pytest.raises(EngineError, match="closed"):
        future.result(WAIT)
    with pytest.raises(EngineError, match="closed"):
        pool.submit(ACTOR, prompt())


def test_a_server_without_adapter_loading_is_refused_with_what_to_set(
    servers: list[StandIn], make: Make
) -> None:
    servers[0].adapters_at_run_time = False
    pool = make(servers[:1])
    with pytest.raises(ServerRefusal, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        pool.load([ACTOR])


def test_a_wrong_key_is_refused_and_a_right_one_works(servers: list[StandIn], make: Make) -> None:
    servers[0].api_key = "right"
    with pytest.raises(ServerRefusal, match="VLLM_API_KEY"):
        make(servers[:1], key="wrong").load([ACTOR])
    pool = make(servers[:1], key="right")
    pool.load([ACTOR])
    assert len(pool.submit(ACTOR, prompt()).result(WAIT).ids) > 0


def test_logprobs_at_another_temperature_than_the_calls_are_refused(
    servers: list[StandIn], make: Make
) -> None:
    servers[0].scales_logprobs = False
    pool = make(servers[:1])
    pool.load([ACTOR])
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        pool.submit(ACTOR, prompt(temperature=0.7)).result(WAIT)
    for temperature in (0.0, 1.0):
        assert len(pool.submit(ACTOR, prompt(temperature=temperature)).result(WAIT).ids) > 0


@pytest.mark.parametrize("likeliest", [{k: -3.0 - k for k in range(5)}, {400: -1.0, 1: -2.0}])
def test_a_server_of_another_model_is_refused(
    servers: list[StandIn], make: Make, likeliest: dict[int, float]
) -> None:
    servers[0].likeliest = likeliest
    with pytest.raises(ServerRefusal, match="serves another model than base_model"):
        make(servers[:1]).load([ACTOR])


def test_a_server_of_the_same_model_in_another_precision_is_used(
    servers: list[StandIn], make: Make
) -> None:
    servers[0].likeliest = {k: -1.1 - k for k in range(5)}
    pool = make(servers[:1])
    pool.load([ACTOR])
    assert len(pool.submit(ACTOR, prompt()).result(WAIT).ids) > 0


def test_a_servers_shorter_context_limits_the_answer(servers: list[StandIn], make: Make) -> None:
    servers[0].context = 16
    pool = make(servers[:1])
    pool.load([ACTOR])
    pool.submit(ACTOR, prompt(length=12)).result(WAIT)
    assert servers[0].requests[-1]["max_tokens"] == 4
    with pytest.raises(PromptTooLongError, match="max-model-len"):
        pool.submit(ACTOR, prompt(length=16)).result(WAIT)


def test_unloading_reaches_a_server_that_was_away(servers: list[StandIn], make: Make) -> None:
    pool = make(servers)
    pool.load([ACTOR])
    wait_for(lambda: all(s.adapters for s in servers) and pool.stats()["servers_up"] == 2)
    servers[0].freeze()
    wait_for(lambda: pool.stats()["servers_lost"] == 1)
    pool.unload([ACTOR]).result(WAIT)
    assert servers[1].adapters == {}
    servers[0].thaw()
    wait_for(lambda: pool.stats()["servers_up"] == 2)
    assert servers[0].adapters == {}
