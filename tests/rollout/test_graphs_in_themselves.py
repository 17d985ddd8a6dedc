"""A graph that runs itself has the same agents at every depth; shared histories hide no tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph

from marft_graph import FakeEngine, compile_graph, run_episodes
from marft_graph.names import agent_path
from tests.graph.own_models import ToolModel

model = FakeListChatModel(responses=["own"])
tool_model = ToolModel()
HELLO = {"messages": [("user", "hello")]}


class State(TypedDict, total=False):
    question: str
    part: str
    answer: str


def agents_of(graph: Any, example: Mapping[str, Any], script: Any = "text") -> set[str]:
    """Agents of a run, and of the dry run."""
    engine = FakeEngine(script)
    (episode,) = run_episodes(graph, [example], engine=engine)
    engine.close()
    assert episode.ok, episode.error
    found = {agent_path(call.node) for call in episode.calls}
    assert set(compile_graph(graph, [example]).agents) == found
    return found


def test_a_graph_whose_node_runs_it_again_has_one_agent_per_node() -> None:
    whole: list[Any] = []

    def split(state: State) -> Any:
        rest = state["question"][1:]
        return {"part": whole[0].invoke({"question": rest})["answer"] if rest else ""}

    def solve(state: State) -> Any:
        return {"answer": model.invoke(f"{state['question']} {state['part']}").text}

    builder = StateGraph(State).add_node("split", split).add_node("solve", solve)
    builder.add_edge(START, "split").add_edge("split", "solve")
    for name in ("tree", None):
        whole[:] = [builder.compile(name=name)]
        assert agents_of(whole[0], {"question": "deep"}) == {"solve"}
        assert compile_graph(whole[0]).agents == ("solve",)


def test_an_agent_whose_tool_asks_the_agent_is_one() -> None:
    whole: list[Any] = []
    depth: list[int] = []

    @tool
    def delegate(task: str) -> str:
        """Let another one do it."""
        if len(depth) % 4 == 3:
            depth.clear()
            return "done"
        depth.append(1)
        return whole[0].invoke({"messages": [("user", task)]})["messages"][-1].text

    whole.append(create_agent(tool_model, [delegate]))
    assert set(compile_graph(whole[0], [HELLO]).agents) == {"model"}


def test_an_agent_that_makes_more_of_its_kind_is_one() -> None:
    def researcher(depth: int) -> Any:
        @tool
        def spawn(topic: str) -> str:
            """Look deeper."""
            if depth > 2:
                return "found"
            asked = {"messages": [("user", topic)]}
            return researcher(depth + 1).invoke(asked)["messages"][-1].text

        return create_agent(tool_model, [spawn], name="researcher")

    @tool
    def research(topic: str) -> str:
        """Look something up."""
        return researcher(0).invoke({"messages": [("user", topic)]})["messages"][-1].text

    lead = create_agent(tool_model, [research])
    assert set(compile_graph(lead, [HELLO]).agents) == {"model", "tools/researcher"}


def test_one_subgraph_under_two_names_is_two_agents() -> None:
    inner = StateGraph(State).add_node("write", lambda s: {"answer": model.invoke("?").text})
    sub = inner.add_edge(START, "write").compile()
    outer = StateGraph(State).add_node("left", sub).add_node("right", sub)
    graph = outer.add_edge(START, "left").add_edge("left", "right").compile()
    assert agents_of(graph, {"question": "q"}) == {"left/write", "right/write"}


def test_a_tool_that_another_agent_has_used_in_the_same_history_is_used_again() -> None:
    @tool
    def summarize(text: str) -> str:
        """Sum up."""
        return model.invoke(text).text

    builder = StateGraph(MessagesState)
    for name in ("one", "two"):
        builder.add_node(name, create_agent(tool_model, [summarize], name=name))
    graph = builder.add_edge(START, "one").add_edge("one", "two").compile()
    flex_mg = compile_graph(graph, [HELLO])
    assert flex_mg.notes == ()
    expected = {"one", "two", "one/tools/summarize", "two/tools/summarize"}
    assert set(flex_mg.agents) == expected
    assert all(flex_mg.graph.nodes[agent]["calls"] for agent in expected)
