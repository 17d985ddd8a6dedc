"""A dry run finds the agents that the code does not show, and keeps apps going."""

from __future__ import annotations

import importlib
from typing import Any, Literal, TypedDict

from langchain_core.messages import AIMessage
from langgraph.graph import START, StateGraph
from pydantic import BaseModel, Field

from marft_graph import compile_graph
from marft_graph.rollout.dry_run import example_of
from tests.apps import duo, model


class State(TypedDict, total=False):
    q: str
    a: str
    b: str


def hidden(state: State) -> Any:
    """Reaches its model in a way that no reading of code finds."""
    return {"a": importlib.import_module(".".join(("tests", "apps"))).model.invoke(state["q"]).text}


def shown(state: State) -> Any:
    return {"b": model.invoke(state["a"]).text}


def built(**nodes: Any) -> Any:
    builder = StateGraph(State)
    before = START
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    return builder.compile()


def test_an_agent_that_the_code_hides_is_found() -> None:
    app = built(hidden=hidden, shown=shown)
    assert compile_graph(app).agents == ("shown",)
    flex_mg = compile_graph(app, [{"q": "x"}])
    assert flex_mg.agents == ("hidden", "shown")
    assert flex_mg.dependency("shown", "hidden") == "possible"


def test_a_graph_that_is_made_while_a_node_runs_is_found() -> None:
    def outer(state: State) -> Any:
        return {"a": built(inner=hidden).invoke({"q": state["q"]})["a"]}

    flex_mg = compile_graph(built(outer=outer, shown=shown), [{"q": "x"}])
    assert flex_mg.agents == ("outer/inner", "shown")
    assert flex_mg.dependency("shown", "outer/inner") == "possible"


def test_calls_are_counted_and_failures_are_told() -> None:
    def twice(state: State) -> Any:
        return {"a": model.invoke("1").text + model.invoke("2").text}

    def fails(state: State) -> Any:
        if state["q"] == "bad":
            raise RuntimeError("no")
        return {}

    app = built(twice=twice, fails=fails)
    flex_mg = compile_graph(app, [{"q": "good"}, {"q": "bad"}])
    assert flex_mg.graph.nodes["twice"]["calls"] == 2
    assert flex_mg.notes == ("dry run: 1 of 2 runs failed: RuntimeError in node 'fails': no",)


def test_the_example_s_input_can_be_made() -> None:
    flex_mg = compile_graph(
        duo(), [{"text": "x"}], inputs=lambda example: {"question": example["text"]}
    )
    assert [flex_mg.graph.nodes[name]["calls"] for name in flex_mg.agents] == [1, 1]


def test_structured_output_gets_what_its_schema_allows() -> None:
    class Part(BaseModel):
        size: int = Field(ge=3)

    class Plan(BaseModel):
        kind: Literal["long", "short"]
        parts: list[Part]
        note: str | None = None

    def plan(state: State) -> Any:
        made = model.with_structured_output(Plan).invoke(state["q"])
        return {"a": f"{made.kind} {len(made.parts)}"}

    flex_mg = compile_graph(built(plan=plan), [{"q": "x"}])
    assert flex_mg.notes == ()
    assert Plan.model_validate(example_of(Plan.model_json_schema())).parts == [Part(size=3)]
    assert isinstance(AIMessage("").tool_calls, list)
