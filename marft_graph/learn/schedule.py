"""Learning rates over a run: a function of the iteration, so that a resumed run needs no state."""

from __future__ import annotations

import math
from typing import Literal


def rate_share(
    schedule: Literal["constant", "linear", "cosine"], iteration: int, iterations: int
) -> float:
    """Share of the learning rate that an iteration takes; 1 in the first, above 0 in the last.

    Args:
        schedule: linear, 1 - t; cosine, (1 + cos(pi t)) / 2; with t = (iteration - 1) / iterations.
        iteration: from 1 to `iterations`; later ones take what the last one took.
        iterations: of the whole run.

    >>> [rate_share("linear", i, 4) for i in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> rate_share("cosine", 3, 4)
    0.5
    """
    t = (min(iteration, iterations) - 1) / iterations
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - t
    return round(0.5 * (1.0 + math.cos(math.pi * t)), 12)
