"""What an evaluation says of its returns."""

from __future__ import annotations

import statistics

import pytest

from marft_graph.episode import Episode
from marft_graph.evaluation import standard_error, summarize


def episodes(*returns: float, each: int = 1) -> list[Episode]:
    return [
        Episode({}, (), outcome_reward=value, example_index=index // each)
        for index, value in enumerate(returns)
    ]


def test_one_episode_an_example_has_the_textbook_error() -> None:
    returns = [0.0, 1.0, 1.0, 3.0]
    found = summarize(episodes(*returns), greedy=False)
    assert found.return_stderr == pytest.approx(statistics.stdev(returns) / 2)


def test_repeated_episodes_count_as_one_example() -> None:
    """Four copies of each return tell nothing new, so they make the mean no surer."""
    once = summarize(episodes(0.0, 1.0, 1.0, 3.0), greedy=False)
    copies = [value for value in (0.0, 1.0, 1.0, 3.0) for _ in range(4)]
    assert summarize(episodes(*copies, each=4), greedy=False).return_stderr == pytest.approx(
        once.return_stderr
    )
    assert standard_error([[0.0, 1.0], [1.0, 3.0]]) == pytest.approx(
        statistics.stdev([0.5, 2.0]) / 2**0.5
    )


def test_an_example_alone_shows_no_error() -> None:
    assert summarize(episodes(0.0, 1.0, each=2), greedy=False).return_stderr == 0.0


def test_an_evaluation_is_shown_in_a_line_however_many_episodes_it_had() -> None:
    shown = repr(summarize(episodes(*[0.25] * 1000), greedy=False))
    assert len(shown) < 250
    assert "return_mean=0.25" in shown
