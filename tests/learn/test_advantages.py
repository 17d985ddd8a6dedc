"""Advantages on the call graph: hand arithmetic, textbook GAE, a brute-force token graph."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import chain

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marft_graph.learn.advantages import (
    call_returns,
    dag_gae,
    group_advantages,
    normalize,
    token_gae,
)

CHAIN = [(), (0,), (1,)]
DIAMOND = [(), (0,), (0,), (1, 2)]
FAN_OUT_JOIN = [(), (0,), (0,), (0,), (1, 2, 3)]
TWO_CHAINS = [(), (), (0,), (1,)]
numbers = st.floats(-2, 2, allow_nan=False, width=32)
discounts = st.floats(0, 1, width=32)


@st.composite
def call_graphs(draw: st.DrawFn, most: int = 7) -> list[tuple[int, ...]]:
    """Parents of 1 to `most` calls; any set of earlier calls may be a call's parents."""
    count = draw(st.integers(1, most))
    return [
        tuple(sorted(draw(st.sets(st.integers(0, child - 1))))) if child else ()
        for child in range(count)
    ]


def descendants(parents: Sequence[Sequence[int]], i: int) -> set[int]:
    graph = nx.DiGraph([(p, c) for c, own in enumerate(parents) for p in own])
    graph.add_nodes_from(range(len(parents)))
    return {i} | nx.descendants(graph, i)


def by_definition(
    rewards: Sequence[float],
    values: Sequence[float],
    parents: Sequence[Sequence[int]],
    outcome: float,
    gammas: Sequence[float],
    lams: Sequence[float],
) -> list[float]:
    """The definition word by word, with a discount of its own for the edges into each vertex."""
    advantages = []
    for i in range(len(rewards)):
        inside = descendants(parents, i)
        parents_in = {k: [p for p in parents[k] if p in inside] for k in inside}
        kids = {k: [c for c in inside if k in parents_in[c]] for k in inside}
        sinks = sum(not own for own in kids.values())
        trace, total = {i: 1.0}, 0.0
        for k in sorted(inside):
            if k != i:
                mean = sum(trace[p] for p in parents_in[k]) / len(parents_in[k])
                trace[k] = gammas[k] * lams[k] * mean
            reward = rewards[k] + (0.0 if kids[k] else outcome / sinks)
            following = sum(gammas[c] * values[c] / len(parents_in[c]) for c in kids[k])
            total += trace[k] * (reward + following - values[k])
        advantages.append(total)
    return advantages


def test_chain_by_hand() -> None:
    advantages, returns = dag_gae([1, 0, 2], [0.5, 0.4, 0.3], CHAIN, 1.0, gamma=0.9, lam=0.8)
    # deltas 0.86, -0.13, 2.7; decay 0.72
    assert advantages.tolist() == pytest.approx([2.16608, 1.814, 2.7])
    assert returns.tolist() == pytest.approx([2.66608, 2.214, 3.0])


def test_diamond_by_hand() -> None:
    advantages, _ = dag_gae([0, 1, 0, 0], [0.5, 0.2, 0.4, 0.6], DIAMOND, 1.0, gamma=0.9, lam=0.5)
    # From the root: deltas 0.04, 1.07, -0.13, 0.4 (each middle call gets half of the sink's value)
    # with traces 1, 0.45, 0.45, 0.2025.
    assert advantages.tolist() == pytest.approx([0.544, 1.52, 0.32, 0.4])


def test_fan_out_with_join_by_hand() -> None:
    advantages, _ = dag_gae(
        [0, 0, 0.2, 0, 0], [1, 0.3, 0.6, 0.9, 0.5], FAN_OUT_JOIN, 2.0, gamma=1.0, lam=0.5
    )
    # From the root: 0.8 + 0.5 * (-0.4/3 - 0.7/3 - 2.2/3) + 0.25 * 1.5
    assert advantages.tolist() == pytest.approx([0.625, 0.95, 0.85, 0.35, 1.5])


def test_parallel_branches_share_no_credit() -> None:
    values = [0.5, 0.25, 0.0, 0.0]
    advantages, _ = dag_gae([0, 0, 5, 0], values, TWO_CHAINS, 1.0, gamma=1.0, lam=1.0)
    assert advantages.tolist() == pytest.approx([5.5, 0.75, 6.0, 1.0])
    other, _ = dag_gae([0, 0, -9, 0], values, TWO_CHAINS, 1.0, gamma=1.0, lam=1.0)
    assert other[1] == advantages[1]
    assert other[3] == advantages[3]


def test_branches_that_never_meet_split_the_outcome_below_their_root() -> None:
    advantages, _ = dag_gae([0, 0, 0], [0.5, 0.2, 0.4], [(), (0,), (0,)], 1.0, gamma=0.9, lam=0.5)
    # Each leaf has the whole outcome for itself; seen from the root each pays half of it.
    assert advantages.tolist() == pytest.approx([0.22, 0.8, 0.6])


def test_a_naive_recursion_over_children_counts_the_diamonds_sink_twice() -> None:
    children = {0: [1, 2], 1: [3], 2: [3], 3: []}

    def naive(k: int) -> float:
        return (1.0 if k == 3 else 0.0) + sum(naive(child) for child in children[k])

    advantages, _ = dag_gae([0, 0, 0, 1], [0.0] * 4, DIAMOND, 0.0, gamma=1.0, lam=1.0)
    assert naive(0) == 2.0
    assert advantages[0].item() == pytest.approx(1.0)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9), numbers, discounts, discounts)
def test_on_a_chain_it_is_textbook_gae(
    steps: list[tuple[float, float]], outcome: float, gamma: float, lam: float
) -> None:
    rewards = [reward for reward, _ in steps]
    values = [value for _, value in steps]
    expected, running, following = [], 0.0, 0.0
    for t in reversed(range(len(steps))):
        reward = rewards[t] + (outcome if t == len(steps) - 1 else 0.0)
        running = reward + gamma * following - values[t] + gamma * lam * running
        following = values[t]
        expected.append(running)
    parents = [(t - 1,) if t else () for t in range(len(steps))]
    advantages, _ = dag_gae(rewards, values, parents, outcome, gamma=gamma, lam=lam)
    assert advantages.tolist() == pytest.approx(expected[::-1], abs=1e-9)


@settings(deadline=None)
@given(st.data(), call_graphs(), numbers)
def test_undiscounted_it_is_own_and_descendants_rewards_once_each(
    data: st.DataObject, parents: list[tuple[int, ...]], outcome: float
) -> None:
    count = len(parents)
    rewards = data.draw(st.lists(numbers, min_size=count, max_size=count))
    values = data.draw(st.lists(numbers, min_size=count, max_size=count))
    advantages, returns = dag_gae(rewards, values, parents, outcome, gamma=1.0, lam=1.0)
    sums = [sum(rewards[k] for k in descendants(parents, i)) + outcome for i in range(count)]
    assert advantages.tolist() == pytest.approx(
        [total - value for total, value in zip(sums, values, strict=True)], abs=1e-6
    )
    assert returns.tolist() == pytest.approx(sums, abs=1e-6)
    assert call_returns(rewards, parents, outcome).tolist() == pytest.approx(sums, abs=1e-6)


@settings(deadline=None)
@given(st.data(), call_graphs(), numbers, discounts, discounts)
def test_any_graph_follows_the_definition(
    data: st.DataObject,
    parents: list[tuple[int, ...]],
    outcome: float,
    gamma: float,
    lam: float,
) -> None:
    count = len(parents)
    rewards = data.draw(st.lists(numbers, min_size=count, max_size=count))
    values = data.draw(st.lists(numbers, min_size=count, max_size=count))
    advantages, _ = dag_gae(rewards, values, parents, outcome, gamma=gamma, lam=lam)
    expected = by_definition(rewards, values, parents, outcome, [gamma] * count, [lam] * count)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(st.data(), call_graphs(most=5), numbers, discounts, discounts, discounts, discounts)
def test_tokens_follow_the_definition_on_the_expanded_graph(
    data: st.DataObject,
    parents: list[tuple[int, ...]],
    outcome: float,
    gamma: float,
    lam: float,
    gamma_token: float,
    lam_token: float,
) -> None:
    lengths = [data.draw(st.integers(1, 4)) for _ in parents]
    rewards = [data.draw(numbers) for _ in parents]
    values = [[data.draw(numbers) for _ in range(length)] for length in lengths]
    penalties = [[data.draw(numbers) for _ in range(length)] for length in lengths]
    # One vertex for each token; the discounts belong to the edges into it.
    first = [sum(lengths[:k]) for k in range(len(parents))]
    vertex_parents: list[tuple[int, ...]] = []
    gammas, lams, vertex_rewards = [], [], []
    for k, length in enumerate(lengths):
        for t in range(length):
            inside = t > 0
            above = (
                (first[k] + t - 1,)
                if inside
                else tuple(first[p] + lengths[p] - 1 for p in parents[k])
            )
            vertex_parents.append(above)
            gammas.append(gamma_token if inside else gamma)
            lams.append(lam_token if inside else lam)
            own = rewards[k] if t == length - 1 else 0.0
            vertex_rewards.append(own + penalties[k][t])
    flat_values = [value for own in values for value in own]
    expected = by_definition(vertex_rewards, flat_values, vertex_parents, outcome, gammas, lams)
    advantages, returns = token_gae(
        rewards,
        values,
        parents,
        outcome,
        gamma=gamma,
        lam=lam,
        gamma_token=gamma_token,
        lam_token=lam_token,
        token_rewards=penalties,
    )
    assert list(chain.from_iterable(advantages)) == pytest.approx(expected, abs=1e-6)
    assert list(chain.from_iterable(returns)) == pytest.approx(
        [a + v for a, v in zip(expected, flat_values, strict=True)], abs=1e-6
    )
    assert [len(own) for own in advantages] == lengths


def test_one_token_a_call_is_the_call_level() -> None:
    values = [0.5, 0.2, 0.4, 0.6]
    rewards = [0.0, 1.0, 0.0, 0.0]
    calls, _ = dag_gae(rewards, values, DIAMOND, 1.0, gamma=0.9, lam=0.5)
    tokens, _ = token_gae(rewards, [[v] for v in values], DIAMOND, 1.0, gamma=0.9, lam=0.5)
    assert list(chain.from_iterable(tokens)) == pytest.approx(calls.tolist(), abs=1e-6)


def test_long_completions_cost_time_in_proportion_to_their_tokens() -> None:
    def seconds(length: int) -> float:
        values = [[0.0] * length] * len(CHAIN)
        best = math.inf
        for _ in range(3):
            started = time.process_time()
            token_gae([0.0] * 3, values, CHAIN, 1.0, gamma=1.0, lam=0.95)
            best = min(best, time.process_time() - started)
        return best

    # 40 times the tokens: about 40 times the work where linear, 1,600 where quadratic.
    assert seconds(160_000) < 200 * seconds(4_000)


def test_a_parent_named_twice_counts_once() -> None:
    once, _ = dag_gae([0, 1], [0.5, 0.4], [(), (0,)], 1.0, gamma=0.9, lam=0.5)
    twice, _ = dag_gae([0, 1], [0.5, 0.4], [(), (0, 0)], 1.0, gamma=0.9, lam=0.5)
    assert twice.tolist() == once.tolist()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.5, 0.25], torch.float64),
        (torch.tensor([0.5, 0.25]), torch.float32),
        (torch.tensor([0.5, 0.25], dtype=torch.bfloat16), torch.bfloat16),
        (torch.tensor([1, 2]), torch.float64),
    ],
)
def test_the_result_has_the_dtype_of_floating_values_and_is_exact_otherwise(
    values: Sequence[float], dtype: torch.dtype
) -> None:
    advantages, returns = dag_gae([0, 0], values, [(), (0,)], 0.75, gamma=1.0, lam=1.0)
    assert advantages.dtype == returns.dtype == dtype
    assert advantages.shape == (2,)
    assert advantages[1].item() == pytest.approx(0.75 - float(values[1]), abs=1e-2)
    assert returns[0].item() == pytest.approx(0.75, abs=1e-2)


def test_tensors_and_lists_give_the_same_and_no_gradient_flows() -> None:
    values = torch.tensor([0.5, 0.25], requires_grad=True)
    advantages, _ = dag_gae(torch.tensor([0.0, 1.0]), values, [(), (0,)], 1.0, gamma=0.9, lam=0.9)
    listed, _ = dag_gae([0, 1], [0.5, 0.25], [(), (0,)], 1.0, gamma=0.9, lam=0.9)
    assert advantages.tolist() == pytest.approx(listed.tolist())
    assert not advantages.requires_grad


def test_an_episode_without_calls_has_no_advantages() -> None:
    advantages, returns = dag_gae([], [], [], 1.0, gamma=1.0, lam=1.0)
    assert advantages.shape == returns.shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "values", "parents", "message"),
    [
        ([0], [0, 0], [(), (0,)], "1 rewards, 2 values and 2 parent lists"),
        ([0, 0], [0, 0], [()], "2 rewards, 2 values and 1 parent lists"),
        ([0, 0], [0, 0], [(1,), ()], r"call 0 has parents \(1,\)"),
        ([0, 0], [0, 0], [(), (1,)], r"call 1 has parents \(1,\); each must be from 0 to 0"),
        ([0, 0], [0, 0], [(), (-1,)], r"call 1 has parents \(-1,\)"),
        ([0], torch.zeros(1, 1), [()], r"values has shape \(1, 1\)"),
        (torch.zeros(1, 2), [0], [()], r"rewards has shape \(1, 2\)"),
    ],
)
def test_wrong_input_is_named(
    rewards: Sequence[float],
    values: Sequence[float],
    parents: Sequence[tuple[int, ...]],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        dag_gae(rewards, values, parents, 1.0, gamma=1.0, lam=1.0)


def test_a_call_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="call 1 has no token"):
        token_gae([0, 0], [[0.0, 0.0], []], [(), (0,)], 1.0, gamma=1, lam=1)


def test_group_advantages_by_hand() -> None:
    returns = torch.tensor([1.0, 7.0, 3.0, 2.0, 7.0])
    groups = ["a", "b", "a", "c", "b"]
    plain = group_advantages(returns, groups, scale=False)
    assert plain.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0]
    # The population deviation of (1, 3) is 1; with denominator n - 1 it would be 1.414.
    scaled = group_advantages(returns, groups, scale=True, epsilon=0.0)
    assert scaled.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0]


def test_equal_returns_that_a_float_cannot_hold_give_exactly_zero() -> None:
    returns = torch.full((3,), 0.1)
    assert group_advantages(returns, ["g"] * 3, scale=True).tolist() == [0.0] * 3
    assert normalize(returns).tolist() == [0.0] * 3


def test_group_advantages_need_a_group_for_each_return() -> None:
    with pytest.raises(ValueError, match="2 returns but 1 groups"):
        group_advantages(torch.zeros(2), ["a"], scale=False)


@settings(deadline=None)
@given(st.lists(numbers, min_size=2, max_size=20))
def test_normalized_advantages_are_centred(values: list[float]) -> None:
    given_values = torch.tensor(values, dtype=torch.float64)
    result = normalize(given_values + 5.0)
    assert abs(result.mean().item()) < 1e-6  # the mean of about 5 is not added back
    if given_values.std() > 1e-3:
        assert result.square().mean().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("offset", [1e6, 1e9, -1e12])
def test_advantages_tell_returns_apart_that_are_large_against_what_they_differ_by(
    offset: float,
) -> None:
    returns_N = torch.tensor([offset, offset + 1, offset + 3], dtype=torch.float64)
    expected = [-4 / 3, -1 / 3, 5 / 3]
    found = group_advantages(returns_N, "aaa", scale=False)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-3)
    deviation = math.sqrt(sum(x * x for x in expected) / 3)
    assert normalize(returns_N).tolist() == pytest.approx(
        [x / deviation for x in expected], abs=1e-3
    )


def test_sums_in_another_order_are_equal() -> None:
    returns_N = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    assert returns_N[0] != returns_N[1]
    assert group_advantages(returns_N, "aaa", scale=True).tolist() == [0.0, 0.0, 0.0]
    assert normalize(returns_N).tolist() == [0.0, 0.0, 0.0]
