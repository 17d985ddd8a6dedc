from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from marft_graph.episode import Call
from marft_graph.learn.batches import collate, microbatches, score
from marft_graph.policy.adapters import Policy
from marft_graph.policy.rows import Row, padded_ids, positions, seen
from tests.support import make_agents

CPU = torch.device("cpu")


def call(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Call:
    return Call("a", "a", 0, (), prompt, completion, (0.0,) * len(completion), "stop", 0)


few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
some_calls = st.lists(st.builds(call, few_tokens, few_tokens), min_size=1, max_size=12)


@given(some_calls, st.integers(1, 60), st.sampled_from([0.0, 0.05, 10.0]))
def test_every_call_sees_exactly_its_own_tokens(
    calls: list[Call], max_tokens: int, quadratic: float
) -> None:
    found: list[int] = []
    for rows in microbatches(calls, max_tokens, quadratic=quadratic):
        found += [index for row in rows for index in row.members]
        ids_BT, position_BT, is_seen_BTT = padded_ids(rows), positions(rows), seen(rows)
        batch = collate(calls, rows, CPU)
        actions = iter(zip(batch.row_N.tolist(), batch.state_N.tolist(), strict=True))
        for place, row in enumerate(rows):
            for index, path in zip(row.members, row.paths, strict=True):
                ids = (calls[index].prompt_ids + calls[index].completion_ids)[:-1]
                assert tuple(ids_BT[place, path].tolist()) == ids
                for depth, column in enumerate(path.tolist()):
                    assert position_BT[place, column] == depth
                    read = np.flatnonzero(is_seen_BTT[place, column])
                    assert read.tolist() == path[: depth + 1].tolist()
                for column in path[len(calls[index].prompt_ids) - 1 :].tolist():
                    assert next(actions) == (place, column)
    assert sorted(found) == list(range(len(calls)))


@given(some_calls, st.integers(1, 60))
def test_a_batch_has_at_most_so_many_tokens_unless_one_call_is_longer(
    calls: list[Call], max_tokens: int
) -> None:
    for rows in microbatches(calls, max_tokens):
        padded = len(rows) * max(row.length for row in rows)
        assert padded <= max_tokens or (len(rows) == 1 and len(rows[0].members) == 1)


def test_a_group_and_a_conversation_stand_in_one_row() -> None:
    question = tuple(range(20))
    group = [call(question, (30 + i, 40 + i)) for i in range(4)]
    later = call((*question, 31, 41, 50), (60, 61))  # the second call's next turn
    ((row,),) = microbatches([*group, later], 1000)
    # The question once, then each answer but its last token; the next turn adds what is new to it.
    assert row.length == 20 + 4 * 1 + 3
    assert row.members == [0, 1, 4, 2, 3]


def test_calls_with_nothing_in_common_stand_in_rows_of_their_own() -> None:
    calls = [call((1, 2), (3,)), call((2, 2), (3, 4, 5))]
    (rows,) = microbatches(calls, 1000)
    assert [row.members for row in rows] == [[1], [0]]


def test_long_answers_to_a_short_question_do_not_share_where_attention_costs_more() -> None:
    calls = [call((1, 2), tuple(range(10 * i, 10 * i + 400))) for i in range(4)]
    assert len(next(microbatches(calls, 10_000, quadratic=0.01))) == 4
    assert len(next(microbatches(calls, 10_000, quadratic=0.0))) == 1


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    policy = Policy.load(str(tiny_model), make_agents(["a"], tiny_model), device="cpu")
    torch.manual_seed(1)
    for parameter in policy.adapter_parameters["a"]:
        torch.nn.init.normal_(parameter, std=0.1)
    return policy


def logprobs_and_gradients(
    policy: Policy, parts: list[list[Call]]
) -> tuple[list[Tensor], list[Tensor], int]:
    """Log-probs by call, the gradient of a weighted sum of them, and tokens that were computed.

    Calls of different parts share nothing.
    """
    found: dict[int, Tensor] = {}
    computed, first = 0, 0
    policy.model.zero_grad()
    for calls in parts:
        for rows in microbatches(calls, 120):
            computed += sum(row.length for row in rows)
            with policy.using("a"):
                _, logprobs, _ = score(policy, calls, rows, is_entropy_learnt=False)
            indices = [index for row in rows for index in row.members]
            own = logprobs.split([len(calls[i].completion_ids) for i in indices])
            weighted = [(first + i) * part.sum() for i, part in zip(indices, own, strict=True)]
            torch.autograd.backward(torch.stack(weighted).sum())
            found |= {first + i: part.detach() for i, part in zip(indices, own, strict=True)}
        first += len(calls)
    gradients = [p.grad for p in policy.adapter_parameters["a"] if p.grad is not None]
    return [found[i] for i in range(first)], gradients, computed


def test_shared_rows_give_the_logprobs_and_gradients_of_separate_ones(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, policy.vocabulary, (count,), generator=generator).tolist())

    calls = []
    for length in (5, 17, 30):
        question = tokens(length)
        calls += [call(question, tokens(3 + i)) for i in range(5)]
        calls.append(call(question + calls[-1].completion_ids + tokens(4), tokens(6)))
    separate, expected, all_tokens = logprobs_and_gradients(policy, [[own] for own in calls])
    shared, gradients, computed = logprobs_and_gradients(policy, [calls])
    assert computed < 0.4 * all_tokens
    assert len(gradients) == len(expected) > 0
    for own, other in zip(shared, separate, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    for own, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-4)


def test_a_row_lays_out_what_is_new() -> None:
    row = Row()
    row.add(7, np.array([1, 2, 3]), 0)
    row.add(9, np.array([1, 2, 4, 5]), 2)
    assert row.ids == [1, 2, 3, 4, 5]
    assert [path.tolist() for path in row.paths] == [[0, 1, 2], [0, 1, 3, 4]]
    assert [own.tolist() for own in row.own] == [[0, 1, 2], [3, 4]]
