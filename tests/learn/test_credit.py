"""Credit of an iteration's calls: which are compared, and figures that float32 would lose."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from marft_graph.config import TrainConfig
from marft_graph.episode import Call, Episode
from marft_graph.learn.credit import AgentBatch, assign_advantages
from marft_graph.learn.groups import share_of_equal_groups, without_equal_groups


def call(node: str, index: int, reward: float) -> Call:
    return Call("shared", node, index, (), (1,), (2,), (0.0,), "stop", 0, reward=reward)


def batch_of(episodes: Sequence[Episode]) -> AgentBatch:
    """All calls of some episodes, of one agent, one token each."""
    place = [(e, call.index) for e, episode in enumerate(episodes) for call in episode.calls]
    count = len(place)
    return AgentBatch(
        calls=[episodes[e].calls[k] for e, k in place],
        place=place,
        offsets=list(range(count + 1)),
        old_logprobs_N=torch.zeros(count),
        ref_logprobs_N=torch.zeros(count),
        features_NH=None,
        importance_N=torch.ones(count),
        old_values_N=torch.zeros(count),
        advantages_N=torch.zeros(count),
        returns_N=torch.zeros(count),
    )


def advantages(episodes: Sequence[Episode], **settings: object) -> list[float]:
    batch = batch_of(episodes)
    chosen = {"advantage": "group", "normalize_advantages": False, **settings}
    assign_advantages(episodes, {"shared": batch}, TrainConfig(base_model="m", **chosen))
    return batch.advantages_N.tolist()


def test_nodes_that_share_an_adapter_are_not_compared_with_each_other() -> None:
    """Two debaters on one adapter, each its first turn: one always earns 10 more."""
    episodes = [
        Episode({}, (call("left", 0, 0.0), call("right", 1, 10.0))),
        Episode({}, (call("left", 0, 2.0), call("right", 1, 14.0))),
    ]
    assert advantages(episodes) == [-1.0, -2.0, 1.0, 2.0]
    assert advantages(episodes, group_by="example") == [-6.5, 3.5, -4.5, 7.5]


def test_turns_of_one_node_are_compared_with_the_same_turn() -> None:
    episodes = [
        Episode({}, (call("left", 0, 0.0), call("left", 1, 8.0))),
        Episode({}, (call("left", 0, 2.0), call("left", 1, 9.0))),
    ]
    assert advantages(episodes) == [-1.0, -0.5, 1.0, 0.5]


@pytest.mark.parametrize("settings", [{"advantage": "group"}, {"advantage": "gae", "lam": 1.0}])
@pytest.mark.parametrize("offset", [0.0, 1e9, 1e12])
def test_a_large_reward_that_all_episodes_earn_changes_no_advantage(
    settings: dict[str, object], offset: float
) -> None:
    episodes = [
        Episode({}, (call("left", 0, 0.0),), outcome_reward=offset + own) for own in (0, 1, 0, 1)
    ]
    found = advantages(episodes, normalize_advantages=True, **settings)
    assert found == pytest.approx([-1, 1, -1, 1], abs=1e-3)


def test_groups_are_equal_but_for_rounding() -> None:
    episodes = [
        Episode({}, (), outcome_reward=outcome, example_index=index)
        for index, outcomes in enumerate([(0.1 + 0.2, 0.3), (0.0, 1.0), (0.0, 0.0)])
        for outcome in outcomes
    ]
    assert share_of_equal_groups(episodes) == pytest.approx(2 / 3)
    assert [e.example_index for e in without_equal_groups(episodes)] == [1, 1]
