"""The FlexMG itself: loops, order, round trip, differences, frozen agents, influence."""

from __future__ import annotations

import json
import re
from typing import Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph

from marft_graph import FlexMG, compile_graph
from marft_graph.errors import GraphError, UnknownNodeError
from marft_graph.graph.draw import summary, to_dot, to_mermaid, warnings
from marft_graph.graph.picture import to_svg
from tests.apps import duo, model, voters
from tests.graph.real_apps import trading_team


class State(TypedDict, total=False):
    q: str
    a: str
    b: str


class OnlyB(TypedDict):
    b: str


def write_a(state: State) -> Any:
    return {"a": model.invoke(f"a {state}").text}


def write_b(state: State) -> Any:
    return {"b": model.invoke(f"b {state}").text}


def built(nodes: dict[str, Any], *edges: tuple[str, str], **schemas: Any) -> FlexMG:
    builder = StateGraph(State, **schemas)
    for name, node in nodes.items():
        builder.add_node(name, node)
    for edge in edges:
        builder.add_edge(*edge)
    return compile_graph(builder)


def test_it_survives_json() -> None:
    flex_mg = compile_graph(trading_team())
    again = FlexMG.from_dict(json.loads(json.dumps(flex_mg.to_dict())))
    assert again.to_dict() == flex_mg.to_dict()
    assert again.hash == flex_mg.hash
    assert again.difference(flex_mg) == []


def test_json_that_was_changed_is_refused() -> None:
    values = compile_graph(duo()).to_dict()
    values["nodes"]["actor"]["role"] = "environment"
    with pytest.raises(GraphError, match="differs from its own hash"):
        FlexMG.from_dict(values)
    with pytest.raises(GraphError, match="no Flex-MG"):
        FlexMG.from_dict({})


def test_a_difference_can_be_read() -> None:
    chain = [(START, "x"), ("x", "y"), ("y", END)]
    one = built({"x": write_a, "y": write_b}, *chain)
    other = built({"x": write_a, "y": write_b, "z": write_b}, *chain[:2], ("y", "z"))
    assert one.difference(other) == [
        "gone: edge y -> __end__ (control)",
        "new: edge x -> z (data a, always)",
        "new: edge y -> z (control)",
        "new: edge y -> z (data b, always)",
        "new: edge z -> __end__ (control)",
        "new: edge z -> __end__ (data b)",
        "new: node z (agent)",
    ]


def test_agents_that_are_not_trained_are_frozen_and_pass_on_what_they_read() -> None:
    chain = [(START, "x"), ("x", "y"), ("y", "z")]

    def from_b(state: OnlyB) -> Any:
        return {"a": model.invoke(state["b"]).text}

    flex_mg = built({"x": write_a, "y": write_b, "z": from_b}, *chain)
    assert flex_mg.dependency("z", "x") == "never"
    frozen = flex_mg.training(["x", "z"])
    assert (frozen.agents, frozen.frozen) == (("x", "z"), ("y",))
    assert frozen.dependency("z", "x") == "possible"  # y's answer is no call of the game
    assert "frozen (call a model, not trained): y" in summary(frozen)
    assert flex_mg.training([]).agents == ("x", "y", "z")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    flex_mg = compile_graph(duo())
    with pytest.raises(UnknownNodeError, match="did you mean 'planner'"):
        flex_mg.training(["plannner"])
    with pytest.raises(UnknownNodeError, match="its agents are planner, actor"):
        flex_mg.dependency("actor", "nobody")


def test_an_agent_that_cannot_reach_the_output_is_warned_of() -> None:
    flex_mg = built({"x": write_a, "y": write_b}, (START, "x"), (START, "y"), output_schema=OnlyB)
    assert warnings(flex_mg) == ["x never influences the output"]
    assert warnings(compile_graph(duo())) == []


def test_a_graph_without_a_model_says_so() -> None:
    flex_mg = built({"x": lambda state: {"a": "1"}}, (START, "x"))
    assert flex_mg.agents == ()
    assert "warning: no node calls a chat model, so there is nothing to train" in summary(flex_mg)
    with pytest.raises(GraphError, match="nothing to train"):
        flex_mg.training([])


def test_the_summary_says_what_each_agent_observes() -> None:
    assert summary(compile_graph(voters(2))).splitlines() == [
        "2 agents, 0 other nodes",
        "  voter       observes no other agent",
        "  aggregator  observes voter",
        "side by side with itself (Send): voter",
    ]


def test_drawings_name_nodes_edges_and_what_is_read() -> None:
    flex_mg = compile_graph(duo())
    mermaid = to_mermaid(flex_mg)
    ids = dict(re.findall(r'(n\d+)\(\["(\w+)"\]\)', mermaid))
    assert sorted(ids.values()) == ["actor", "planner"]
    planner, actor = sorted(ids, key=ids.get, reverse=True)
    assert f"{planner} --> {actor}" in mermaid
    assert '"planner" -> "actor" [style=solid, color=darkorange];' in to_dot(flex_mg)


def test_an_observation_says_from_where_it_is_known() -> None:
    def by_code(state: State) -> Any:
        return {"b": model.invoke(state["a"]).text}

    def looks(given: Any) -> Any:
        return given

    def by_schema(state: State) -> Any:
        kept = [state]
        return {"b": model.invoke(str(looks(kept[0])["a"])).text}

    def unread(state: State) -> Any:
        kept = [state]
        return {"b": model.invoke(str(len(kept))).text}

    nodes = {"x": write_a, "code": by_code, "schema": by_schema, "unread": unread}
    builder = StateGraph(State)
    for name, node in nodes.items():
        builder.add_node(name, node)
    builder.add_edge(START, "x")
    for name in ("code", "schema", "unread"):
        builder.add_edge("x", name)
    app = builder.compile()
    still = compile_graph(app)
    assert [still.evidence(i, "x") for i in ("code", "schema", "unread")] == [
        "code",
        "schema",
        "schema",
    ]
    assert still.dependency("code", "x") == "always"
    assert still.dependency("schema", "x") == "possible"
    assert still.explain("schema", "x").startswith(
        "schema observes x (possible, by its state schema alone)"
    )
    assert "unread  observes by its state schema alone x" in summary(still)
    run = still.observed([("schema", "x")])
    assert [run.evidence(i, "x") for i in ("code", "schema", "unread")] == ["code", "run", "schema"]
    assert "schema  observes in some runs x" in summary(run)
    assert 'class="control carries run"' in to_svg(run)
    assert 'class="control carries schema"' in to_svg(run)
    assert FlexMG.from_dict(run.to_dict()).evidence("schema", "x") == "run"
    assert run.hash == still.hash
