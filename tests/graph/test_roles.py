"""Which nodes call a model: every way to reach one is found, or said to be uncertain."""

from __future__ import annotations

from typing import Any

import pytest
from langgraph.graph import START, MessagesState, StateGraph

from marft_graph import FlexMG, compile_graph
from marft_graph.graph.draw import summary
from tests.graph.agent_places import AGENTS, NONE, UNCERTAIN


def compiled(node: Any) -> FlexMG:
    """A graph of one node."""
    builder = StateGraph(MessagesState)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    return compile_graph(builder.compile())


@pytest.mark.parametrize("name", AGENTS)
def test_a_node_that_asks_a_model_is_an_agent(name: str) -> None:
    assert compiled(AGENTS[name]).agents == ("node",)


@pytest.mark.parametrize("name", UNCERTAIN)
def test_a_node_that_calls_what_nobody_knows_is_uncertain(name: str) -> None:
    flex_mg = compiled(UNCERTAIN[name])
    assert flex_mg.agents == ()
    assert flex_mg.environment == ()
    assert flex_mg.uncertain == ("node",)
    text = summary(flex_mg)
    assert "no model found in their code, not all of it known: node" in text
    assert "agent_places.py, line" in text
    assert "calls no model" not in text


@pytest.mark.parametrize("name", NONE)
def test_a_node_whose_code_certainly_asks_none_is_environment(name: str) -> None:
    flex_mg = compiled(NONE[name])
    assert flex_mg.agents == ()
    assert flex_mg.uncertain == ()
    assert flex_mg.environment == ("node",)
