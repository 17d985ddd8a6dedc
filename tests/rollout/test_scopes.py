"""A call belongs to the graph that runs it, whatever the app does with threads and configs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import NodeError
from langgraph.graph import END, START, StateGraph

from marft_graph import compile_graph, run_episodes
from marft_graph.engine.fake import FakeEngine


class Paid(FakeListChatModel):
    """The app's own model; no test may ask it."""

    responses: list[str] = ["own"]  # noqa: RUF012 - a field of a pydantic model

    def _call(self, *args: Any, **kwargs: Any) -> str:
        raise AssertionError("the app's own model was asked")

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind(tools=tools)


llm = Paid()
pool_of_before = ThreadPoolExecutor(1)


class State(TypedDict, total=False):
    question: str
    answer: str


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    fake = FakeEngine("x")
    yield fake
    fake.close()


def app(**nodes: Any) -> Any:
    builder: Any = StateGraph(State)
    before = START
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    return builder.compile()


def ask(text: str = "q") -> str:
    return llm.invoke(text).text


def answer(state: State) -> Any:
    return {"answer": ask(state["question"])}


# Threads


def by_pool(state: State) -> Any:
    with ThreadPoolExecutor(2) as pool:
        return {"answer": "".join(pool.map(ask, "ab"))}


def by_a_pool_made_before(state: State) -> Any:
    return {"answer": pool_of_before.submit(ask).result()}


def by_thread(state: State) -> Any:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    return {"answer": found[0]}


def by_threads_in_threads(state: State) -> Any:
    found: list[str] = []

    def outer() -> None:
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(ask).result())

    thread = threading.Thread(target=outer)
    thread.start()
    thread.join()
    return {"answer": found[0]}


async def by_executor(state: State) -> Any:
    return {"answer": await asyncio.get_running_loop().run_in_executor(None, ask, "q")}


async def by_to_thread(state: State) -> Any:
    return {"answer": await asyncio.to_thread(ask)}


def by_a_loop_of_its_own(state: State) -> Any:
    return {"answer": asyncio.run(llm.ainvoke("q")).text}


@pytest.mark.parametrize(
    "node",
    [
        by_pool,
        by_a_pool_made_before,
        by_thread,
        by_threads_in_threads,
        by_executor,
        by_to_thread,
        by_a_loop_of_its_own,
    ],
)
def test_calls_from_threads_are_the_nodes(node: Callable[..., Any], engine: FakeEngine) -> None:
    (episode,) = run_episodes(app(worker=node), [{"question": "q"}], engine=engine)
    assert episode.ok, episode.error
    assert {call.node for call in episode.calls} == {"worker"}


def test_threads_are_as_they_were_after_a_run(engine: FakeEngine) -> None:
    before = ThreadPoolExecutor.submit, threading.Thread.start
    run_episodes(app(worker=by_pool), [{"question": "q"}], engine=engine)
    assert (ThreadPoolExecutor.submit, threading.Thread.start) == before


# Graphs that nodes run


inner = StateGraph(State).add_node("w", answer).add_edge(START, "w")


def test_a_graph_with_a_thread_of_its_own_stays_inside_its_node(engine: FakeEngine) -> None:
    remembering = inner.compile(checkpointer=InMemorySaver())

    def outer(state: State) -> Any:
        config: Any = {"configurable": {"thread_id": "inner"}}
        return remembering.invoke({"question": state["answer"]}, config)

    graph = app(w=answer, o=outer, last=lambda state: {"answer": ask(state["answer"])})
    (episode,) = run_episodes(graph, [{"question": "q"}], engine=engine)
    assert [(call.node, call.parents) for call in episode.calls] == [
        ("w", ()),
        ("o/w", (0,)),
        ("last", (1,)),
    ]
    assert len({call.agent for call in episode.calls}) == 3
    assert set(compile_graph(graph).agents) == {"w", "o/w", "last"}


def test_a_named_graph_names_what_a_node_runs(engine: FakeEngine) -> None:
    named, same = inner.compile(name="writer_agent"), inner.compile(name="o")
    run: Callable[[Any], Callable[[State], Any]] = lambda graph: lambda s: graph.invoke(s)  # noqa: E731
    for graph, node in ((named, "o/writer_agent/w"), (same, "o/w"), (inner.compile(), "o/w")):
        (episode,) = run_episodes(app(o=run(graph)), [{"question": "q"}], engine=engine)
        assert [call.node for call in episode.calls] == [node]
    (episode,) = run_episodes(app(o=named), [{"question": "q"}], engine=engine)
    assert [call.node for call in episode.calls] == ["o/w"]  # the node is the graph


# Tools


maths = create_agent(llm, [], name="maths")
poet = create_agent(llm, [])


@tool
def ask_maths(query: str) -> str:
    """Ask the mathematician."""
    return maths.invoke({"messages": [("user", query)]})["messages"][-1].text


@tool
async def ask_poet(query: str) -> str:
    """Ask the poet."""
    return (await poet.ainvoke({"messages": [("user", query)]}))["messages"][-1].text


@tool
def look_up(query: str) -> str:
    """Ask a model directly."""
    return ask(query)


@tool
def ask_a_tool(query: str) -> str:
    """Have another tool do it."""
    return str(look_up.invoke({"query": query}))


def test_what_tools_run_is_named_by_graph_or_tool() -> None:
    tools = [ask_maths, ask_poet, look_up, ask_a_tool]

    def script(request: Any) -> Any:
        if not request.tools or any(message.type == "tool" for message in request.messages):
            return "done"
        return AIMessage(
            "", tool_calls=[{"name": t.name, "args": {"query": "q"}, "id": t.name} for t in tools]
        )

    engine = FakeEngine(script)
    lead = create_agent(llm, tools)
    (episode,) = run_episodes(
        lead, [{"messages": [("user", "hi")]}], engine=engine, max_new_tokens=2000
    )
    engine.close()
    assert episode.ok, episode.error
    assert {call.node for call in episode.calls} == {
        "model",
        "tools/maths/model",
        "tools/ask_poet/model",
        "tools/look_up",
        "tools/ask_a_tool/look_up",
    }
    assert {call.agent for call in episode.calls} >= {"tools-2Fmaths", "tools-2Fask_poet"}


# Routers and error handlers


def by_answer(state: State) -> str:
    return "w" if ask(state["question"]) else END


async def by_later_answer(state: State) -> str:
    return "w" if (await llm.ainvoke(state["question"])).text else END


@pytest.mark.parametrize("router", [by_answer, by_later_answer])
def test_an_entry_router_that_asks_a_model_is_an_agent_by_its_name(
    router: Any, engine: FakeEngine
) -> None:
    graph = StateGraph(State).add_node("w", answer)
    built = graph.add_conditional_edges(START, router, ["w", END]).compile()
    (episode,) = run_episodes(built, [{"question": "q"}], engine=engine)
    assert [call.node for call in episode.calls] == [router.__name__, "w"]


def test_of_several_entry_routers_each_has_its_name(engine: FakeEngine) -> None:
    graph = StateGraph(State).add_node("w", answer)
    graph.add_conditional_edges(START, by_answer, ["w", END])
    graph.add_conditional_edges(START, by_later_answer, ["w", END])
    (episode,) = run_episodes(graph.compile(), [{"question": "q"}], engine=engine)
    assert {call.node for call in episode.calls} == {"by_answer", "by_later_answer", "w"}


def test_a_router_in_an_inner_graph_is_named_below_it(engine: FakeEngine) -> None:
    graph = StateGraph(State).add_node("w", answer)
    built = graph.add_conditional_edges(START, by_answer, ["w", END]).compile()
    (episode,) = run_episodes(app(sub=built), [{"question": "q"}], engine=engine)
    assert {call.node for call in episode.calls} == {"sub/by_answer", "sub/w"}


def failing(state: State) -> Any:
    raise ValueError("bad")


def handler(state: State, error: NodeError) -> Any:
    return {"answer": ask("mend")}


def test_an_error_handler_has_one_name(engine: FakeEngine) -> None:
    own = StateGraph(State).add_node("w", failing, error_handler=handler).add_edge(START, "w")
    shared = StateGraph(State)
    shared.set_node_defaults(error_handler=handler)
    shared.add_node("w", failing).add_edge(START, "w")
    for graph, node in ((own.compile(), "w/error_handler"), (shared.compile(), "error_handler")):
        assert node in compile_graph(graph).agents
        (episode,) = run_episodes(graph, [{"question": "q"}], engine=engine, nodes=[node])
        assert [call.node for call in episode.calls] == [node], episode.error
