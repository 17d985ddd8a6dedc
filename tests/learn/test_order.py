"""Update orders: who is updated when, and HAPPO's factor against the published objective."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from marft_graph.learn.losses import policy_loss
from marft_graph.learn.order import sequential_factors, turns
from tests.learn.test_update import learner, same, sampled_episodes, weights

AGENTS = ("reasoner", "actor")


def test_alternating_gives_each_agent_its_interval_first_agent_first() -> None:
    names = ["a", "b", "c"]
    taken = [turns(names, i, order="alternating", interval=2) for i in range(1, 9)]
    assert [name for (name,) in taken] == ["a", "a", "b", "b", "c", "c", "a", "a"]
    taken = [turns(names, i, order="alternating", sequence=["c", "a"]) for i in (1, 2, 3)]
    assert [name for (name,) in taken] == ["c", "a", "c"]


def test_sequential_updates_everyone_in_orders_that_vary_and_repeat_with_the_seed() -> None:
    orders = [turns("abc", i, order="sequential", seed=3) for i in range(1, 40)]
    assert {tuple(sorted(order)) for order in orders} == {("a", "b", "c")}
    assert set(orders) == set(itertools.permutations("abc"))
    assert orders == [turns("abc", i, order="sequential", seed=3) for i in range(1, 40)]


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_alternating_touches_exactly_the_adapter_whose_turn_it_is(
    tiny_model: Path, advantage: str
) -> None:
    policy, own = learner(
        tiny_model, advantage=advantage, update_order="alternating", alternate_every=2
    )
    for iteration, turn in enumerate(["reasoner", "reasoner", "actor", "actor", "reasoner"], 1):
        before = {agent: weights(policy, agent) for agent in AGENTS}
        stats = own.update(sampled_episodes(policy, 8), iteration)
        moved = {agent for agent in AGENTS if not same(before[agent], weights(policy, agent))}
        assert moved == {turn}
        assert [agent for agent in AGENTS if "loss_policy" in stats[agent]] == [turn]


def test_the_factor_leaves_out_branches_that_never_meet() -> None:
    # 0 -> 1, 0 -> 2 -> 3: to call 1 belong itself and 0; to call 2 belong 0 and 3
    parents = [(), (0,), (0,), (2,)]
    log_ratios = {k: math.log(1.1 + k / 10) for k in range(4)}
    factors = sequential_factors(parents, log_ratios, [1, 2])
    assert factors[1] == pytest.approx(1.1 * 1.2)
    assert factors[2] == pytest.approx(1.1 * 1.3 * 1.4)


def test_factors_of_runaway_ratios_stay_bounded() -> None:
    chain = [(), (0,)]
    assert sequential_factors(chain, {0: 50.0}, [1]) == {1: pytest.approx(10.0)}
    assert sequential_factors(chain, {0: -50.0}, [1]) == {1: pytest.approx(0.1)}


@pytest.mark.parametrize("first", ["upstream", "downstream"])
def test_two_agents_in_a_chain_get_the_published_happo_objective(first: str) -> None:
    """HAPPO (2109.11251, eq. 11): E[min(r M, clip(r) M)], M = ratio of those before x A.

    Tabular agents: a1 ~ pi1, then a2 ~ pi2(. | a1). Every joint action is one sample, weighted by
    its old probability, so the expectation is exact. Whichever is updated first, the other's
    objective must be the published one.
    """
    torch.manual_seed(0)
    old1, new1 = torch.randn(3).log_softmax(-1), torch.randn(3).log_softmax(-1)
    old2, new2 = torch.randn(3, 2).log_softmax(-1), torch.randn(3, 2).log_softmax(-1)
    advantage = torch.randn(3, 2)
    updated = 0 if first == "upstream" else 1
    published, ours = torch.zeros(()), torch.zeros(())
    for a1, a2 in itertools.product(range(3), range(2)):
        old = (old1[a1], old2[a1, a2])
        new = (new1[a1], new2[a1, a2])
        probability = (old[0] + old[1]).exp()
        before = (new[updated] - old[updated]).exp()
        ratio = (new[1 - updated] - old[1 - updated]).exp()
        m = before * advantage[a1, a2]
        published += probability * torch.minimum(ratio * m, ratio.clamp(0.8, 1.2) * m)
        factor = sequential_factors(
            [(), (0,)], {updated: float(new[updated] - old[updated])}, [1 - updated]
        )[1 - updated]
        loss, _ = policy_loss(
            new[1 - updated].unsqueeze(0),
            old[1 - updated].unsqueeze(0),
            (advantage[a1, a2] * factor).unsqueeze(0),
            clip=(0.2, 0.2),
            denominator=1,
        )
        ours -= probability * loss
    torch.testing.assert_close(ours, published, atol=1e-5, rtol=1e-5)


def test_the_second_agent_learns_from_advantages_times_the_firsts_ratio(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, own = learner(tiny_model, advantage="group", update_order="sequential", seed=1)
    episodes = sampled_episodes(policy, 8)
    first, second = turns(AGENTS, 1, order="sequential", seed=1)
    used: dict[str, Any] = {}
    update = type(own)._update_adapter

    def spy(self: Any, agent: str, batch: Any, iteration: int) -> Any:
        used[agent] = (batch.advantages_N.clone(), batch)
        return update(self, agent, batch, iteration)

    monkeypatch.setattr(type(own), "_update_adapter", spy)
    own.update(episodes, iteration=1)
    plain, batch = used[first]
    # independent: the first agent's new log-probs from transformers' own forward pass
    policy.model.set_adapter("node-" + first)
    k = AGENTS.index(first)
    for row, (e, _) in enumerate(used[second][1].place):
        call = episodes[e].calls[k]
        ids = torch.tensor([call.prompt_ids + call.completion_ids])
        with torch.no_grad():
            logp = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        new = sum(
            logp[len(call.prompt_ids) - 1 + t, token].item()
            for t, token in enumerate(call.completion_ids)
        )
        ratio = math.exp(new - sum(call.logprobs))
        start = used[second][1].offsets[row]
        # in a group both agents' calls of one episode have the same advantage
        place = batch.place.index((e, k))
        expected = plain[batch.offsets[place]].item() * min(10, max(0.1, ratio))
        assert used[second][0][start].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
