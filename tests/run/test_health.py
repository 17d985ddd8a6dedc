"""Signs of a collapse in an iteration's metrics."""

from __future__ import annotations

from typing import Any

import pytest

from marft_graph.run.health import Health


def row(value: float | None = 0.5, **stats: float) -> dict[str, Any]:
    return {"return_mean": value, "agents": {"actor": {"entropy": 1.0, "kl": 0.01, **stats}}}


def watch(**limits: float) -> Health:
    known: dict[str, Any] = {"entropy_floor": None, "kl_ceiling": None, "return_floor": None}
    return Health(**{**known, **limits})


def test_a_healthy_row_has_no_problem() -> None:
    health = watch(entropy_floor=0.1, kl_ceiling=1.0, return_floor=0.5)
    assert all(health.problem(row()) is None for _ in range(20))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["loss_policy", "loss_value"])
def test_a_loss_that_is_not_finite_is_named(name: str, value: float) -> None:
    assert f"{name} of actor is {value}" in str(watch().problem(row(**{name: value})))


def test_the_entropy_floor_and_the_kl_ceiling_are_named() -> None:
    health = watch(entropy_floor=0.1, kl_ceiling=1.0)
    assert "below entropy_floor=0.1" in str(health.problem(row(entropy=0.05)))
    assert "above kl_ceiling=1" in str(health.problem(row(kl=2.0)))


def test_a_return_that_falls_for_five_iterations_is_named() -> None:
    health = watch(return_floor=0.5)
    found = [health.problem(row(value)) for value in [0.8] * 6 + [0.1] * 5]
    # means of five: .8 .8, then .66 .52 .38 - below half of .8 with the third low one
    assert [problem is not None for problem in found].index(True) == 8
    assert "below return_floor=0.5 times its best, 0.8" in str(found[8])


def test_one_bad_batch_is_no_collapse() -> None:
    health = watch(return_floor=0.5)
    assert all(health.problem(row(value)) is None for value in [0.8] * 6 + [0.0] + [0.8] * 6)


def test_after_older_weights_are_back_the_window_starts_anew() -> None:
    health = watch(return_floor=0.5)
    for value in [0.8] * 6 + [0.1] * 4:
        health.problem(row(value))
    health.forget()
    assert all(health.problem(row(0.5)) is None for _ in range(10))
