"""Credit: advantages and value targets of every call, along the episodes' call graphs.

Joins the pure functions of `advantages` to an iteration's calls. Data of one agent's calls lies on
a flat axis N of action tokens, call after call.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marft_graph.config import TrainConfig
from marft_graph.episode import Call, Episode
from marft_graph.learn.advantages import (
    call_returns,
    dag_gae,
    group_advantages,
    normalize,
    token_gae,
)
from marft_graph.learn.fate import Place
from marft_graph.learn.losses import action_logprobs


@dataclass(slots=True)
class AgentBatch:
    """One agent's calls of an iteration and what is computed for them, tokens on a flat axis N."""

    calls: list[Call]
    place: list[tuple[int, int]]
    """(episode, call) of each call, as positions in the given lists."""
    offsets: list[int]
    old_logprobs_N: Tensor
    """Under the policy that sampled; the learner's own figures where importance is corrected."""
    ref_logprobs_N: Tensor
    features_NH: Tensor | None
    """States of the base before each action token; kept for the critic only."""
    importance_N: Tensor
    """Weight of each token for what engine and learner differ by; 1 where that is not corrected."""
    old_values_N: Tensor
    advantages_N: Tensor
    """Per token; at action level all tokens of a call share the call's."""
    returns_N: Tensor
    logprob_gap: tuple[float, float] | None = None
    """Largest and mean difference between the engine's and the learner's own log-probs, in nats;
    None where importance is not corrected."""
    is_alone_C: Sequence[bool] = ()
    """Of each call, whether its group has no other; empty where there are no groups."""

    def tokens(self, indices: Sequence[int]) -> Tensor:
        """Positions on the token axis of some calls, call after call."""
        return torch.cat(
            [torch.arange(self.offsets[index], self.offsets[index + 1]) for index in indices]
        )

    @property
    def alone(self) -> frozenset[Place]:
        """Places of the calls whose group has no other."""
        return frozenset(itertools.compress(self.place, self.is_alone_C))

    @property
    def without_advantage(self) -> frozenset[Place]:
        """Places of the calls all of whose tokens have advantage 0."""
        is_taught_N = (self.advantages_N != 0).int()
        sums = torch.cat((torch.zeros(1, dtype=torch.int64), is_taught_N.cumsum(0)))
        is_zero_C = sums[self.offsets].diff() == 0
        return frozenset(itertools.compress(self.place, is_zero_C.tolist()))

    @property
    def first_tokens(self) -> Tensor:
        """Position of each call's first action token."""
        return torch.tensor(self.offsets[:-1], dtype=torch.long)


def assign_advantages(
    episodes: Sequence[Episode], batches: Mapping[str, AgentBatch], settings: TrainConfig
) -> None:
    """Fill in the batches' advantages and returns.

    Args:
        episodes: as `AgentBatch.place` numbers them; every call belongs to one of the batches.
        batches: by agent; their old values and log-probs are read.
        settings: level, kind of advantage, discounts, KL and normalisation.
    """
    if settings.advantage == "group":
        _assign_group_advantages(episodes, batches, settings)
        return
    plain = {agent: _Plain(batch, settings) for agent, batch in batches.items()}
    where = {
        place: (plain[agent], slice(*batch.offsets[index : index + 2]))
        for agent, batch in batches.items()
        for index, place in enumerate(batch.place)
    }
    for e, episode in enumerate(episodes):
        own = [where[e, k] for k in range(len(episode.calls))]
        advantages, returns = _episode_gae(episode, own, settings)
        for (numbers, span), advantage, target in zip(own, advantages, returns, strict=True):
            numbers.advantages[span] = advantage
            numbers.returns[span] = target
    for agent, batch in batches.items():
        advantages_N = torch.tensor(plain[agent].advantages, dtype=torch.float64)
        batch.returns_N = torch.tensor(plain[agent].returns)
        if settings.normalize_advantages and settings.level == "token":
            advantages_N = normalize(advantages_N)
        elif settings.normalize_advantages:
            per_call = normalize(advantages_N[batch.first_tokens])
            advantages_N = _spread(per_call, batch.offsets)
        batch.advantages_N = advantages_N.float()


class _Plain:
    """What GAE reads of a batch, and where its results go: lists, as calls have few tokens each."""

    def __init__(self, batch: AgentBatch, settings: TrainConfig) -> None:
        count = batch.offsets[-1]
        self.values: list[float] = batch.old_values_N.tolist()
        self.penalties: list[float] | None = None
        """Of the KL to the base, where that is a reward."""
        if settings.kl_in == "reward":
            kl_N = batch.old_logprobs_N - batch.ref_logprobs_N
            self.penalties = (-settings.kl_coef * kl_N).tolist()
        self.advantages = [0.0] * count
        self.returns = [0.0] * count


def _episode_gae(
    episode: Episode, numbers_of_calls: Sequence[tuple[_Plain, slice]], settings: TrainConfig
) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and value targets of the tokens of an episode's calls."""
    values = [numbers.values[span] for numbers, span in numbers_of_calls]
    penalties = [
        numbers.penalties[span]
        for numbers, span in numbers_of_calls
        if numbers.penalties is not None
    ]
    parents = [call.parents for call in episode.calls]
    rewards = [call.reward for call in episode.calls]
    if settings.level == "action":
        if penalties:
            rewards = [r + sum(p) for r, p in zip(rewards, penalties, strict=True)]
        per_call = dag_gae(
            rewards,
            [value[0] for value in values],
            parents,
            episode.outcome_reward,
            gamma=settings.gamma,
            lam=settings.lam,
        )
        advantages, returns = (
            [[x] * len(value) for x, value in zip(each.tolist(), values, strict=True)]
            for each in per_call
        )
        return advantages, returns
    return token_gae(
        rewards,
        values,
        parents,
        episode.outcome_reward,
        gamma=settings.gamma,
        lam=settings.lam,
        gamma_token=settings.gamma_token,
        lam_token=settings.lam_token,
        token_rewards=penalties or None,
    )


def _assign_group_advantages(
    episodes: Sequence[Episode], batches: Mapping[str, AgentBatch], settings: TrainConfig
) -> None:
    """Return of each call against the mean of its group; no critic."""
    returns = [
        call_returns(
            [call.reward for call in episode.calls],
            [call.parents for call in episode.calls],
            episode.outcome_reward,
        )
        for episode in episodes
    ]
    turns = [_turns(episode) for episode in episodes]
    for batch in batches.values():
        own = torch.stack([returns[e][k] for e, k in batch.place])
        if settings.kl_in == "reward" and settings.kl_coef:
            log_ratio_N = batch.old_logprobs_N - batch.ref_logprobs_N
            own = own - settings.kl_coef * action_logprobs(log_ratio_N, batch.offsets, "sum")
        groups = [
            (episodes[e].example_index, turns[e][k] if settings.group_by == "call" else None)
            for e, k in batch.place
        ]
        advantages = group_advantages(own, groups, scale=settings.normalize_advantages)
        batch.advantages_N = _spread(advantages, batch.offsets).float()
        batch.returns_N = _spread(own, batch.offsets).float()
        sizes = Counter(groups)
        batch.is_alone_C = [sizes[group] == 1 for group in groups]


def _turns(episode: Episode) -> list[tuple[str, int]]:
    """Of each call its node, and how many earlier calls of the episode that node made."""
    seen: Counter[str] = Counter()
    turns = []
    for call in episode.calls:
        turns.append((call.node, seen[call.node]))
        seen[call.node] += 1
    return turns


def _spread(per_call: Tensor, offsets: Sequence[int]) -> Tensor:
    """Repeat each call's number over its tokens."""
    return torch.repeat_interleave(per_call, torch.tensor(offsets).diff())
