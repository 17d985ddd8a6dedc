"""Is a run still learning? Signs of a collapse, read from the metrics of each iteration.

It says what is wrong; what is done about it is the trainer's business.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from marft_graph.names import agent_of_adapter

_WINDOW = 5
"""Iterations whose mean return is compared with the best such mean: one batch is too noisy."""


class Health:
    """Watches the metrics of a run.

    Args:
        entropy_floor: least mean entropy of an agent, in nats per token; None: not watched.
        kl_ceiling: most KL of an agent to the base, in nats per token; None: not watched.
        return_floor: share of its best under which the return of five iterations must not fall;
            None: not watched. It is watched only where the best is above 0.

    >>> health = Health(entropy_floor=0.1, kl_ceiling=None, return_floor=None)
    >>> health.problem({"return_mean": 1.0, "agents": {"actor": {"entropy": 0.01}}})
    'the entropy of actor is 0.01 nats per token, below entropy_floor=0.1'
    """

    def __init__(
        self,
        *,
        entropy_floor: float | None,
        kl_ceiling: float | None,
        return_floor: float | None,
    ) -> None:
        self._entropy_floor = entropy_floor
        self._kl_ceiling = kl_ceiling
        self._return_floor = return_floor
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._best = -math.inf

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """What an iteration's metrics show to be wrong, or None; call it once an iteration."""
        for adapter, stats in row["agents"].items():
            agent = agent_of_adapter(adapter)
            for name, value in stats.items():
                if name.startswith("loss") and not math.isfinite(value):
                    return f"{name} of {agent} is {value}"
            entropy, kl = stats.get("entropy"), stats.get("kl")
            if None not in (entropy, self._entropy_floor) and entropy < self._entropy_floor:
                return (
                    f"the entropy of {agent} is {entropy:.3g} nats per token, below "
                    f"entropy_floor={self._entropy_floor:g}"
                )
            if None not in (kl, self._kl_ceiling) and kl > self._kl_ceiling:
                return (
                    f"the KL of {agent} to the base is {kl:.3g} nats per token, above "
                    f"kl_ceiling={self._kl_ceiling:g}"
                )
        return self._fallen(row["return_mean"])

    def forget(self) -> None:
        """Start the returns' window anew, after older weights were put back."""
        self._recent.clear()

    def _fallen(self, value: float | None) -> str | None:
        if value is None or self._return_floor is None:
            return None
        self._recent.append(value)
        if len(self._recent) < _WINDOW:
            return None
        mean = sum(self._recent) / _WINDOW
        self._best = max(self._best, mean)
        if self._best > 0 and mean < self._return_floor * self._best:
            return (
                f"the return of the last {_WINDOW} iterations is {mean:.3g}, below "
                f"return_floor={self._return_floor:g} times its best, {self._best:.3g}"
            )
        return None
