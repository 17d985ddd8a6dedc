"""Of a list that many have written, a call depends on the items that its prompt shows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, filter_messages, trim_messages
from langgraph.errors import NodeError
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command

from marft_graph import Episode, FakeEngine, compile_graph, run_episodes
from marft_graph.names import agent_path
from tests.graph.test_everyday_apps import MarkedAnswers, parents_by_text
from tests.rollout.test_reads import State, chain

model = FakeListChatModel(responses=["the app's own model"])
HELLO = {"messages": [("user", "hello")]}


def play(graph: Any, example: Any = None, **more: Any) -> Episode:
    """An episode with marked answers, its parents checked against their marks, and D with both."""
    engine = FakeEngine(MarkedAnswers({}))
    (episode,) = run_episodes(graph, [example or {"q": "why"}], engine=engine, **more)
    engine.close()
    assert episode.status == "ok", episode.error
    assert [call.parents for call in episode.calls] == parents_by_text(episode)
    flex_mg = compile_graph(graph)
    for call in episode.calls:
        for parent in call.parents:
            i, j = agent_path(call.node), agent_path(episode.calls[parent].node)
            assert flex_mg.dependency(i, j) != "never", flex_mg.explain(i, j)
    return episode


def parents(graph: Any, example: Any = None, **more: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(call.node, call.parents) for call in play(graph, example, **more).calls]


def says(name: str, chosen: Any) -> Any:
    def node(state: Any) -> Any:
        answer = model.invoke([HumanMessage("?"), *chosen(state["messages"])])
        return {"messages": [AIMessage(f"{name} says: {answer.text}", name=name)]}

    return name, node


CHOICES = {
    "last": lambda messages: messages[-1:],
    "trimmed": lambda messages: trim_messages(
        messages, max_tokens=1, token_counter=len, strategy="last"
    ),
    "the last text": lambda messages: [HumanMessage(f"Reply to: {messages[-1].text}")],
}


@pytest.mark.parametrize("how", CHOICES)
def test_of_a_shared_history_counts_what_is_shown(how: str) -> None:
    choice = CHOICES[how]
    graph = chain(says("a", choice), says("b", choice), says("c", choice), state=MessagesState)
    assert parents(graph, HELLO) == [("a", ()), ("b", (0,)), ("c", (1,))]


def test_messages_of_one_speaker_are_theirs() -> None:
    whole = list
    graph = chain(
        says("a", whole),
        says("b", whole),
        says("c", lambda messages: filter_messages(messages, include_names=["a"])),
        state=MessagesState,
    )
    assert parents(graph, HELLO) == [("a", ()), ("b", (0,)), ("c", (0,))]


def test_a_debate_answers_what_was_said_last() -> None:
    def speaks(state: Any) -> Any:
        votes = state.get("votes") or [state["q"]]
        return {"votes": [model.invoke(f"Against: {votes[-1]}").text]}

    builder = StateGraph(State).add_node("pro", speaks).add_node("con", speaks)
    builder.add_edge(START, "pro").add_edge("pro", "con")
    builder.add_conditional_edges("con", lambda s: END if len(s["votes"]) > 3 else "pro")
    got = parents(builder.compile())
    assert got == [("pro", ()), ("con", (0,)), ("pro", (1,)), ("con", (2,))]


def test_each_item_that_is_asked_about_at_once_is_a_call_s_own() -> None:
    def drafts(state: Any) -> Any:
        return {"votes": [reply.text for reply in model.batch([state["q"], "else"])]}

    async def reviews(state: Any) -> Any:
        async def one(text: str) -> str:
            return (await asyncio.to_thread(model.invoke, f"Review {text}")).text

        return {"c": " ".join(await asyncio.gather(*map(one, state["votes"])))}

    calls = play(chain(("drafts", drafts), ("reviews", reviews))).calls
    drafted = {call.index for call in calls if call.node == "drafts"}
    reviewed = [drafted & {*call.parents} for call in calls if call.node == "reviews"]
    assert sorted(map(sorted, reviewed)) == [[index] for index in sorted(drafted)]


def test_an_agent_in_a_node_s_code_is_asked_about_one_item() -> None:
    agent = create_agent(model, [], name="helper")

    def helps(state: Any) -> Any:
        asked = {"messages": [HumanMessage(state["votes"][-1])]}
        return {"c": agent.invoke(asked)["messages"][-1].text}

    def votes(state: Any) -> Any:
        return {"votes": [model.invoke(state["q"]).text]}

    got = parents(chain(("one", votes), ("two", votes), ("helps", helps)))
    assert got == [("one", ()), ("two", ()), ("helps/helper/model", (1,))]


def test_middleware_that_looks_at_the_last_message_depends_on_it() -> None:
    class Critic(AgentMiddleware):
        def after_model(self, state: Any, runtime: Any) -> Any:
            said = model.invoke(f"Rate: {state['messages'][-1].text}").text
            return {"messages": [AIMessage(said)]}

    agent = create_agent(model, [], middleware=[Critic()])
    graph = StateGraph(MessagesState).add_node("one", agent).add_node("two", agent)
    got = parents(graph.add_edge(START, "one").add_edge("one", "two").compile(), HELLO)
    critic = "Critic.after_model"
    assert got == [
        ("one/model", ()),
        (f"one/{critic}", (0,)),
        ("two/model", (0, 1)),
        (f"two/{critic}", (2,)),
    ]


def test_a_router_that_asks_about_the_last_vote_depends_on_it() -> None:
    def votes(state: Any) -> Any:
        return {"votes": [model.invoke(state["q"]).text]}

    def route(state: Any) -> str:
        return "three" if model.invoke(f"Enough? {state['votes'][-1]}") else END

    builder = StateGraph(State).add_node("one", votes).add_node("two", votes)
    builder.add_node("three", lambda state: {"c": model.invoke(state["votes"][0]).text})
    builder.add_edge(START, "one").add_edge("one", "two")
    builder.add_conditional_edges("two", route, ["three", END])
    episode = FakeEngine(MarkedAnswers({}))
    (played,) = run_episodes(builder.compile(), [{"q": "why"}], engine=episode)
    got = [(call.node, call.parents) for call in played.calls]
    assert got == [("one", ()), ("two", ()), ("two", (1,)), ("three", (0,))]


def test_what_is_made_of_a_list_in_another_way_depends_on_all_of_it() -> None:
    def votes(state: Any) -> Any:
        return {"votes": [model.invoke(state["q"]).text]}

    def counts(state: Any) -> Any:
        return {"c": model.invoke(f"{len(''.join(state['votes']))} letters").text}

    engine = FakeEngine(MarkedAnswers({}))
    graph = chain(("one", votes), ("two", votes), ("counts", counts))
    (episode,) = run_episodes(graph, [{"q": "why"}], engine=engine)
    assert [call.parents for call in episode.calls] == [(), (), (0, 1)]


def test_an_entrypoint_that_shows_two_results_depends_on_both() -> None:
    @task
    def first(text: str) -> str:
        return model.invoke(text).text

    @task
    def second(text: str) -> str:
        return model.invoke(f"More of {text}").text

    @entrypoint()
    def essay(question: str) -> str:
        one = first(question).result()
        two = second(one).result()
        return model.invoke(f"{one} and {two}").text

    got = parents(essay, inputs=lambda example: example["q"])
    assert got == [("essay/first", ()), ("essay/second", (0,)), ("essay", (0, 1))]


def failing(state: Any) -> Any:
    raise ValueError(f"cannot read {model.invoke(state['q']).text}")


def test_an_error_handler_depends_on_the_answer_that_the_error_shows() -> None:
    def handler(state: Any, error: NodeError) -> Any:
        said = model.invoke(f"Repair: {error.error}").text
        return Command(update={"b": said}, goto="last")

    builder = StateGraph(State).add_node("work", failing, error_handler=handler)
    builder.add_node("last", lambda state: {"c": model.invoke(state["b"]).text})
    graph = builder.add_edge(START, "work").compile()
    got = parents(graph)
    assert got == [("work", ()), ("work/error_handler", (0,)), ("last", (1,))]


def test_an_agent_that_handles_errors_depends_on_what_it_is_asked_alone() -> None:
    agent = create_agent(model, [], name="fixer")

    def handler(state: Any) -> Any:
        return {"b": agent.invoke({"messages": [HumanMessage(state["q"])]})["messages"][-1].text}

    builder = StateGraph(State).add_node("work", failing, error_handler=handler)
    graph = builder.add_edge(START, "work").compile()
    got = parents(graph)
    assert sorted(got) == [("work", ()), ("work/error_handler/fixer/model", ())]
