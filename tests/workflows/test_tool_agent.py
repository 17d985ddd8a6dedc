"""An agent of LangChain's `create_agent` is trained with its tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage

from marft_graph import FakeEngine, compile_graph, run_episodes
from marft_graph.workflow import load_target
from workflows.tool_agent import task

FOLDER = Path(__file__).parents[2] / "workflows" / "tool_agent"
EXAMPLE = {"question": "What is 7+5?", "answer": "12"}
ADD = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 7, "b": 5}, "id": "c"}])


@pytest.mark.parametrize(
    ("said", "calls", "expected"),
    [
        ([ADD, "12"], 2, 1.0),
        ([ADD, "13"], 2, 0.0),
        (["12"], 1, 0.8),
        (["11"], 1, 0.0),
    ],
)
def test_the_tool_is_called_and_pays(said: list[Any], calls: int, expected: float) -> None:
    engine = FakeEngine({"model": said})
    workflow = load_target(str(FOLDER))
    (episode,) = run_episodes(
        workflow.graph, [EXAMPLE], engine=engine, reward=workflow.reward, inputs=workflow.inputs
    )
    engine.close()
    assert episode.ok, episode.error
    assert len(episode.calls) == calls
    assert episode.total_reward == pytest.approx(expected)
    assert {tool["function"]["name"] for tool in episode.calls[0].tools} == {"add", "sub"}
    if calls == 2:
        assert episode.calls[1].messages[-2]["content"] == "12"  # what the tool returned


def test_the_agent_is_found_and_held_out_calculations_are_not_trained_on() -> None:
    assert compile_graph(load_target(str(FOLDER)).graph).agents == ("model",)
    train, held_out = task.load_data()
    assert (len(train), len(held_out)) == (200, 134)
    assert not set(train["question"]) & set(held_out["question"])
    with pytest.raises(ValueError, match="has 'generated' only"):
        task.load_data("gsm8k")
