"""Whether one policy is better than another, from returns on the same examples and seeds.

Pure functions of numbers. The verdict is cautious: "better" and "worse" are each claimed wrongly in
at most 2.5 % of comparisons of equal policies, however few or coarse the returns are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

Verdict = Literal["better", "worse", "no difference shown"]
TAIL = 0.025
"""Largest probability of each wrong claim."""
_EXACT = 12  # 2**12 sign patterns are enumerated; for more differences signs are sampled
_FLIPS = 5_000
_RESAMPLES = 2_000
_CHUNK = 2_000_000


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """What paired returns say of two policies."""

    mean: float
    """Mean of the differences, candidate minus reference."""
    low: float
    """Lower end of the 95 % bootstrap interval of the mean."""
    high: float
    p_better: float
    """How often equal policies would seem better by at least as much."""
    p_worse: float
    pairs: int

    @property
    def verdict(self) -> Verdict:
        """In words."""
        if self.low > 0 and self.p_better <= TAIL:
            return "better"
        return "worse" if self.high < 0 and self.p_worse <= TAIL else "no difference shown"


def paired_difference(differences: Sequence[float], *, seed: int = 0) -> PairedDifference:
    """Interval, tail probabilities and verdict for paired differences of returns.

    Args:
        differences: one for each example (over several seeds: their mean), at least one.
        seed: of the resampling.

    Raises:
        ValueError: there is no difference, or one is not finite.

    >>> paired_difference([1.0] * 8).verdict, paired_difference([1.0] * 3).verdict
    ('better', 'no difference shown')
    """
    values_N = np.asarray(differences, dtype=float)
    if values_N.size == 0 or not np.isfinite(values_N).all():
        raise ValueError(f"differences must be finite and at least one; got {differences!r}")
    low, high = bootstrap_interval(differences, seed=seed)
    return PairedDifference(
        mean=float(values_N.mean()),
        low=low,
        high=high,
        p_better=sign_flip_tail(differences, seed=seed),
        p_worse=sign_flip_tail([-value for value in differences], seed=seed),
        pairs=len(differences),
    )


def sign_flip_tail(differences: Sequence[float], *, seed: int = 0) -> float:
    """Probability of a mean at least as large where every difference may as well be its negative.

    That is so for equal policies: the two runs of a pair could be exchanged. The test is exact
    (Fisher's randomisation test of paired data): over all signs where few differences are not 0,
    else over random signs with the observed ones counted among them.

    >>> sign_flip_tail([1.0, 2.0, 3.0])  # one of eight patterns reaches 6
    0.125
    """
    values_N = np.asarray(differences, dtype=float)
    values_N = values_N[values_N != 0]
    if values_N.size == 0:
        return 1.0
    least = values_N.sum() - 1e-9 * np.abs(values_N).sum()
    if values_N.size <= _EXACT:
        patterns = np.arange(2**values_N.size)[:, None] >> np.arange(values_N.size)
        signs_FN = 1.0 - 2.0 * (patterns & 1)
        return float((signs_FN @ values_N >= least).mean())
    rng = np.random.default_rng(seed)
    reached, left = 1, _FLIPS
    while left:
        rows = min(left, max(1, _CHUNK // values_N.size))
        signs_FN = 1.0 - 2.0 * rng.integers(0, 2, size=(rows, values_N.size), dtype=np.int8)
        reached += int((signs_FN @ values_N >= least).sum())
        left -= rows
    return reached / (_FLIPS + 1)


def bootstrap_interval(
    differences: Sequence[float], *, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: bias-corrected and accelerated (BCa, Efron 1987).

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    values_N = np.asarray(differences, dtype=float)
    centred_N = values_N - values_N.mean()
    spread = float((centred_N**2).sum())
    if spread == 0:
        return float(values_N[0]), float(values_N[0])
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // values_N.size)
    means_R = np.concatenate(
        [
            values_N[rng.integers(values_N.size, size=(count, values_N.size))].mean(axis=1)
            for count in _counts(resamples, rows)
        ]
    )
    means_R.sort()
    below = (means_R < values_N.mean()).mean() + 0.5 * (means_R == values_N.mean()).mean()
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(float(below), 1 / resamples), 1 - 1 / resamples))
    acceleration = float((centred_N**3).sum()) / (6 * spread**1.5)
    ends = []
    for tail in (TAIL, 1 - TAIL):
        z = bias + normal.inv_cdf(tail)
        share = normal.cdf(bias + z / (1 - acceleration * z))
        ends.append(float(means_R[min(resamples - 1, math.floor(share * resamples))]))
    return ends[0], ends[1]


def _counts(total: int, most: int) -> list[int]:
    """A total in portions of at most `most`."""
    return [most] * (total // most) + ([total % most] if total % most else [])
