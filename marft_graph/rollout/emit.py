"""Rewards that nodes emit while they run: how they are emitted, and whose calls they credit.

A reward goes to the last call of the task that emitted it. Where the task made no call (a tool, an
environment node), it goes to the calls that fed the task: those that its input depends on, without
the ones that others of them already depend on. Several calls that ran side by side share it evenly.
What no call can have caused is the team's outcome, so the total is always what was emitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from marft_graph.rollout.intercept import running_task


@dataclass(frozen=True, slots=True)
class Emitted:
    """One emitted reward."""

    namespace: str
    """LangGraph's checkpoint namespace of the task."""
    amount: float
    attempts: tuple[tuple[str, int], ...] = ()
    """Namespace and attempt number of each task around it."""


def emit_reward(amount: float) -> None:
    """Reward the node that is running now, from its own code, a tool or a subgraph's node.

    The amount is added to the reward of the task's last model call. Where the task calls no trained
    model, the calls that its input came from share it evenly; without any, it is the team's.
    Several rewards add up. What an attempt emitted that failed and was retried does not count.

    Outside training and `run_episodes` this does nothing. A thread that a node starts by itself
    must carry the node's context: `contextvars.copy_context().run(emit_reward, 0.2)`.

    Args:
        amount: one finite number, of either sign.

    Raises:
        RewardError: the amount is no finite number. The whole run stops, naming the node.

    >>> emit_reward(0.2)  # nothing runs here
    """
    found = running_task()
    if found is not None:
        responder, namespace = found
        responder.credit(namespace, amount)


def shares(
    emitted: Sequence[Emitted],
    namespaces: Sequence[str],
    parents: Sequence[Sequence[int]],
    inputs: Mapping[str, Sequence[int]],
) -> tuple[list[float], float]:
    """What each call gets of the emitted rewards, and what is left because no call led to it.

    The sums are exact before rounding, so the order in which threads emitted does not matter.

    Args:
        emitted: rewards of the episode.
        namespaces: of the calls, in topological order.
        parents: of the calls; positions among them.
        inputs: positions of the calls that a task's input depends on, by the task's namespace.

    >>> shares([Emitted("tools:2b", 0.5)], ["a:1f", "b:1e"], [(), ()], {"tools:2b": (0, 1)})
    ([0.25, 0.25], 0.0)
    """
    amounts: list[list[float]] = [[] for _ in namespaces]
    unclaimed: list[float] = []
    for reward in emitted:
        inside = f"{reward.namespace}|"
        own = [
            index
            for index, namespace in enumerate(namespaces)
            if namespace == reward.namespace or namespace.startswith(inside)
        ]
        credited = latest(own or inputs.get(reward.namespace, ()), parents)
        for index in credited:
            amounts[index].append(reward.amount / len(credited))
        if not credited:
            unclaimed.append(reward.amount)
    return [math.fsum(amount) for amount in amounts], math.fsum(unclaimed)


def latest(calls: Sequence[int], parents: Sequence[Sequence[int]]) -> list[int]:
    """Those of some calls that no other of them depends on, directly or through any call.

    >>> latest([0, 2, 3], [(), (0,), (1,), ()])
    [2, 3]
    """
    found: list[int] = []
    above: set[int] = set()
    wanted = set(calls)
    for index in range(max(wanted, default=-1), -1, -1):
        if index in wanted and index not in above:
            found.append(index)
        if index in wanted or index in above:
            above.update(parents[index])
    return sorted(found)
