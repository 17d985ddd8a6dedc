"""A real vLLM server on the CPU: exact log-probs, training, and what happens when it fails.

`make vllm-cpu` sets it up; MARFT_VLLM_PYTHON names another environment's Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage, SystemMessage

from marft_graph import TrainConfig, Trainer
from marft_graph.agents import agents_of
from marft_graph.engine.base import GenerationRequest, SamplingSettings
from marft_graph.engine.local import LocalEngine
from marft_graph.engine.vllm.engine import vllm_engine
from marft_graph.engine.vllm.server import ServerProcess, server_command
from marft_graph.errors import EpisodesFailedError
from marft_graph.policy.adapters import Policy
from marft_graph.policy.logprobs import token_logprobs
from marft_graph.policy.team import Team
from marft_graph.run.tracking import read_metrics
from marft_graph.workflow import load_target

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    # A connection that is being opened while its server dies may be left to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[3]
BASE = ROOT / "workflows" / "tiny_base"
ARGUMENTS = ("--enforce-eager", "--max-model-len=512", "--max-num-seqs=64")
AGENTS = ("reasoner", "actor")
WAIT = 600
TOLERANCE = 5e-4
"""Between log-probs of vLLM and of the learner, both in float32: 6e-5 was the largest seen."""


class RealServer:
    """A vLLM server that tests start, stop and restart as they like."""

    def __init__(self, python: str, log: Path) -> None:
        command = server_command(
            str(BASE), dtype="float32", max_rank=16, adapters=3, on_cpu=True, more=ARGUMENTS
        )
        self.process = ServerProcess(python, command, log)
        self.process.api_key = "key-of-the-tests"
        self.url = self.process.url
        self._thread = ThreadPoolExecutor(1)  # a server ends with the thread that started it

    def start(self) -> Future[None]:
        """Start it, or let it go on where it was stopped; done when it serves."""
        return self._thread.submit(self._start)

    def _start(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was killed
            self.send(signal.SIGCONT)
        deadline = time.monotonic() + WAIT
        while not self._is_answering():
            assert time.monotonic() < deadline, self.process.log.read_text()[-2000:]
            self.process.ensure_running()
            time.sleep(0.5)
        self.process.has_served = True
        self.process.restarts = 0

    def send(self, number: signal.Signals) -> None:
        if self.process.pid is not None:
            os.killpg(self.process.pid, number)

    def _is_answering(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False


@pytest.fixture(scope="module")
def pair(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RealServer]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        logs = tmp_path_factory.mktemp("vllm")
        started = [RealServer(vllm_python, logs / f"{n}.log") for n in range(2)]
        try:
            yield started
        finally:
            for server in started:
                server.process.stop()


@pytest.fixture
def servers(pair: list[RealServer], monkeypatch: pytest.MonkeyPatch) -> list[RealServer]:
    monkeypatch.setenv("VLLM_API_KEY", "key-of-the-tests")
    for server in pair:
        server.start().result(WAIT)
    return pair


@pytest.fixture(scope="module")
def policy() -> Policy:
    settings = TrainConfig(base_model=str(BASE), device="cpu")
    policy = Team.load(agents_of(AGENTS, settings), settings).policies[0]
    torch.manual_seed(1)
    for parameters in policy.adapter_parameters.values():
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.05)
    return policy


def recomputed(policy: Policy, request: GenerationRequest, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probs of a completion from the learner's model."""
    sequence = torch.tensor([request.prompt_ids + ids])
    with policy.using(request.agent), torch.no_grad():
        states = policy.hidden(sequence)[0, len(request.prompt_ids) - 1 : -1]
        temperature = torch.full((len(ids),), request.sampling.temperature)
        target = torch.tensor(ids)
        return token_logprobs(states, target, temperature, policy.logits, policy.vocabulary)[0]


def requests_of(policy: Policy) -> list[GenerationRequest]:
    """Both adapters and the base, four temperatures, two limits, in one batch."""
    made = []
    for i in range(48):
        question = f"Ann has {i} eggs and buys {i // 2}. How many?"
        prompt = policy.codec.render([SystemMessage("Write."), HumanMessage(question)])
        sampling = SamplingSettings((1.0, 0.6, 0.0, 1.5)[i % 4], (24, 3)[i % 5 == 0])
        made.append(GenerationRequest((None, *AGENTS)[i % 3], prompt, sampling, seed=2**62 + i))
    return made


def test_logprobs_are_the_learners_and_greedy_answers_the_local_engines(
    policy: Policy, servers: list[RealServer], tmp_path: Path
) -> None:
    settings = TrainConfig(
        base_model=str(BASE), engine="vllm", engine_urls=[server.url for server in servers]
    )
    team = Team([policy], AGENTS)
    engine = vllm_engine(team, agents_of(AGENTS, settings), settings, tmp_path)
    local = LocalEngine(policy)
    try:
        engine.publish(1)
        requests = requests_of(policy)
        completions = [f.result(WAIT) for f in [engine.submit(r) for r in requests]]
        greedy = [request for request in requests if request.sampling.temperature == 0]
        # Stop strings out of the middle of what is answered without them.
        for request in list(greedy):
            text = policy.codec.decode(local.submit(request).result(WAIT).ids)
            if len(text) > 2:
                stopped = dataclasses.replace(request.sampling, stop=("\x00", text[1:3]))
                greedy.append(dataclasses.replace(request, sampling=stopped))
        pairs = [
            (engine.submit(request).result(WAIT), local.submit(request).result(WAIT))
            for request in greedy
        ]
    finally:
        engine.close()
        local.close()
    for request, completion in zip(requests, completions, strict=True):
        own = recomputed(policy, request, completion.ids)
        assert torch.allclose(torch.tensor(completion.logprobs), own, atol=TOLERANCE)
        assert completion.adapter_version == 1
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert sum(len(set(r.sampling.stop)) > 0 for r in greedy) >= 4
    for (theirs, ours), request in zip(pairs, greedy, strict=True):
        assert theirs.ids == ours.ids, request.sampling
        assert theirs.finish_reason == ours.finish_reason
        assert torch.allclose(
            torch.tensor(theirs.logprobs), torch.tensor(ours.logprobs), atol=TOLERANCE
        )


Reward = Callable[[Mapping[str, Any], Mapping[str, Any]], float]


def duo(run_dir: Path, reward: Reward | None = None, **settings: Any) -> Trainer:
    """A short training of math_duo."""
    workflow = load_target(str(ROOT / "workflows" / "math_duo"))
    config = TrainConfig(
        base_model=str(BASE),
        device="cpu",
        engine="vllm",
        advantage="group",
        iterations=3,
        examples_per_iteration=4,
        group_size=4,
        max_new_tokens=12,
        learning_rate=1e-3,
        eval_every=0,
        **settings,
    )
    from workflows.math_duo import task

    return Trainer(
        workflow.graph,
        train_dataset=task.generate()[0],
        reward=reward or task.reward,
        config=config,
        run_dir=run_dir,
    )


def at_call(number: int, act: Callable[[], None]) -> Reward:
    """The reward of math_duo, which once does something in the middle of a rollout."""
    from workflows.math_duo import task

    count, lock = 0, threading.Lock()

    def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        nonlocal count
        with lock:
            count += 1
            if count == number:
                act()
        return float(task.reward(example, state))

    return reward


def test_a_server_of_the_runs_own_trains_math_duo_and_ends_with_it(
    vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with duo(tmp_path / "run", vllm_python=vllm_python, vllm_args=ARGUMENTS) as trainer:
        trainer.train(progress=False)
        url = trainer._engine._pool._fleet.servers[0].endpoint.url
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 3
    for row in rows:
        assert row["episodes_failed"] == 0
        assert row["engine"]["servers_up"] == 1
        # One step on what was sampled: the engine's log-probs were the learner's.
        assert all(abs(agent["kl"]) < 0.05 for agent in row["agents"].values())
    assert (tmp_path / "run" / "vllm.log").stat().st_size > 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/health", timeout=5)


def test_one_of_two_servers_is_killed_and_the_run_goes_on_and_says_so(
    servers: list[RealServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward = at_call(20, lambda: servers[0].send(signal.SIGKILL))
    urls = [server.url for server in servers]
    with (
        caplog.at_level(logging.WARNING, "marft_graph"),
        duo(tmp_path / "run", reward, engine_urls=urls) as trainer,
    ):
        trainer.train(progress=False)
    rows = read_metrics(tmp_path / "run")
    assert [row["episodes_failed"] for row in rows] == [0, 0, 0]
    assert rows[-1]["engine"]["servers_up"] == 1
    assert f"a vLLM server cannot be used (1 of 2 can): {urls[0]}" in caplog.text


def test_the_only_server_is_restarted_on_its_port_and_the_run_goes_on(
    servers: list[RealServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = servers[0]

    def restart() -> None:
        server.send(signal.SIGKILL)
        server.start()

    with (
        caplog.at_level(logging.WARNING, "marft_graph"),
        duo(tmp_path / "run", at_call(20, restart), engine_urls=[server.url]) as trainer,
    ):
        trainer.train(progress=False)
    rows = read_metrics(tmp_path / "run")
    assert [row["episodes_failed"] for row in rows] == [0, 0, 0]
    assert f"the vLLM server {server.url} is back" in caplog.text


def test_a_server_that_is_stopped_for_a_while_goes_on_with_the_run(
    servers: list[RealServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = servers[0]
    going_on = threading.Timer(40.0, server.send, (signal.SIGCONT,))

    def stop() -> None:
        server.send(signal.SIGSTOP)
        going_on.start()

    with (
        caplog.at_level(logging.WARNING, "marft_graph"),
        duo(tmp_path / "run", at_call(20, stop), engine_urls=[server.url]) as trainer,
    ):
        trainer.train(progress=False)
    going_on.join(WAIT)
    assert [row["episodes_failed"] for row in read_metrics(tmp_path / "run")] == [0, 0, 0]
    assert f"the vLLM server {server.url} is back" in caplog.text


def test_a_server_that_stays_stopped_ends_the_run_with_the_reason(
    servers: list[RealServer], tmp_path: Path
) -> None:
    server = servers[0]
    reward = at_call(20, lambda: server.send(signal.SIGSTOP))
    settings = {"engine_urls": [server.url], "engine_patience": 10.0, "engine_timeout": 60.0}
    started = time.monotonic()
    with (
        duo(tmp_path / "run", reward, **settings) as trainer,
        pytest.raises(EpisodesFailedError) as caught,
    ):
        trainer.train(progress=False)
    server.send(signal.SIGCONT)
    assert "no vLLM server has answered for 10 seconds (engine_patience)" in str(caught.value)
    assert f"{server.url}/health did not answer within 10 seconds" in str(caught.value)
    assert time.monotonic() - started < 300
