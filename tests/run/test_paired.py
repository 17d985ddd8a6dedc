"""The verdict on paired returns: cautious with equal policies, not blind with different ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from marft_graph.run.paired import bootstrap_interval, paired_difference, sign_flip_tail

Draw = Callable[[np.random.Generator, int], np.ndarray]


def solved(rng: np.random.Generator, count: int) -> np.ndarray:
    """Two equal policies on examples that are solved with probabilities of their own."""
    chance = rng.beta(0.5, 0.5, count)
    return (rng.random((2, count)) < chance).astype(float)


def rarely_solved(rng: np.random.Generator, count: int) -> np.ndarray:
    return (rng.random((2, count)) < 0.04).astype(float)


def graded(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(rng.normal(size=count), 1, (2, count))


def skewed(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.exponential(1, (2, count)) ** 2


@pytest.mark.parametrize("returns", [solved, rarely_solved, graded, skewed])
@pytest.mark.parametrize("count", [4, 8, 60])
def test_equal_policies_are_rarely_called_better(returns: Draw, count: int) -> None:
    rng = np.random.default_rng(2026)
    verdicts = []
    for _ in range(400):
        before, after = returns(rng, count)
        verdicts.append(paired_difference(after - before).verdict)
    assert verdicts.count("better") <= 20  # 5 % of 400; 2.5 % are expected at most
    assert verdicts.count("worse") <= 20


@pytest.mark.parametrize(
    ("count", "gain", "found"), [(8, 0.9, 0.5), (30, 0.5, 0.9), (120, 0.25, 0.9)]
)
def test_a_real_difference_is_found(count: int, gain: float, found: float) -> None:
    rng = np.random.default_rng(7)
    better = 0
    for _ in range(60):
        before, after = rng.random((2, count)) < np.array([[0.05], [0.05 + gain]])
        better += paired_difference(after.astype(float) - before).verdict == "better"
    assert better >= 60 * found


def test_the_tail_is_the_share_of_sign_patterns_that_reach_the_mean() -> None:
    differences = [0.5, -0.25, 1.0, 0.75]
    reached = [
        sum(s * abs(d) for s, d in zip(signs, differences, strict=True)) >= sum(differences)
        for signs in product((1, -1), repeat=4)
    ]
    assert sign_flip_tail(differences) == sum(reached) / 16


def test_sampled_signs_agree_with_all_signs() -> None:
    # 15 differences of 1, of which 12 are positive: P(at least 12 of 15 heads) = 576/32768.
    tail = sign_flip_tail([1.0] * 12 + [-1.0] * 3)
    assert tail == pytest.approx(576 / 32768, rel=0.3)


def test_examples_without_a_difference_change_no_probability() -> None:
    assert sign_flip_tail([0.0] * 50 + [1.0, 2.0]) == sign_flip_tail([1.0, 2.0]) == 0.25
    assert sign_flip_tail([0.0, 0.0]) == 1.0


def test_the_interval_covers_the_mean_in_about_95_of_100() -> None:
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.exponential(1.0, 60), resamples=1000)
        inside += low <= 1.0 <= high
    assert 0.90 <= inside / 300 <= 0.985


def test_the_interval_is_that_of_the_mean() -> None:
    # 100 differences of 0 and 100 of 1: mean 0.5, standard error 0.5 / sqrt(200) = 0.0354,
    # normal 95 % interval 0.431 to 0.569.
    low, high = bootstrap_interval([0.0, 1.0] * 100)
    assert low == pytest.approx(0.431, abs=0.012)
    assert high == pytest.approx(0.569, abs=0.012)
    assert bootstrap_interval([0.0, 1.0] * 100) == (low, high)


def test_worse_mirrors_better() -> None:
    differences = [0.2, 0.4, 0.1, 0.9, 0.3, 0.2, 0.5, 0.4]
    assert paired_difference(differences).verdict == "better"
    assert paired_difference([-d for d in differences]).verdict == "worse"


@pytest.mark.parametrize("bad", [[], [float("nan")], [1.0, float("inf")]])
def test_nothing_and_what_is_not_finite_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="must be finite and at least one"):
        paired_difference(bad)
