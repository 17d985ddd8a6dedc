"""Signs in the metrics and what they are called; every sign is silent in a healthy run."""

from __future__ import annotations

from typing import Any

import pytest

from marft_graph.run.advice import advice

HEALTHY = {
    "calls": 64.0,
    "entropy": 0.5,
    "kl": 0.05,
    "clip_fraction": 0.02,
    "truncated_share": 0.0,
    "advantage_zero_share": 0.3,
    "logprob_gap": 0.4,  # of one token: no sign, where the mean is small
    "logprob_gap_mean": 1e-6,
    "explained_variance": 0.4,
}


def run(*changes: dict[str, float], failed: int = 0) -> list[dict[str, Any]]:
    """A run of thirty iterations; the last three have the changes."""
    rows = []
    for iteration in range(1, 31):
        stats = dict(HEALTHY)
        for change in changes if iteration > 27 else ():
            stats |= change
        agents = {"actor": stats, "judge": dict(HEALTHY)}
        rows.append(
            {"iteration": iteration, "episodes": 64, "episodes_failed": failed, "agents": agents}
        )
    return rows


def held_out(*returns: float) -> list[dict[str, Any]]:
    return [
        {"iteration": 10 * i, "eval_return": value, "eval_stderr": 0.02}
        for i, value in enumerate(returns)
    ]


def test_a_healthy_run_gets_no_advice() -> None:
    assert advice(run(), held_out(0.1, 0.5, 0.6)) == []
    assert advice([], []) == []


@pytest.mark.parametrize(
    ("change", "sign", "remedy"),
    [
        ({"truncated_share": 0.4}, "40% of actor's answers were cut off", "max_new_tokens"),
        ({"advantage_zero_share": 0.9}, "90% of actor's calls taught nothing", "filter_rounds"),
        ({"kl": 2.5}, "actor is far from its base, 2.50 nats", "kl_coef"),
        ({"clip_fraction": 0.5}, "50% of actor's ratios were clipped", "learning_rate"),
        ({"logprob_gap_mean": 0.2}, "tokens by 0.200 nats on average", "importance_cap"),
        ({"explained_variance": -0.5}, "actor's critic predicts", "advantage: group"),
        ({"entropy": 0.01}, "entropy of actor fell from 0.500 to 0.010", "entropy_coef"),
    ],
)
def test_a_sign_of_one_agent_is_told_with_a_remedy(
    change: dict[str, float], sign: str, remedy: str
) -> None:
    (found,) = advice(run(change), [])
    assert sign in found.sign
    assert remedy in found.remedy


def test_what_was_so_only_at_first_is_no_sign() -> None:
    rows = run()
    for row in rows[:10]:
        row["agents"]["actor"] |= {"truncated_share": 0.9, "kl": 3.0}
    assert advice(rows, []) == []


def test_failures_are_counted_over_the_whole_run() -> None:
    assert advice(run(failed=3), []) == []  # 4.7 %
    (found,) = advice(run(failed=16), [])
    assert found.sign == "25 % of the training episodes failed"


def test_a_held_out_return_that_was_better_before_is_told_unless_it_is_noise() -> None:
    (found,) = advice(run(), held_out(0.1, 0.8, 0.7))
    assert "best after iteration 10 (0.800) and is 0.700 now" in found.sign
    assert "load_best" in found.remedy
    assert advice(run(), held_out(0.1, 0.8, 0.77)) == []
