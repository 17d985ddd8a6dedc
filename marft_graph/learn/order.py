"""Update orders: whose adapter an iteration changes, and what the agents before mean to the next.

Pure functions of names, numbers and call graphs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

UpdateOrder = Literal["simultaneous", "alternating", "sequential"]
_MOST_LOG_FACTOR = math.log(10.0)
"""A product of many ratios is heavy-tailed; the factor stays between 1/10 and 10."""


def turns(
    agents: Sequence[str],
    iteration: int,
    *,
    order: UpdateOrder,
    interval: int = 1,
    sequence: Sequence[str] = (),
    seed: int = 0,
) -> tuple[str, ...]:
    """The agents that an iteration updates, in the order in which it does.

    Args:
        agents: all agents.
        iteration: from 1.
        order: `simultaneous` and `sequential`: all, the latter in a random order that differs from
            iteration to iteration; `alternating`: one, for `interval` iterations, then the next.
        interval: iterations of one agent's turn.
        sequence: whose turn follows whose when alternating; none: as in `agents`.
        seed: of the random order.

    >>> [turns(["a", "b"], i, order="alternating", interval=2)[0] for i in (1, 2, 3, 4, 5)]
    ['a', 'a', 'b', 'b', 'a']
    """
    if order == "alternating":
        names = sequence or agents
        return (names[(iteration - 1) // interval % len(names)],)
    if order == "sequential":
        shuffled = list(agents)
        random.Random(seed * 1_000_003 + iteration).shuffle(shuffled)
        return tuple(shuffled)
    return tuple(agents)


def sequential_factors(
    parents: Sequence[Sequence[int]], log_ratios: Mapping[int, float], calls: Collection[int]
) -> dict[int, float]:
    """What HAPPO multiplies the advantages of some calls with, once other agents were updated.

    The factor of call i is the product of new over old probability of the updated agents' actions
    that i's advantage rests on (HAPPO, arXiv 2109.11251, eq. 10: there the joint action of all
    agents, for all act in one state). Departures: in a call graph these are the ancestors of i,
    which made its prompt, and its descendants, which made its return; a branch that never meets i
    is left out, for it is noise of mean 1. And the factor is kept between 1/10 and 10.

    Args:
        parents: of every call of the episode, all smaller than its index.
        log_ratios: for each call of an agent already updated, the log of its whole action's new
            over old probability.
        calls: indices of the calls whose factor is wanted.

    >>> sequential_factors([(), (0,)], {0: math.log(2)}, [1])
    {1: 2.0}
    """
    related = {call: {call} for call in calls}
    for call, seen in related.items():
        for k in range(call, -1, -1):  # ancestors, against the order
            if k in seen:
                seen.update(parents[k])
        below = {call}
        for k in range(call + 1, len(parents)):
            if not below.isdisjoint(parents[k]):
                below.add(k)
        seen |= below
    return {
        call: math.exp(_clamped(sum(log_ratios.get(k, 0.0) for k in sorted(seen))))
        for call, seen in related.items()
    }


def _clamped(log_factor: float) -> float:
    return max(-_MOST_LOG_FACTOR, min(_MOST_LOG_FACTOR, log_factor))
