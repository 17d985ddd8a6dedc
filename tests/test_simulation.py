"""The simulation of many GPUs, against arithmetic by hand where it is easy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def simulation() -> Iterator[Any]:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)  # as for a script there
    yield importlib.import_module("simulation")
    sys.path.remove(folder)


@pytest.fixture
def figures(simulation: Any) -> Any:
    """Nothing varies, and only sampling (1 s a step) and training (10 tokens/s) take time."""
    nothing = dict.fromkeys(
        ("answer_sigma", "tool", "tool_sigma", "step_per_call", "prompt", "hop", "adapter_load"),
        0.0,
    ) | dict.fromkeys(
        (
            *("adapter_bytes", "driver_call", "driver_token", "token_bytes", "pack_token"),
            *("unpack_token", "credit_call", "trace_call", "adapter_write", "checkpoint_write"),
        ),
        0.0,
    )
    return replace(
        simulation.load()[0],
        **nothing,
        calls=2,
        answer=100.0,
        episodes_per_gpu=4,
        step=1.0,
        prefill=1000.0,
        running_most=256,
        trained=10.0,
    )


def seconds(simulation: Any, figures: Any, setup: Any) -> float:
    return simulation.describe("", figures, setup)["s an iteration"]


def test_without_overhead_and_variance_more_gpus_take_no_longer(
    simulation: Any, figures: Any
) -> None:
    # Two calls of 100 steps of 1 s; then 4 episodes of 200 tokens for each GPU at 10 tokens/s.
    for gpus in (1, 8, 64):
        setup = simulation.Setup(gpus, is_together=True)
        assert seconds(simulation, figures, setup) == pytest.approx(200 + 80)
        assert simulation.describe("", figures, setup)["GPUs busy"] == "100%"


def test_running_calls_slow_each_other(simulation: Any, figures: Any) -> None:
    slower = replace(figures, step_per_call=0.5)
    setup = simulation.Setup(2, learners=1)
    # Four run while the short ones do: 10 steps of 1 + 4 * 0.5 s; then 90 steps of 1.5 s.
    episodes = [[(10.0, 0.0)], [(10.0, 0.0)], [(10.0, 0.0)], [(100.0, 0.0)]]
    found = simulation.simulate(slower, setup, episodes)
    assert found.seconds == pytest.approx(10 * 3 + 90 * 1.5)
    assert found.busy == pytest.approx(found.seconds)
    # One at a time: each takes its own steps at 1.5 s.
    alone = simulation.simulate(replace(slower, running_most=1), setup, episodes)
    assert alone.seconds == pytest.approx(130 * 1.5)


def test_one_slow_episode_bounds_the_iteration(simulation: Any, figures: Any) -> None:
    setup = simulation.Setup(65, learners=1)
    short = [[(10.0, 0.0)]] * 500
    found = simulation.simulate(figures, setup, [*short, [(700.0, 5.0), (300.0, 5.0)]])
    assert found.seconds == pytest.approx(700 + 5 + 300 + 5)
    assert found.busy < 1010 + 64 * 20


def test_a_call_goes_to_the_server_with_the_fewest(simulation: Any, figures: Any) -> None:
    setup = simulation.Setup(3, learners=1)
    one_each = replace(figures, running_most=1, driver_call=20.0)
    # They arrive at 20, 40 and 60 s; the third would wait for the first one's server until 120.
    episodes = [[(100.0, 0.0)], [(5.0, 0.0)], [(30.0, 0.0)]]
    found = simulation.simulate(one_each, setup, episodes)
    assert found.seconds == pytest.approx(120)
    assert found.busy == pytest.approx(135)


def test_a_driver_starts_its_calls_one_after_another(simulation: Any, figures: Any) -> None:
    busy = replace(figures, driver_call=3.0, driver_token=0.01, step=1e-6)
    episodes = [[(100.0, 0.0)] * 2] * 20
    for drivers in (1, 2):
        setup = simulation.Setup(9, learners=1, drivers=drivers)
        found = simulation.simulate(busy, setup, episodes)
        assert found.seconds == pytest.approx(40 * 4.0 / drivers, rel=1e-3)


def test_what_takes_most_of_an_iteration_is_named(simulation: Any, figures: Any) -> None:
    setup = simulation.Setup(8, learners=1)
    slow = {
        "an average episode": replace(figures, tool=1e4),
        "sampling": replace(figures, step_per_call=1.0, trained=1e9),
        "drivers": replace(figures, driver_call=1000.0),
        "the longest episodes": replace(figures, answer_sigma=2.0, answer_most=1e5, trained=1e9),
        "training": replace(figures, trained=0.1),
        "traces and checkpoints": replace(figures, trace_call=1000.0),
        "adapters to servers": replace(figures, adapter_load=1e5),
    }
    for name, changed in slow.items():
        spent = simulation.iteration(changed, setup)
        assert max(spent, key=spent.__getitem__) == name


def test_the_parts_of_a_rollout_add_up(simulation: Any, figures: Any) -> None:
    setup = simulation.Setup(2, learners=1)
    given = replace(figures, step_per_call=0.5, driver_call=10.0, tool=5.0)
    # Eight at once: 100 steps of 1 + 8 * 0.5 s for each call; alone 1.5 s.
    spent = simulation.sampling_parts(given, setup)
    assert spent["an average episode"] == pytest.approx(2 * (150 + 5))
    assert spent["sampling"] == pytest.approx(2 * (500 + 5) - 310)
    assert spent["drivers"] > 0
    assert spent["the longest episodes"] == pytest.approx(0)


def test_asynchronous_takes_the_longer_of_the_two(simulation: Any, figures: Any) -> None:
    setup = simulation.Setup(5, learners=1)
    # 20 episodes: 200 s of sampling, 20 * 200 tokens for one learner at 10 tokens/s.
    assert seconds(simulation, figures, setup) == pytest.approx(200 + 400)
    later = replace(setup, is_asynchronous=True)
    assert seconds(simulation, figures, later) == pytest.approx(400)
    faster = replace(figures, trained=100.0)
    assert seconds(simulation, faster, later) == pytest.approx(200)


def test_what_a_learner_exchanges(simulation: Any, figures: Any) -> None:
    sampled = simulation.Rollout(seconds=1.0, busy=1.0, tokens=1000.0)
    given = replace(
        figures,
        agents=2,
        adapter_bytes=100.0,
        link=10.0,
        hop=1.0,
        token_bytes=2.0,
        pack_token=0.4,
        unpack_token=0.1,
        checkpoint_every=5,
        checkpoint_write=0.5,
    )
    rest = simulation.learning_parts(given, simulation.Setup(4, is_together=True), sampled)
    assert rest["gradients"] == pytest.approx(2 * (2 * 3 / 4 * 10 + 2 * 2))  # ring and hops
    assert rest["exchange of episodes"] == pytest.approx(1000 * (0.1 + 0.2 + 0.1))
    assert rest["traces and checkpoints"] == pytest.approx(3 * 200 * 0.5 / 5)
    assert rest["adapters to servers"] == 0
    apart = replace(given, adapter_write=0.01, shared_disk=100.0, adapter_load=3.0)
    rest = simulation.learning_parts(apart, simulation.Setup(4, learners=1), sampled)
    assert rest["adapters to servers"] == pytest.approx(2 + 3 * 2 + 2 * 3)
    assert rest["gradients"] == rest["exchange of episodes"] == 0


def test_every_figure_says_where_it_comes_from(simulation: Any) -> None:
    figures, sources = simulation.load(["answer=800"])
    assert figures.answer == 800
    assert set(sources.values()) == {"assumed", "computed", "measured"}
    with pytest.raises(SystemExit, match="no figure is called 'answers'"):
        simulation.load(["answers=800"])
