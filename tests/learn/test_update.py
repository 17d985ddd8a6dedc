"""The update: what changes, what must not, and that micro-batches and order do not matter."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from langchain_core.messages import HumanMessage

from marft_graph.agents import agents_of
from marft_graph.config import TrainConfig
from marft_graph.engine.base import GenerationRequest, SamplingSettings
from marft_graph.engine.local import LocalEngine
from marft_graph.episode import Call, Episode
from marft_graph.errors import ModelError
from marft_graph.learn.update import Learner
from marft_graph.policy.adapters import Policy
from marft_graph.policy.team import Team
from tests.apps import Move

AGENTS = ("reasoner", "actor")


def sampled_episodes(
    policy: Policy, count: int, temperature: float = 1.0, grammar: str = ""
) -> list[Episode]:
    """Two-call chains from a real engine; every other one is rewarded.

    `grammar` constrains the actor's calls in two of three episodes.
    """
    engine = LocalEngine(policy)
    free = SamplingSettings(max_tokens=8, temperature=temperature)
    episodes = []
    for e in range(count):
        calls: list[Call] = []
        for k, agent in enumerate(AGENTS):
            prompt = policy.codec.render([HumanMessage("x" * (1 + 3 * (e % 4) + k))])
            own = grammar if agent == "actor" and e % 3 else ""
            sampling = dataclasses.replace(free, max_tokens=100) if own else free
            request = GenerationRequest(agent, prompt, sampling, seed=10 * e + k, grammar=own)
            completion = engine.submit(request).result(timeout=60)
            calls.append(
                Call(
                    agent=agent,
                    node=agent,
                    index=k,
                    parents=tuple(range(k)),
                    prompt_ids=prompt,
                    completion_ids=completion.ids,
                    logprobs=completion.logprobs,
                    finish_reason=completion.finish_reason,
                    adapter_version=0,
                    temperature=temperature,
                    grammar=own,
                )
            )
        episodes.append(
            Episode({"q": e}, tuple(calls), outcome_reward=float(e % 2), example_index=e // 4)
        )
    engine.close()
    return episodes


def learner(model: Path, **settings: object) -> tuple[Policy, Learner]:
    config = TrainConfig(**{"base_model": str(model), "learning_rate": 1e-2, **settings})
    team = Team.load(agents_of(AGENTS, config), config)
    return team.policies[0], Learner(team, config)


def weights(policy: Policy, agent: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.adapter_parameters[agent]]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("level", ["token", "action"])
@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_every_agent_learns_at_ratio_one(tiny_model: Path, level: str, advantage: str) -> None:
    policy, own = learner(tiny_model, level=level, advantage=advantage)
    before = {agent: weights(policy, agent) for agent in AGENTS}
    stats = own.update(sampled_episodes(policy, 8), iteration=1)
    for agent in AGENTS:
        assert not same(before[agent], weights(policy, agent))
        assert stats[agent]["logprob_gap"] < 1e-4
        assert stats[agent]["clip_fraction"] == 0.0
        assert stats[agent]["kl"] < 1e-8  # a fresh adapter is the base
        assert {"loss_policy", "entropy", "kl", "clip_fraction"} <= set(stats[agent])


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_constrained_and_free_calls_of_one_batch_learn_at_ratio_one(
    tiny_model: Path, temperature: float, kl_in: str
) -> None:
    pytest.importorskip("xgrammar")
    schema = json.dumps(Move.model_json_schema())
    policy, own = learner(
        tiny_model, kl_coef=0.1, kl_in=kl_in, entropy_coef=0.01, importance_cap=2.0, epochs=2
    )
    episodes = sampled_episodes(policy, 9, temperature=temperature, grammar=schema)
    assert {bool(e.calls[1].grammar) for e in episodes} == {True, False}
    before = weights(policy, "actor")
    stats = own.update(episodes, iteration=1)["actor"]
    assert stats["logprob_gap"] < 1e-4  # engine and adapter pass agree
    assert stats["entropy"] > 0
    assert all(torch.isfinite(torch.tensor(value)) for value in stats.values())
    assert not same(before, weights(policy, "actor"))


def test_the_reference_pass_is_constrained_too(tiny_model: Path) -> None:
    pytest.importorskip("xgrammar")
    schema = json.dumps(Move.model_json_schema())
    policy, own = learner(tiny_model, advantage="group")
    episodes = sampled_episodes(policy, 6, grammar=schema)
    assert own.update(episodes, iteration=1)["actor"]["kl"] < 1e-8  # a fresh adapter is the base
    # Taken for free calls, the same tokens have other log-probs.
    freed = [
        dataclasses.replace(e, calls=tuple(dataclasses.replace(c, grammar="") for c in e.calls))
        for e in episodes
    ]
    policy, own = learner(tiny_model, advantage="group")
    assert own.update(freed, iteration=1)["actor"]["logprob_gap"] > 0.1


def test_equal_rewards_change_nothing(tiny_model: Path) -> None:
    policy, own = learner(tiny_model, advantage="group")
    episodes = [dataclasses.replace(e, outcome_reward=1.0) for e in sampled_episodes(policy, 8)]
    before = weights(policy, "actor")
    stats = own.update(episodes, iteration=1)
    assert stats["actor"]["advantage_zero_share"] == 1.0
    assert stats["actor"]["grad_norm"] == 0.0
    assert same(before, weights(policy, "actor"))


def test_updating_one_agent_leaves_the_other_bit_identical(tiny_model: Path) -> None:
    policy, own = learner(tiny_model, advantage="group")
    episodes = [
        dataclasses.replace(e, calls=(dataclasses.replace(e.calls[0]),))
        for e in sampled_episodes(policy, 8)
    ]
    before = {agent: weights(policy, agent) for agent in AGENTS}
    base = [p.clone() for n, p in policy.model.named_parameters() if "lora_" not in n]
    own.update(episodes, iteration=1)
    assert not same(before["reasoner"], weights(policy, "reasoner"))
    assert same(before["actor"], weights(policy, "actor"))
    assert same(base, [p for n, p in policy.model.named_parameters() if "lora_" not in n])


@pytest.mark.parametrize("level", ["token", "action"])
def test_micro_batches_and_episode_order_do_not_matter(tiny_model: Path, level: str) -> None:
    results = []
    for tokens, reverse in ((16384, False), (20, False), (16384, True)):
        policy, own = learner(
            tiny_model, level=level, advantage="group", microbatch_tokens=tokens, weight_decay=0.1
        )
        episodes = sampled_episodes(policy, 8)
        own.update(episodes[::-1] if reverse else episodes, iteration=1)
        results.append(weights(policy, "actor"))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            # AdamW's first step is the gradient's sign times the rate
            assert (left - right).abs().mean() < 1e-4


def test_greedy_calls_and_failed_episodes_teach_nothing(tiny_model: Path) -> None:
    policy, own = learner(tiny_model, advantage="group")
    before = weights(policy, "actor")
    stats = own.update(sampled_episodes(policy, 8, temperature=0.0), iteration=1)
    assert stats["actor"]["calls_greedy"] == 8
    failed = [dataclasses.replace(e, status="failed: timeout") for e in sampled_episodes(policy, 8)]
    assert own.update(failed, iteration=2) == {}
    assert same(before, weights(policy, "actor"))


def emptied(policy: Policy, episodes: list[Episode]) -> list[Episode]:
    """The episodes with completions that end at once: nothing but the end of the sequence."""
    (end,) = policy.end_ids

    def cut(call: Call) -> Call:
        with torch.no_grad(), policy.using(call.agent):
            logits = policy.logits(policy.hidden(torch.tensor([call.prompt_ids])))[0, -1]
        logprob = float(logits.log_softmax(-1)[end])
        return dataclasses.replace(call, completion_ids=(end,), logprobs=(logprob,))

    return [dataclasses.replace(e, calls=tuple(map(cut, e.calls))) for e in episodes]


@pytest.mark.parametrize(
    ("level", "how"), [("token", "token"), ("action", "sum"), ("action", "word")]
)
def test_answers_without_a_word_are_learnt_from(tiny_model: Path, level: str, how: str) -> None:
    policy, own = learner(tiny_model, level=level, action_logprob=how)
    episodes = emptied(policy, sampled_episodes(policy, 8))
    before = weights(policy, "actor")
    stats = own.update(episodes, iteration=1)["actor"]
    assert not same(before, weights(policy, "actor"))
    assert stats["logprob_gap"] < 1e-4  # the learner sees what was sampled
    numbers = [value for value in stats.values() if isinstance(value, int | float)]
    assert all(math.isfinite(value) for value in numbers), stats


def test_the_critic_learns_the_return(tiny_model: Path) -> None:
    policy, own = learner(
        tiny_model,
        advantage="gae",
        critic_learning_rate=1e-2,
        critic_epochs=60,
        value_clip=None,
        critic_warmup=9,
    )
    episodes = [dataclasses.replace(e, outcome_reward=2.0) for e in sampled_episodes(policy, 8)]
    losses = [own.update(episodes, iteration=i)["actor"]["loss_value"] for i in range(1, 4)]
    assert losses[-1] < 0.1 * losses[0] < 1.0


def test_state_round_trips_through_flat_tensors(tiny_model: Path) -> None:
    policy, own = learner(tiny_model, advantage="gae")
    episodes = sampled_episodes(policy, 8)
    own.update(episodes, iteration=1)
    saved = {name: value.clone() for name, value in own.state().items()}
    other_policy, other = learner(tiny_model, advantage="gae")
    for agent in AGENTS:
        for mine, theirs in zip(
            other_policy.adapter_parameters[agent], policy.adapter_parameters[agent], strict=True
        ):
            mine.data.copy_(theirs.data)
    other.load_state(saved)
    own.update(episodes, iteration=2)
    other.update(episodes, iteration=2)
    assert same(weights(policy, "actor"), weights(other_policy, "actor"))


def test_the_schedule_scales_the_step(tiny_model: Path) -> None:
    """AdamW's first step is the rate times the gradient's sign: half the rate, half the way."""
    moved = []
    for schedule, iteration in (("constant", 3), ("linear", 3)):
        policy, own = learner(tiny_model, learning_rate_schedule=schedule, iterations=4)
        before = weights(policy, "actor")
        own.update(sampled_episodes(policy, 8), iteration)
        after = weights(policy, "actor")
        steps = [(b - a).abs().max() for a, b in zip(before, after, strict=True)]
        moved.append(max(steps))
    assert moved[1] / moved[0] == pytest.approx(0.5, rel=1e-3)


def test_gradient_checkpointing_changes_memory_and_no_number(tiny_model: Path) -> None:
    policy, plain = learner(tiny_model, advantage="group")
    episodes = sampled_episodes(policy, 8)
    plain.update(episodes, iteration=1)
    other, checkpointed = learner(tiny_model, advantage="group", gradient_checkpointing=True)
    checkpointed.update(episodes, iteration=1)
    for agent in AGENTS:
        for a, b in zip(weights(policy, agent), weights(other, agent), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert len(sampled_episodes(other, 2)) == 2  # the engine keeps its cache
    assert not any(module.training for module in other.model.modules())


def test_gradient_checkpointing_runs_layers_again_in_the_backward_pass(tiny_model: Path) -> None:
    policy, own = learner(tiny_model, advantage="group", gradient_checkpointing=True)
    episodes = sampled_episodes(policy, 4)
    runs = 0

    def count(*args: object) -> None:
        nonlocal runs
        runs += torch.is_grad_enabled()

    layer = policy.model.get_base_model().get_decoder().layers[0].self_attn
    layer.register_forward_hook(count)
    own.update(episodes, iteration=1)
    assert runs == 2 * len(AGENTS)  # once forward and once again, for each agent's one batch


@pytest.mark.parametrize(
    "gradient_checkpointing", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_sampling_and_learning_at_the_same_time_change_neither(
    tiny_model: Path, gradient_checkpointing: bool
) -> None:
    settings = {"epochs": 2, "minibatches": 4, "gradient_checkpointing": gradient_checkpointing}
    policy, alone = learner(tiny_model, **settings)
    episodes = sampled_episodes(policy, 16)
    alone.update(episodes, iteration=1)
    alone.update(episodes, iteration=2)
    other, beside = learner(tiny_model, **settings)
    engine = LocalEngine(other)
    calls = [call for episode in episodes for call in episode.calls]
    requests = [
        GenerationRequest(c.agent, c.prompt_ids, SamplingSettings(max_tokens=8), seed=c.seed + i)
        for i, c in enumerate(calls)
    ]
    expected = [engine.submit(request).result(timeout=60) for request in requests]
    is_over = threading.Event()
    rounds = 0

    def sample_on() -> None:
        nonlocal rounds
        while rounds == 0 or not is_over.is_set():
            found = [f.result(timeout=60) for f in [engine.submit(r) for r in requests]]
            for own, its in zip(found, expected, strict=True):
                assert own.ids == its.ids
                assert own.logprobs == pytest.approx(its.logprobs, abs=1e-4)
            rounds += 1

    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(sample_on)
        beside.update(episodes, iteration=1)
        beside.update(episodes, iteration=2)
        is_over.set()
        sampling.result(timeout=60)
    engine.close()
    assert rounds > 0
    for agent in AGENTS:
        assert same(weights(policy, agent), weights(other, agent))


def test_bfloat16_bases_keep_adapters_and_their_moments_in_float32(tiny_model: Path) -> None:
    policy, own = learner(tiny_model, advantage="group", dtype="bfloat16")
    base = [p for n, p in policy.model.named_parameters() if "lora_" not in n]
    assert {p.dtype for p in base} == {torch.bfloat16}
    assert {p.dtype for p in policy.adapter_parameters["actor"]} == {torch.float32}
    before = weights(policy, "actor")
    stats = own.update(sampled_episodes(policy, 8), iteration=1)
    assert not same(before, weights(policy, "actor"))
    moments = own.optimizers["actor"].state_dict()["state"][0]
    assert moments["exp_avg"].dtype == torch.float32
    assert stats["actor"]["logprob_gap"] < 0.2  # bf16's own rounding


def shifted(episodes: list[Episode], by: float) -> list[Episode]:
    """Episodes of an engine whose log-probs are all off by the same number."""
    return [
        dataclasses.replace(
            episode,
            calls=tuple(
                dataclasses.replace(call, logprobs=tuple(x - by for x in call.logprobs))
                for call in episode.calls
            ),
        )
        for episode in episodes
    ]


def test_importance_weights_correct_an_engine_whose_log_probs_differ(tiny_model: Path) -> None:
    """weight = min(learner / engine, cap); the ratio to the learner's own figures is 1."""
    policy, own = learner(tiny_model, advantage="group", importance_cap=2.0)
    episodes = sampled_episodes(policy, 8)
    seen: list[torch.Tensor] = []
    score = own._score

    def spy(*args: object, **kwargs: object) -> object:
        batch = score(*args, **kwargs)  # type: ignore[arg-type]
        seen.append(batch.importance_N)
        return batch

    own._score = spy  # type: ignore[method-assign]
    stats = own.update(shifted(episodes, 0.3), iteration=1)
    for weights_N in seen:
        torch.testing.assert_close(
            weights_N, torch.full_like(weights_N, 0.3).exp(), atol=1e-3, rtol=0
        )
    assert stats["actor"]["kl_step"] < 1e-6
    assert stats["actor"]["logprob_gap"] == pytest.approx(0.3, abs=1e-3)
    assert stats["actor"]["logprob_gap_mean"] == pytest.approx(0.3, abs=1e-3)
    seen.clear()
    _, own = learner(tiny_model, advantage="group", importance_cap=2.0)
    score, own._score = own._score, spy  # type: ignore[method-assign]
    own.update(shifted(episodes, 3.0), iteration=1)
    assert all(bool((weights_N == 2.0).all()) for weights_N in seen)


def test_a_base_in_four_bits_carries_adapters_that_learn(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed")
    policy, own = learner(tiny_model, advantage="group", quantization="4bit", device="cpu")
    kinds = {type(module).__name__ for module in policy.model.modules()}
    assert "Linear4bit" in kinds
    before = weights(policy, "actor")
    stats = own.update(sampled_episodes(policy, 8), iteration=1)
    assert not same(before, weights(policy, "actor"))
    assert stats["actor"]["logprob_gap"] < 1e-4


def test_a_base_in_four_bits_without_the_extra_says_what_to_install(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'marft-graph\[quantize\]'"):
        learner(tiny_model, quantization="4bit")
