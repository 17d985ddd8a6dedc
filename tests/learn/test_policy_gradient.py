"""Is the estimate the gradient? Small games that can be enumerated, and the noise of credit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import pytest
import torch
from langchain_core.messages import HumanMessage
from langgraph.graph import END, START, StateGraph
from torch import Tensor

from marft_graph import FakeEngine, run_episodes
from marft_graph.learn.advantages import dag_gae
from tests.apps import model

Actions = tuple[int, ...]


@dataclass(frozen=True)
class Game:
    """Calls with two actions each, a table of logits for each agent, and rewards."""

    parents: tuple[tuple[int, ...], ...]
    agent: tuple[int, ...]
    """Agent of each call: calls of a loop share one table."""
    own: Callable[[int, Actions], float]
    """Own reward of call k; it may look at the actions of k and of its ancestors only."""
    outcome: Callable[[Actions], float]
    length: Callable[[Actions], int] = len
    """How many calls a run has, where an action ends the loop."""

    def logit(self, theta: Tensor, k: int, actions: Actions) -> Tensor:
        """A call sees the actions of its parents."""
        seen = sum(actions[p] for p in self.parents[k])
        return theta[self.agent[k], seen]

    def runs(self) -> list[Actions]:
        """Every run that can happen."""
        whole = itertools.product((0, 1), repeat=len(self.parents))
        return sorted({actions[: self.length(actions)] for actions in whole})

    def log_prob(self, theta: Tensor, actions: Actions) -> list[Tensor]:
        """Of each action of a run."""
        return [
            torch.nn.functional.logsigmoid(self.logit(theta, k, actions) * (1 if a else -1))
            for k, a in enumerate(actions)
        ]

    def total(self, actions: Actions) -> float:
        """The return of a run."""
        return self.outcome(actions) + sum(self.own(k, actions) for k in range(len(actions)))


def until_one(actions: Actions) -> int:
    """A loop that ends with the first 1."""
    return actions.index(1) + 1 if 1 in actions else len(actions)


GAMES = {
    "chain": Game(
        ((), (0,), (1,)),
        (0, 1, 2),
        lambda k, a: 0.3 * a[k] * (k == 1),
        lambda a: 1.5 * (a[0] == a[2]) - 0.5 * a[1],
    ),
    "fan_out": Game(
        ((), (0,), (0,), (0,)),
        (0, 1, 2, 3),
        lambda k, a: (k > 0) * (a[k] == a[0]) * (1.0 + k),
        lambda a: 0.5 * (sum(a) == 2),
    ),
    "diamond": Game(
        ((), (0,), (0,), (1, 2)),
        (0, 1, 2, 3),
        lambda k, a: 0.4 * (k == 3) * a[3] + 0.2 * (k == 1) * a[1],
        lambda a: float(a[3] == (a[1] ^ a[2])),
    ),
    "loop": Game(
        ((), (0,), (1,)),
        (0, 0, 0),
        lambda k, a: -0.1,
        lambda a: float(a[-1]) * (2.0 if len(a) == 2 else 1.0),
        until_one,
    ),
}


@pytest.mark.parametrize(
    ("name", "lam"), [*((name, 1.0) for name in GAMES), ("chain", 0.9), ("loop", 0.9)]
)
def test_the_estimate_is_the_exact_gradient_within_its_standard_error(
    name: str, lam: float
) -> None:
    """At lambda 1 for any values; below 1, on chains, with exact values, as GAE promises."""
    game = GAMES[name]
    torch.manual_seed(1)
    theta = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    runs = game.runs()
    log_probs = [game.log_prob(theta, run) for run in runs]
    probability = torch.stack([sum(own, torch.zeros(())).exp() for own in log_probs])
    torch.testing.assert_close(probability.sum().item(), 1.0)
    totals = torch.tensor([game.total(run) for run in runs], dtype=torch.float64)
    (exact,) = torch.autograd.grad((probability * totals).sum(), theta, retain_graph=True)
    probability = probability.detach()
    exact_value = exact_values(game, runs, probability)
    gradients = []
    for run, own in zip(runs, log_probs, strict=True):
        calls = range(len(run))
        any_value = [0.3 * k - 0.2 * sum(run[p] for p in game.parents[k]) for k in calls]
        advantages, _ = dag_gae(
            [game.own(k, run) for k in calls],
            any_value if lam == 1.0 else [exact_value[run, k] for k in calls],
            game.parents[: len(run)],
            game.outcome(run),
            gamma=1.0,
            lam=lam,
        )
        surrogate = sum(a * logp for a, logp in zip(advantages, own, strict=True))
        gradients.append(torch.autograd.grad(surrogate, theta, retain_graph=True)[0].flatten())
    each = torch.stack(gradients)
    samples = 40_000
    generator = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(probability, samples, replacement=True, generator=generator)
    share = (drawn.bincount(minlength=len(runs)).double() / samples).unsqueeze(-1)
    mean = (share * each).sum(0)
    error = ((share * (each - mean).square()).sum(0) / samples).sqrt()
    assert bool(((mean - exact.flatten()).abs() <= 4.5 * error + 1e-9).all())
    # and exactly so in expectation
    expected = (probability.unsqueeze(-1) * each).sum(0)
    torch.testing.assert_close(expected, exact.flatten(), atol=1e-5, rtol=1e-5)


def exact_values(
    game: Game, runs: Sequence[Actions], probability: Tensor
) -> dict[tuple[Actions, int], float]:
    """V of each call given everything before it, on a chain: what is still to come."""
    values = {}
    for run in runs:
        for k in range(len(run)):
            same = [i for i, other in enumerate(runs) if other[:k] == run[:k] and len(other) > k]
            weight = probability[same] / probability[same].sum()
            to_come = [
                game.total(runs[i]) - sum(game.own(j, runs[i]) for j in range(k)) for i in same
            ]
            values[run, k] = float((weight * torch.tensor(to_come, dtype=torch.float64)).sum())
    return values


class WorkState(TypedDict, total=False):
    """Four workers, each with a channel of its own."""

    task: str
    a: str
    b: str
    c: str
    d: str


def workers(chained: bool) -> Any:
    """Four workers side by side, or one after another."""

    def worker(name: str) -> Callable[[WorkState], dict[str, str]]:
        def work(state: WorkState) -> dict[str, str]:
            prompt = str(state) if chained else state["task"]
            return {name: model.invoke([HumanMessage(prompt)]).text}

        return work

    builder = StateGraph(WorkState)
    before = START
    for name in "abcd":
        builder.add_node(f"worker_{name}", worker(name))
        builder.add_edge(before, f"worker_{name}")
        if chained:
            before = f"worker_{name}"
        else:
            builder.add_edge(f"worker_{name}", END)
    if chained:
        builder.add_edge(before, END)
    return builder.compile()


def gradient_variance(
    parents: Sequence[Sequence[int]], agents: Sequence[int], seed: int, batches: int = 24
) -> float:
    """Total variance of the estimated gradient over batches of 32 episodes of tabular workers."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64)
    p = torch.sigmoid(theta)
    estimates = []
    for _ in range(batches):
        total = torch.zeros(4, dtype=torch.float64)
        for _ in range(32):
            action = (torch.rand(4, generator=generator, dtype=torch.float64) < p).double()
            noise = torch.randn(4, generator=generator, dtype=torch.float64)
            own = 1.0 * action + 0.5 * noise
            advantages, _ = dag_gae(
                [float(own[i]) for i in agents],
                [float(p[i]) for i in agents],  # the exact value of a worker's own reward
                parents,
                0.0,
                gamma=1.0,
                lam=1.0,
            )
            for k, i in enumerate(agents):
                total[i] += advantages[k] * (action[i] - p[i])
        estimates.append(total / 32)
    return float(torch.stack(estimates).var(0).sum())


def test_credit_along_the_call_graph_halves_the_variance_of_parallel_workers() -> None:
    """The parents are those that a run of the app itself shows; chain credit ignores them."""
    (episode,) = run_episodes(workers(chained=False), [{"task": "t"}], engine=FakeEngine("x"))
    order = ["abcd".index(call.node[-1]) for call in episode.calls]
    traced = [call.parents for call in episode.calls]
    assert traced == [()] * 4
    chain = [(), (0,), (1,), (2,)]
    ratios = [
        gradient_variance(chain, order, seed) / gradient_variance(traced, order, seed)
        for seed in range(20)
    ]
    assert sum(ratios) / 20 > 2.0
    assert sorted(ratios)[2] > 1.5  # not by a few lucky seeds


def test_on_a_chain_both_credits_are_identical() -> None:
    (episode,) = run_episodes(workers(chained=True), [{"task": "t"}], engine=FakeEngine("x"))
    traced = [call.parents for call in episode.calls]
    order = ["abcd".index(call.node[-1]) for call in episode.calls]
    # each worker reads all before it; what a chain says of it is the same set of descendants
    rewards, values = [1.0, 0.0, 2.0, 0.5], [0.0] * 4
    own, _ = dag_gae(rewards, values, traced, 1.0, gamma=1.0, lam=1.0)
    chain, _ = dag_gae(rewards, values, [(), (0,), (1,), (2,)], 1.0, gamma=1.0, lam=1.0)
    assert order == [0, 1, 2, 3]
    assert torch.equal(own, chain)
    assert gradient_variance(traced, order, 0, 5) == pytest.approx(
        gradient_variance([(), (0,), (1,), (2,)], order, 0, 5)
    )
