"""Which nodes call a model: every way to reach one is found, or said to be uncertain."""

from __future__ import annotations

import sys
import types
from typing import Any

import httpx
import openai
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.errors import NodeError
from langgraph.graph import END, START, MessagesState, StateGraph

from marft_graph import FakeEngine, FlexMG, compile_graph, run_episodes
from marft_graph.graph.draw import role_of, summary
from marft_graph.names import agent_path
from tests.apps import model
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
    assert "agent_places.py, line" in text or "deeper than is looked at" in text
    assert "calls no model" not in text


@pytest.mark.parametrize("name", NONE)
def test_a_node_whose_code_certainly_asks_none_is_environment(name: str) -> None:
    flex_mg = compiled(NONE[name])
    assert flex_mg.agents == ()
    assert flex_mg.uncertain == ()
    assert flex_mg.environment == ("node",)


client = openai.OpenAI(api_key="not-set")
URL = "https://api.example.com/v1/chat/completions"


def with_a_client(state: Any) -> Any:
    made = client.chat.completions.create(model="gpt-4o", messages=[])
    return {"messages": [("ai", str(made.choices[0].message.content))]}


def with_a_client_that_it_makes(state: Any) -> Any:
    made = openai.OpenAI(api_key="x").responses.create(model="gpt-4o", input="?")
    return {"messages": [("ai", made.output_text)]}


async def with_an_asynchronous_client(state: Any) -> Any:
    from openai import AsyncOpenAI

    made = await AsyncOpenAI(api_key="x").chat.completions.create(model="gpt-4o", messages=[])
    return {"messages": [("ai", str(made))]}


def with_an_address(state: Any) -> Any:
    said = httpx.post(URL, json={"messages": []}).json()
    return {"messages": [("ai", said["choices"][0]["message"]["content"])]}


DIRECT = {
    "with_a_client": (with_a_client, "holds an openai.OpenAI client"),
    "made": (with_a_client_that_it_makes, "holds an openai.OpenAI client"),
    "async": (with_an_asynchronous_client, "holds an openai.AsyncOpenAI client"),
    "address": (with_an_address, f"asks the address {URL}"),
}


@pytest.mark.parametrize("name", DIRECT)
def test_a_node_that_asks_a_provider_past_langchain_says_so(name: str) -> None:
    node, words = DIRECT[name]
    flex_mg = compiled(node)
    assert flex_mg.environment == ()
    assert flex_mg.unseen == ("node",)
    assert role_of(flex_mg, "node") == "asks a provider past LangChain"
    assert f"warning: node {words}: its calls are neither seen nor trained" in summary(flex_mg)


def test_a_function_of_a_provider_s_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    litellm = types.ModuleType("litellm")
    exec("def completion(**given): ...", litellm.__dict__)  # the test's own source
    monkeypatch.setitem(sys.modules, "litellm", litellm)

    def ask(state: Any) -> Any:
        return {"messages": [("ai", str(litellm.completion(model="gpt-4o")))]}

    words = "node calls litellm.completion: its calls are neither seen nor trained"
    assert words in summary(compiled(ask))


def calls_all(request: Any) -> str | AIMessage:
    """The leader uses each of its tools at once, and everyone else answers."""
    tools = [each["function"]["name"] for each in request.tools]
    if not tools or any(message.type == "tool" for message in request.messages):
        return "done"
    calls = [{"name": name, "args": {"query": "q"}, "id": name} for name in tools]
    return AIMessage("", tool_calls=calls)


def check_run(app: Any, expected: set[str]) -> FlexMG:
    flex_mg = compile_graph(app)
    assert set(flex_mg.agents) == expected
    engine = FakeEngine(calls_all)
    (episode,) = run_episodes(app, [{"messages": [("user", "hi")]}], engine=engine)
    engine.close()
    assert episode.ok, episode.error
    assert {agent_path(call.node) for call in episode.calls} == expected
    return flex_mg


def test_each_agent_behind_a_tool_has_a_name_of_its_own() -> None:
    maths = create_agent(model, [], name="math_agent")
    nameless = create_agent(model, [])

    @tool
    def ask_math(query: str) -> str:
        """Ask the mathematician."""
        return str(maths.invoke({"messages": [("user", query)]})["messages"][-1].text)

    @tool
    async def ask_nameless(query: str) -> str:
        """Ask somebody."""
        said = await nameless.ainvoke({"messages": [("user", query)]})
        return str(said["messages"][-1].text)

    @tool
    def short(query: str) -> str:
        """Make it short."""
        return str(model.invoke(query).text)

    @tool
    def plain(query: str) -> str:
        """Ask nobody."""
        return query

    app = create_agent(model, [ask_math, ask_nameless, short, plain])
    check_run(app, {"model", "tools/math_agent", "tools/ask_nameless", "tools/short"})


def test_a_named_graph_in_a_node_s_code_stands_between() -> None:
    writer = create_agent(model, [], name="writer_agent")
    same = create_agent(model, [], name="same")

    def node(state: MessagesState) -> Any:
        return {"messages": writer.invoke(state)["messages"][-1:]}

    def of_its_name(state: MessagesState) -> Any:
        return {"messages": same.invoke(state)["messages"][-1:]}

    builder = StateGraph(MessagesState)
    builder.add_node("node", node)
    builder.add_node("same", of_its_name)
    builder.add_edge(START, "node")
    builder.add_edge("node", "same")
    check_run(builder.compile(), {"node/writer_agent", "same"})


def test_middleware_that_asks_a_model_is_an_agent() -> None:
    middleware = SummarizationMiddleware(model=model, trigger=("messages", 1), keep=("messages", 1))
    flex_mg = compile_graph(create_agent(model, [], middleware=[middleware]))
    assert set(flex_mg.agents) == {"SummarizationMiddleware.before_model", "model"}


def test_routing_functions_that_ask_a_model_are_agents() -> None:
    def route_question(state: MessagesState) -> str:
        return "retrieve" if model.invoke(state["messages"]).text else "answer"

    def retrieve(state: MessagesState) -> Any:
        return {"messages": [("ai", "document")]}

    def grade(state: MessagesState) -> str:
        return "answer" if model.invoke(state["messages"]).text else END

    def answer(state: MessagesState) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("retrieve", retrieve)
    builder.add_node("answer", answer)
    builder.add_conditional_edges(START, route_question, ["retrieve", "answer"])
    builder.add_conditional_edges("retrieve", grade, ["answer", END])
    flex_mg = check_run(builder.compile(), {"route_question", "retrieve", "answer"})
    assert ("route_question", "retrieve", "conditional") in flex_mg.control_edges
    assert "never influences" not in summary(flex_mg)


def test_an_error_handler_is_one_agent_by_one_name() -> None:
    def work(state: MessagesState) -> Any:
        model.invoke("?")
        raise ValueError("bad")

    def handler(state: MessagesState, error: NodeError) -> Any:
        return {"messages": [model.invoke("repair")]}

    builder = StateGraph(MessagesState)
    builder.add_node("work", work, error_handler=handler)
    builder.add_edge(START, "work")
    check_run(builder.compile(), {"work", "work/error_handler"})


def test_a_graph_that_the_code_makes_is_uncertain_until_a_run_shows_it() -> None:
    def inner(state: MessagesState) -> Any:
        return {"messages": [model.invoke("?")]}

    def outer(state: MessagesState) -> Any:
        builder = StateGraph(MessagesState)
        builder.add_node("inner", inner)
        builder.add_edge(START, "inner")
        return {"messages": builder.compile().invoke(state)["messages"][-1:]}

    flex_mg = compiled(outer)
    assert flex_mg.agents == ()
    assert flex_mg.uncertain == ("node",)


def test_a_chat_model_that_asks_in_a_way_of_its_own_is_said_to_be_unseen() -> None:
    class OwnWay(FakeListChatModel):
        responses: list[str] = ["own"]  # noqa: RUF012 - a field of a pydantic model

        def invoke(self, *args: Any, **kwargs: Any) -> Any:
            return AIMessage("past LangChain")

    class Polite(FakeListChatModel):
        responses: list[str] = ["own"]  # noqa: RUF012 - a field of a pydantic model

        def invoke(self, *args: Any, **kwargs: Any) -> Any:
            return super().invoke(*args, **kwargs)

    for kind, unseen in ((OwnWay, ("ask",)), (Polite, ())):
        own = kind()

        def ask(state: MessagesState, own: Any = own) -> Any:
            return {"messages": [own.invoke(state["messages"])]}

        builder = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask")
        assert compile_graph(builder.compile()).unseen == unseen
