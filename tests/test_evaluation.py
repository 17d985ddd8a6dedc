"""What an evaluation says of its returns."""

from __future__ import annotations

import asyncio
import statistics

import pytest
from langgraph.graph import START, StateGraph

from marft_graph import FakeEngine, run_episodes
from marft_graph.episode import Episode, Failure
from marft_graph.evaluation import failed_nodes, standard_error, summarize
from tests.apps import DuoState, model


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


def test_failures_are_counted_under_the_agent_that_inspect_names() -> None:
    """The inner node of an agent that is a graph is folded into the agent's name."""

    def agent(state: DuoState) -> dict[str, str]:
        if len(state["question"]) > 1:
            raise ValueError(model.invoke(state["question"]).text)
        return {"answer": "short"}

    inner = StateGraph(DuoState).add_node("agent", agent).add_edge(START, "agent").compile()
    graph = StateGraph(DuoState).add_node("writer", inner).add_edge(START, "writer").compile()
    examples = [{"question": "q" * length} for length in (1, 2, 3)]
    found = run_episodes(graph, examples, engine=FakeEngine({"writer": "no"}))
    assert failed_nodes(found) == {"writer": 2}
    assert [e.failure for e in found] == [None, Failure.APP, Failure.APP]


@pytest.mark.parametrize(
    ("settings", "failure"),
    [
        ({"reward": lambda e, s: 1 / 0, "reward_errors": "drop"}, Failure.REWARD),
        ({"episode_timeout": 0.2}, Failure.TIMEOUT),
    ],
)
def test_an_episode_says_what_kind_of_failure_ended_it(
    settings: dict[str, object], failure: Failure
) -> None:
    async def waits(state: DuoState) -> dict[str, str]:
        await asyncio.sleep(0 if "reward" in settings else 30)
        return {"answer": "late"}

    graph = StateGraph(DuoState).add_node("writer", waits).add_edge(START, "writer").compile()
    (found,) = run_episodes(graph, [{"question": "q"}], engine=FakeEngine("x"), **settings)
    assert found.failure is failure
