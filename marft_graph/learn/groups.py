"""Groups of episodes of one example: which of them tell one choice from another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from marft_graph.episode import Episode
from marft_graph.learn.advantages import are_equal


def without_equal_groups(episodes: Sequence[Episode]) -> list[Episode]:
    """The episodes of those examples whose returns differ (DAPO's dynamic sampling, 2503.14476).

    An example that every run solves, or none does, gives no advantage to any of its calls. Failed
    episodes have no return and go with their group.
    """
    useful = {index for index, returns in _returns(episodes).items() if not _are_equal(returns)}
    return [episode for episode in episodes if episode.example_index in useful]


def share_of_equal_groups(episodes: Sequence[Episode]) -> float:
    """Share of the examples whose episodes all have one return; 0 where no episode is whole."""
    groups = _returns(episodes).values()
    return sum(map(_are_equal, groups)) / len(groups) if groups else 0.0


def _are_equal(returns: Sequence[float]) -> bool:
    return are_equal(torch.tensor(returns, dtype=torch.float64))


def _returns(episodes: Sequence[Episode]) -> dict[int, list[float]]:
    groups: dict[int, list[float]] = {}
    for episode in episodes:
        if episode.ok:
            groups.setdefault(episode.example_index, []).append(episode.total_reward)
    return groups
