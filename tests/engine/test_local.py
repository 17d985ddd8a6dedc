"""The local engine: what it stores is exactly what the learner recomputes."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage

from marft_graph.engine import local
from marft_graph.engine.base import Completion, GenerationRequest, SamplingSettings
from marft_graph.engine.cache import bytes_per_token
from marft_graph.engine.local import LocalEngine
from marft_graph.engine.prefixes import Prefixes
from marft_graph.engine.sampler import sample
from marft_graph.errors import (
    CallTimeoutError,
    ConfigError,
    EngineError,
    ModelError,
    PromptTooLongError,
)
from marft_graph.policy import beginning
from marft_graph.policy.adapters import Policy
from marft_graph.policy.logprobs import FORBIDDEN, token_logprobs
from marft_graph.rollout.runner import run_episodes
from tests.apps import Move, duo
from tests.support import make_agents, save_random_model

AGENTS = ("reasoner", "actor")
SCHEMA = json.dumps(Move.model_json_schema())


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    policy = Policy.load(str(tiny_model), make_agents(AGENTS, tiny_model))
    torch.manual_seed(1)
    for parameters in policy.adapter_parameters.values():
        for parameter in parameters:  # adapters that do something, and different things
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def mixed_requests(policy: Policy, count: int) -> list[GenerationRequest]:
    """Prompts of different lengths, three adapters, three temperatures, two limits."""
    requests = []
    for i in range(count):
        prompt = policy.codec.render([HumanMessage("word " * (1 + 5 * (i % 7)))])
        sampling = SamplingSettings(temperature=(1.0, 0.6, 0.0)[i % 3], max_tokens=(5, 24)[i % 2])
        agent = (None, *AGENTS)[i % 3]
        requests.append(GenerationRequest(agent, prompt, sampling, seed=i, order=(i,)))
    return requests


def recomputed(policy: Policy, request: GenerationRequest, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probs of a completion from a plain forward pass of one unpadded sequence."""
    sequence = torch.tensor([request.prompt_ids + ids])
    with policy.using(request.agent), torch.no_grad():
        states = policy.hidden(sequence)[0, len(request.prompt_ids) - 1 : -1]
        temperature = torch.full((len(ids),), request.sampling.temperature)
        allowed = policy.grammars.allowed(request.grammar, ids) if request.grammar else None
        return token_logprobs(
            states, torch.tensor(ids), temperature, policy.logits, policy.vocabulary, allowed
        )[0]


def constrained(request: GenerationRequest) -> GenerationRequest:
    """The same call with room for a `Move` and held to it."""
    sampling = dataclasses.replace(request.sampling, max_tokens=100)
    return dataclasses.replace(request, grammar=SCHEMA, sampling=sampling)


def mixed_grammars(policy: Policy, count: int) -> list[GenerationRequest]:
    """`mixed_requests`, every other one constrained."""
    requests = mixed_requests(policy, count)
    return [constrained(r) if i % 2 else r for i, r in enumerate(requests)]


def test_stored_logprobs_equal_the_recomputation(policy: Policy) -> None:
    engine = LocalEngine(policy)
    requests = mixed_requests(policy, 42)
    futures = [engine.submit(request) for request in requests]
    reasons = set()
    for request, future in zip(requests, futures, strict=True):
        completion = future.result(timeout=60)
        reasons.add(completion.finish_reason)
        expected = recomputed(policy, request, completion.ids)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
    assert reasons == {"stop", "length"}  # ends by end-of-sequence and by limit are both covered
    engine.close()


def test_calls_with_equal_prompts_read_them_once(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beginning, "_SHARED_TOKENS", 8)
    used = []
    attend = beginning.SharedBeginning.attend

    def counted(self: beginning.SharedBeginning, *args: Any) -> torch.Tensor:
        used.append(self.length)
        return attend(self, *args)

    monkeypatch.setattr(beginning.SharedBeginning, "attend", counted)
    requests = [
        dataclasses.replace(prompt, seed=seed, order=(i, seed))
        for i, prompt in enumerate(mixed_requests(policy, 7))
        for seed in range(4)
    ]
    requests = [  # rows of a group leave at different times
        dataclasses.replace(
            r, sampling=dataclasses.replace(r.sampling, temperature=1.0, max_tokens=4 + r.seed * 7)
        )
        for r in requests
    ]
    together = answers(LocalEngine(policy), requests)
    assert used
    assert min(used) >= 8
    for request, completion in zip(requests, together, strict=True):
        assert isinstance(completion, Completion)
        expected = recomputed(policy, request, completion.ids)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
    used.clear()
    engine = LocalEngine(policy)
    alone = [engine.submit(request).result(timeout=60) for request in requests]
    engine.close()
    assert not used
    assert [c.ids for c in alone] == [c.ids for c in together if isinstance(c, Completion)]


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(policy: Policy) -> None:
    engine = LocalEngine(policy)
    requests = mixed_requests(policy, 20)
    together = [f.result(timeout=60) for f in [engine.submit(r) for r in requests]]
    alone = [engine.submit(request).result(timeout=60) for request in requests]
    assert [c.ids for c in alone] == [c.ids for c in together]
    engine.close()


def test_calls_beyond_the_batch_size_wait_their_turn(policy: Policy) -> None:
    engine = LocalEngine(policy, max_batch_size=3)
    requests = mixed_requests(policy, 12)
    few = [f.result(timeout=60) for f in [engine.submit(r) for r in requests]]
    engine.close()
    wide = LocalEngine(policy)
    many = [f.result(timeout=60) for f in [wide.submit(r) for r in requests]]
    wide.close()
    assert [c.ids for c in few] == [c.ids for c in many]


class Start:
    """A gate that opens when it is told to."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def wait(self) -> None:
        assert self.opened.wait(60)


def answers(engine: LocalEngine, requests: list[GenerationRequest]) -> list[Completion | Exception]:
    """What becomes of requests that arrive together."""
    gate = Start()
    engine.use_gate(gate)
    futures = [engine.submit(request) for request in requests]
    gate.opened.set()
    found = [future.exception(timeout=60) or future.result() for future in futures]
    engine.use_gate(None)
    engine.close()
    return found


def test_a_call_that_waits_past_its_deadline_fails_alone(policy: Policy) -> None:
    requests = mixed_requests(policy, 12)
    expected = answers(LocalEngine(policy, max_batch_size=3), requests)
    late = dataclasses.replace(requests[5], order=(5, 1), timeout=1e-6)
    *others, error = answers(LocalEngine(policy, max_batch_size=3), [*requests, late])
    assert isinstance(error, CallTimeoutError)
    assert "reasoner" in str(error) or "actor" in str(error)
    assert "1e-06 seconds (call_timeout); it was waiting for a place" in str(error)
    assert others == expected  # tokens and log-probs, to the last bit


def test_a_call_that_is_decoded_past_its_deadline_fails_alone(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = mixed_requests(policy, 12)
    expected = answers(LocalEngine(policy), requests)
    slow = next(i for i, c in enumerate(expected) if len(c.ids) > 12)
    logits, passes = policy.logits, []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        passes.append(1)
        return logits(*args, **kwargs)

    monkeypatch.setattr(policy, "logits", counted)
    # Time stands still for six passes through the model; then a minute is over.
    monkeypatch.setattr(local.time, "monotonic", lambda: 0.0 if len(passes) < 6 else 60.0)
    requests[slow] = dataclasses.replace(requests[slow], timeout=30.0)
    found = answers(LocalEngine(policy), requests)
    error = found.pop(slow)
    del expected[slow]
    assert isinstance(error, CallTimeoutError)
    assert "30 seconds (call_timeout); it was being answered, with " in str(error)
    assert [c.ids for c in found] == [c.ids for c in expected]
    for own, other in zip(found, expected, strict=True):
        # A batch with a row less may be multiplied in another order.
        assert own.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_an_episode_fails_by_the_name_of_its_calls_deadline(policy: Policy) -> None:
    engine = LocalEngine(policy)
    examples = [{"question": "q"}] * 3
    names = {"planner": "reasoner", "solver": "actor"}
    episodes = run_episodes(duo(), examples, engine=engine, adapters=names, call_timeout=1e-6)
    assert {e.status for e in episodes} == {"failed: CallTimeoutError in planner"}
    (forgiven,) = run_episodes(
        duo(),
        examples[:1],
        engine=engine,
        adapters=names,
        call_timeout=1e-6,
        fault_rewards={"CallTimeoutError": -1.0},
    )
    assert (forgiven.status, forgiven.outcome_reward) == ("ok", -1.0)
    engine.close()


def test_an_answer_in_time_is_the_one_without_a_deadline(policy: Policy) -> None:
    requests = mixed_requests(policy, 6)
    hurried = [dataclasses.replace(request, timeout=60.0) for request in requests]
    assert answers(LocalEngine(policy), hurried) == answers(LocalEngine(policy), requests)


def test_a_stop_string_ends_the_completion_and_stays_in_its_ids(policy: Policy) -> None:
    engine = LocalEngine(policy)
    prompt = policy.codec.render([HumanMessage("hello")])
    free = engine.submit(GenerationRequest("actor", prompt, SamplingSettings(max_tokens=30), 3))
    ids = free.result(timeout=60).ids
    word = policy.codec.decode(ids[2:3])
    first = next(i for i in range(len(ids)) if word in policy.codec.decode(ids[: i + 1]))
    stopping = SamplingSettings(max_tokens=30, stop=(word,))
    stopped = engine.submit(GenerationRequest("actor", prompt, stopping, 3)).result(timeout=60)
    assert stopped.ids == ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert word not in str(policy.codec.parse(stopped.ids, stop=(word,)).content)
    engine.close()


def test_completions_carry_the_published_version(policy: Policy) -> None:
    engine = LocalEngine(policy)
    request = mixed_requests(policy, 1)[0]
    assert engine.submit(request).result(timeout=60).adapter_version == 0
    engine.publish(7)
    assert engine.submit(request).result(timeout=60).adapter_version == 7
    engine.close()


def test_a_prompt_longer_than_the_context_is_refused(policy: Policy) -> None:
    engine = LocalEngine(policy)
    request = GenerationRequest("actor", (0,) * 256, SamplingSettings())
    with pytest.raises(PromptTooLongError, match="256 tokens; the context of 256"):
        engine.submit(request)


def test_a_completion_never_outgrows_the_context(policy: Policy) -> None:
    engine = LocalEngine(policy)
    request = GenerationRequest("actor", (0,) * 250, SamplingSettings(max_tokens=100))
    assert len(engine.submit(request).result(timeout=60).ids) <= 6
    engine.close()


def test_unknown_agents_and_closed_engines_are_refused(policy: Policy) -> None:
    engine = LocalEngine(policy)
    with pytest.raises(EngineError, match="no adapter 'critic'; this engine has reasoner, actor"):
        engine.submit(GenerationRequest("critic", (1,), SamplingSettings()))
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.submit(GenerationRequest("actor", (1,), SamplingSettings()))


def test_closing_fails_what_still_waits(policy: Policy) -> None:
    engine = LocalEngine(policy)
    futures: list[Future[Completion]] = [engine.submit(r) for r in mixed_requests(policy, 30)]
    engine.close()
    for future in futures:
        assert future.done()
        assert future.exception() is None or isinstance(future.exception(), EngineError)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(30_000, 1)
    uniform = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample(logits, torch.ones(30_000), uniform)
    shares = torch.bincount(tokens, minlength=3) / 30_000
    # three standard errors of a share near one half
    assert torch.allclose(shares, torch.softmax(logits[0], -1), atol=0.009)


def test_constrained_calls_always_write_what_their_schema_says(policy: Policy) -> None:
    pytest.importorskip("xgrammar")
    engine = LocalEngine(policy)
    requests = [constrained(request) for request in mixed_requests(policy, 42)]
    completions = [f.result(timeout=60) for f in [engine.submit(r) for r in requests]]
    engine.close()
    moves = [Move.model_validate_json(policy.codec.decode(c.ids)) for c in completions]
    assert {c.finish_reason for c in completions} == {"stop"}
    assert {move.kind for move in moves} == {"go", "stay"}
    assert len({move.steps for move in moves}) > 5


def test_stored_logprobs_of_constrained_calls_equal_the_recomputation(policy: Policy) -> None:
    pytest.importorskip("xgrammar")
    engine = LocalEngine(policy)
    requests = mixed_grammars(policy, 42)
    futures = [engine.submit(request) for request in requests]
    for request, future in zip(requests, futures, strict=True):
        completion = future.result(timeout=60)
        assert completion.is_constrained == bool(request.grammar)
        expected = recomputed(policy, request, completion.ids)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
        if request.grammar:  # the quotes and the colons of a Move are certain
            assert sum(logprob == 0 for logprob in completion.logprobs) > 20
    engine.close()


def test_constrained_neighbours_change_no_free_call(policy: Policy) -> None:
    pytest.importorskip("xgrammar")
    engine = LocalEngine(policy)
    free = mixed_requests(policy, 20)
    alone = [f.result(timeout=60) for f in [engine.submit(r) for r in free]]
    together = [
        f.result(timeout=60) for f in [engine.submit(r) for r in mixed_grammars(policy, 20)]
    ]
    engine.close()
    assert [c.ids for c in together[::2]] == [c.ids for c in alone[::2]]


def test_a_schema_that_cannot_be_compiled_is_refused_to_the_caller(policy: Policy) -> None:
    pytest.importorskip("xgrammar")
    engine = LocalEngine(policy)
    request = dataclasses.replace(mixed_requests(policy, 1)[0], grammar='{"type": "wat"}')
    with pytest.raises(ConfigError, match="xgrammar cannot compile"):
        engine.submit(request)
    engine.close()


def test_a_schema_that_the_model_cannot_write_fails_its_own_call(tmp_path: Path) -> None:
    pytest.importorskip("xgrammar")
    model = save_random_model(tmp_path / "m", without="{")
    own = Policy.load(str(model), make_agents(AGENTS, model))
    engine = LocalEngine(own)
    requests = mixed_grammars(own, 8)
    futures = [engine.submit(request) for request in requests]
    for request, future in zip(requests, futures, strict=True):
        if not request.grammar:
            assert future.result(timeout=60).ids
            continue
        with pytest.raises(ModelError, match=r"no token for what comes next.*'Move'"):
            future.result(timeout=60)
    engine.close()


def test_rounding_never_draws_a_forbidden_token() -> None:
    logits = torch.tensor([[0.0, 1.0, FORBIDDEN]])
    token, logprob = sample(logits, torch.ones(1), torch.ones(1))  # one is out of the range
    assert token.item() == 1
    assert logprob.exp().item() == pytest.approx(torch.softmax(logits[0], -1)[1].item())


def conversation(policy: Policy, agent: str, turns: int) -> tuple[list[tuple[int, ...]], int]:
    """Completions of a growing conversation's turns, and the prompt tokens that were computed."""
    engine = LocalEngine(policy)
    prompt = policy.codec.render([HumanMessage("word " * 30)])
    completions = []
    for turn in range(turns):
        request = GenerationRequest(agent, prompt, SamplingSettings(max_tokens=12), seed=turn)
        completion = engine.submit(request).result(timeout=60)
        expected = recomputed(policy, request, completion.ids)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
        completions.append(completion.ids)
        prompt = prompt + completion.ids + policy.codec.render([HumanMessage(f"go on {turn}")])
    engine.close()
    return completions, engine.prefilled_tokens


def test_earlier_turns_of_a_conversation_are_prefilled_once(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, computed = conversation(policy, "actor", 4)
    monkeypatch.setattr(Prefixes, "find", lambda self, agent, ids: None)
    afresh, all_tokens = conversation(policy, "actor", 4)
    assert kept == afresh
    assert computed < 0.5 * all_tokens


def test_a_group_asking_later_is_not_prefilled_again(policy: Policy) -> None:
    engine = LocalEngine(policy)
    engine.use_gate(gate := Held())  # the first four come together
    prompt = policy.codec.render([HumanMessage("word " * 30)])
    for seed in range(3):
        requests = [
            GenerationRequest("actor", prompt, SamplingSettings(max_tokens=4), seed=10 * seed + i)
            for i in range(4)
        ]
        futures = [engine.submit(request) for request in requests]
        gate.open.set()
        for future in futures:
            future.result(timeout=60)
    engine.close()
    # Later ones compute the prompt's last token, at most once for each call.
    assert len(prompt) + 2 <= engine.prefilled_tokens <= len(prompt) + 8


def test_published_adapters_never_meet_what_older_ones_computed(policy: Policy) -> None:
    engine = LocalEngine(policy)
    prompt = policy.codec.render([HumanMessage("word " * 30)])
    request = GenerationRequest("actor", prompt, SamplingSettings(max_tokens=12), seed=3)
    engine.submit(request).result(timeout=60)
    with torch.no_grad():
        for parameter in policy.adapter_parameters["actor"]:
            parameter.mul_(1.5)
    engine.publish(1)
    completion = engine.submit(request).result(timeout=60)
    expected = recomputed(policy, request, completion.ids)
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
    engine.close()


def test_copies_are_published_while_the_weights_themselves_change(policy: Policy) -> None:
    engine = LocalEngine(policy)
    prompt = policy.codec.render([HumanMessage("word")])
    request = GenerationRequest("actor", prompt, SamplingSettings(max_tokens=12), seed=3)
    first = engine.submit(request).result(timeout=60)
    copies = {p: p.detach().clone() for own in policy.adapter_parameters.values() for p in own}
    with torch.no_grad():
        for parameter in policy.adapter_parameters["actor"]:
            parameter.mul_(3)
    engine.publish(1)
    assert engine.submit(request).result(timeout=60).logprobs != first.logprobs
    engine.publish(2, copies)
    again = engine.submit(request).result(timeout=60)
    assert (again.ids, again.logprobs, again.adapter_version) == (first.ids, first.logprobs, 2)
    engine.close()


def test_a_publication_waits_for_cancelled_calls_and_refuses_beside_others(policy: Policy) -> None:
    engine = LocalEngine(policy)
    prompt = policy.codec.render([HumanMessage("word " * 30)])
    long = SamplingSettings(max_tokens=90)

    def running(seed: int) -> Future[Completion]:
        request = GenerationRequest("actor", prompt, long, seed=seed)
        future = engine.submit(request)
        while not engine._rows:
            time.sleep(0.001)
        return future

    for seed in range(10):
        future = running(seed)
        assert future.cancel()
        engine.publish(seed)
        assert not engine._has_work()
        assert len(engine._prefixes) == 0  # nothing that the older weights computed
    gate = ClosedGate()
    engine.use_gate(gate)
    live = engine.submit(GenerationRequest("actor", prompt, long))
    with pytest.raises(EngineError, match="while completions are running"):
        engine.publish(11)
    gate.opens.set()
    assert live.result(timeout=60).adapter_version == 9
    engine.close()


class ClosedGate:
    """Keeps calls out of the batch until it is told otherwise."""

    def __init__(self) -> None:
        self.opens = threading.Event()

    def wait(self) -> None:
        assert self.opens.wait(60)


def test_prompts_that_begin_alike_are_computed_together(policy: Policy) -> None:
    engine = LocalEngine(policy)
    engine.use_gate(gate := Held())
    question = policy.codec.render([HumanMessage("word " * 30)])
    requests = [
        GenerationRequest("actor", (*question, 40 + i, 50 + i), SamplingSettings(max_tokens=6), i)
        for i in range(6)
    ]
    futures = [engine.submit(request) for request in requests]
    gate.open.set()
    for request, future in zip(requests, futures, strict=True):
        completion = future.result(timeout=60)
        expected = recomputed(policy, request, completion.ids)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
    engine.close()
    assert engine.prefilled_tokens == len(question) + 2 * 6


def test_calls_wait_while_the_cache_is_full(policy: Policy) -> None:
    requests = [
        dataclasses.replace(request, sampling=SamplingSettings(max_tokens=16))
        for request in mixed_requests(policy, 24)
    ]
    longest = max(len(request.prompt_ids) for request in requests) + 16
    per_token = bytes_per_token(policy.config, torch.float32)
    # Three quarters of it serve running calls: of the longest ones, four fit.
    engine = LocalEngine(policy, cache_gib=4.5 * longest * per_token / 0.75 / 2**30)
    most = 0
    prefilled = engine._prefill

    def watched(new: list[Any]) -> None:
        nonlocal most
        prefilled(new)
        most = max(most, len(engine._rows))
        assert engine._cache.rows * engine._cache.capacity <= engine._max_tokens

    engine._prefill = watched  # type: ignore[method-assign]
    futures = [engine.submit(request) for request in requests]
    bounded = [future.result(timeout=60).ids for future in futures]
    engine.close()
    assert 4 <= most < 24
    free = LocalEngine(policy)
    assert [f.result(timeout=60).ids for f in [free.submit(r) for r in requests]] == bounded
    free.close()


def test_a_call_that_can_never_fit_is_refused_with_the_setting(policy: Policy) -> None:
    engine = LocalEngine(policy, cache_gib=1e-7)
    (request,) = mixed_requests(policy, 1)
    with pytest.raises(EngineError, match=r"does not fit into cache_gib=1e-07.*max_new_tokens"):
        engine.submit(request)
    engine.close()


def test_who_came_first_is_served_first(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)  # the test takes the steps
    engine = LocalEngine(policy, max_batch_size=1)
    base = mixed_requests(policy, 1)[0]
    futures = []
    for order in (3, 2, 1):  # each would go before the one that came before it
        futures.append(engine.submit(dataclasses.replace(base, order=(order,))))
        engine._admit()
    done: list[int] = []
    while len(done) < 3:
        engine._turn()
        done += [i for i, f in enumerate(futures) if f.done() and i not in done]
    assert done == [0, 1, 2]


class Held:
    """A gate that a test opens."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def wait(self) -> None:
        self.open.wait(timeout=60)


def test_a_rollout_begins_with_nothing_kept(policy: Policy) -> None:
    """Runs that differ only in what came before them are the same to the last bit."""
    engine = LocalEngine(policy)
    request = GenerationRequest(
        "actor", policy.codec.render([HumanMessage("word " * 30)]), SamplingSettings(max_tokens=4)
    )
    computed = []
    for _ in range(2):
        gate = Held()
        gate.open.set()
        engine.use_gate(gate)
        engine.submit(request).result(timeout=60)
        engine.use_gate(None)
        computed.append(engine.prefilled_tokens)
    engine.close()
    assert computed == [len(request.prompt_ids), 2 * len(request.prompt_ids)]
