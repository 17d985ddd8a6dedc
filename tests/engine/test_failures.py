"""What goes wrong inside an engine reaches the calls that it belongs to, at once and by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from langchain_core.messages import AIMessage

from marft_graph.engine import local
from marft_graph.engine.base import Completion, GenerationRequest, SamplingSettings
from marft_graph.engine.fake import ByteCodec, FakeEngine
from marft_graph.engine.local import LocalEngine
from marft_graph.engine.vllm.calls import Publication, ServedModel, VersionedCalls
from marft_graph.engine.vllm.endpoint import Adapter, Answer
from marft_graph.errors import EngineError
from marft_graph.policy.adapters import Policy
from marft_graph.rollout.runner import run_episodes
from tests.apps import duo
from tests.support import make_agents

AGENTS = ("reasoner", "actor")
SECONDS = 20.0
"""Far more than a failure takes, far less than anybody's time limit."""


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    return Policy.load(str(tiny_model), make_agents(AGENTS, tiny_model))


def request(text: str, agent: str | None = "actor", tokens: int = 4) -> GenerationRequest:
    ids = tuple(10 + ord(letter) % 50 for letter in text)
    return GenerationRequest(agent, ids, SamplingSettings(max_tokens=tokens), seed=1, order=(text,))


def outcome(future: Future[Completion]) -> Any:
    error = future.exception(SECONDS)
    return len(future.result().ids) > 0 if error is None else error


def failing_prefill(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Any], bool]) -> None:
    real = local.prefill

    def prefill(policy: Any, prompts: Any, *args: Any) -> Any:
        if is_bad(prompts):
            raise torch.OutOfMemoryError("no memory for these")
        yield from real(policy, prompts, *args)

    monkeypatch.setattr(local, "prefill", prefill)


def test_a_prompt_that_cannot_be_computed_fails_alone(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = request("bad").prompt_ids
    failing_prefill(monkeypatch, lambda prompts: any(ids == bad for _, ids in prompts))
    engine = LocalEngine(policy)
    futures = [engine.submit(request(text)) for text in ("good", "bad", "also good")]
    outcomes = [outcome(future) for future in futures]
    assert outcomes[0] is outcomes[2] is True
    assert isinstance(outcomes[1], EngineError)
    assert "on a call of actor: OutOfMemoryError: no memory for these" in str(outcomes[1])
    assert isinstance(outcomes[1].__cause__, torch.OutOfMemoryError)
    engine.publish(1)  # nothing is left in the engine
    engine.close()


def test_prompts_that_do_not_fit_together_are_computed_one_by_one(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_prefill(monkeypatch, lambda prompts: len(prompts) > 1)
    engine = LocalEngine(policy)
    plain = LocalEngine(policy)
    futures = [engine.submit(request(text)) for text in ("one", "two", "one", "three")]
    found = [future.result(SECONDS) for future in futures]
    monkeypatch.undo()
    expected = [plain.submit(request(t)).result(SECONDS) for t in ("one", "two", "one", "three")]
    assert [f.ids for f in found] == [e.ids for e in expected]
    engine.close()
    plain.close()


def test_an_error_while_decoding_fails_what_runs_and_serves_what_waits(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(policy, max_batch_size=1)
    real = policy.step

    def step(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(policy, "step", real)
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(policy, "step", step)
    first, second = [engine.submit(request(text)) for text in ("one", "two")]
    assert "RuntimeError: a kernel failed" in str(outcome(first))
    assert outcome(second) is True
    engine.close()


def test_an_error_before_anything_is_taken_fails_all(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(policy)

    class BadGate:
        def wait(self) -> None:
            raise OSError("the gate is stuck")

    engine.use_gate(BadGate())
    assert "OSError: the gate is stuck" in str(outcome(engine.submit(request("one"))))
    engine.close()


@pytest.mark.parametrize("method", ["allowed", "accept"])
def test_a_grammar_that_fails_takes_only_its_own_call_along(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    pytest.importorskip("xgrammar")
    schema = '{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}'
    follow = policy.grammars.follow

    def following(grammar: str) -> Any:
        found = follow(grammar)

        class Broken:
            def __getattr__(self, name: str) -> Any:
                if name == method:
                    raise KeyError("no such state")
                return getattr(found, name)

        return Broken()

    monkeypatch.setattr(policy.grammars, "follow", following)
    engine = LocalEngine(policy)
    held = GenerationRequest(
        "actor", (10, 11), SamplingSettings(max_tokens=4), seed=1, order=("x",), grammar=schema
    )
    futures = [engine.submit(held), engine.submit(request("free"))]
    assert "no such state" in str(outcome(futures[0]))
    assert outcome(futures[1]) is True
    engine.close()


def test_a_token_that_the_model_does_not_know_is_refused_by_name(policy: Policy) -> None:
    engine = LocalEngine(policy)
    unknown = GenerationRequest("actor", (1, policy.vocabulary), SamplingSettings(), 1, (0,))
    with pytest.raises(EngineError, match=f"has the token {policy.vocabulary}, .*those below"):
        engine.submit(unknown)
    engine.close()


def test_an_episode_whose_call_fails_in_the_engine_ends_at_once_with_the_cause(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_prefill(monkeypatch, lambda prompts: True)
    engine = LocalEngine(policy)
    started = time.monotonic()
    names = {"planner": "reasoner"}
    episodes = run_episodes(duo(), [{"question": "q"}] * 2, engine=engine, adapters=names)
    engine.close()
    assert time.monotonic() - started < SECONDS
    assert {episode.status for episode in episodes} == {"failed: EngineError in planner"}
    assert "OutOfMemoryError: no memory for these" in episodes[0].error


def test_a_scripted_answer_that_cannot_be_written_fails_its_own_call() -> None:
    def script(asked: GenerationRequest) -> AIMessage:
        value: Any = object() if asked.seed == 1 else "fine"
        return AIMessage("", tool_calls=[{"name": "f", "args": {"x": value}, "id": "1"}])

    engine = FakeEngine(script)
    bad, good = (
        engine.submit(GenerationRequest("a", (1,), SamplingSettings(max_tokens=9), seed, (seed,)))
        for seed in (1, 2)
    )
    assert isinstance(bad.exception(SECONDS), TypeError)
    assert good.result(SECONDS).ids
    engine.close()


def test_an_answer_arrives_though_an_old_version_cannot_be_retired() -> None:
    answers: list[Future[Any]] = []

    class Pool:
        def submit(self, *_: Any) -> Future[Any]:
            answers.append(Future())
            return answers[-1]

    def retire(publication: Publication) -> None:
        raise OSError("the folder is gone")

    served = ServedModel(("actor",), ByteCodec(), (0,), 300)
    calls = VersionedCalls(served, cast(Any, Pool()), retire)
    adapters = {"actor": Adapter("actor@1", Path("nowhere"))}
    calls.use(Publication(1, Path("nowhere"), cast(Any, adapters)))
    asked = GenerationRequest("actor", (1, 2), SamplingSettings(temperature=1.0), 1, (0,))
    future = calls.submit(asked)
    calls.use(Publication(2, Path("nowhere")))
    answers[0].set_result(Answer((3,), (-0.5,), "stop"))
    assert future.result(SECONDS).ids == (3,)
    with pytest.raises(EngineError, match="version 2 has no adapter 'actor'"):
        calls.submit(asked)
