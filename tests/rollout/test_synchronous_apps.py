"""Apps with parts that only work synchronously, and those that only work asynchronously."""

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import interrupt
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.rollout.runner import run_episodes

model = FakeListChatModel(responses=["own"])


class State(TypedDict, total=False):
    q: str
    a: str
    messages: list


def one(node):
    return StateGraph(State).add_node("writer", node).add_edge(START, "writer").compile()


@pytest.fixture
def engine():
    made = FakeEngine("x")
    yield made
    made.close()


class SyncOnly(Runnable):
    def invoke(self, input, config=None, **kwargs):
        return {"a": model.invoke(input["q"], config).text}

    async def ainvoke(self, input, config=None, **kwargs):
        raise NotImplementedError("invoke() only")


class OldTool(BaseTool):
    name: str = "old"
    description: str = "An old tool."

    def _run(self, q: str) -> str:
        return f"<{q}>"

    async def _arun(self, q: str) -> str:
        raise NotImplementedError("old does not support async")


def test_a_middleware_without_an_async_side(engine, caplog):
    agents = pytest.importorskip("langchain.agents")
    middleware = pytest.importorskip("langchain.agents.middleware")

    @middleware.wrap_model_call
    def log_it(request, handler):
        return handler(request)

    agent = agents.create_agent(FakeListChatModel(responses=["own"]), [], middleware=[log_it])
    data = [{"messages": [("user", str(number))]} for number in range(3)]
    for _ in range(2):
        episodes = run_episodes(agent, data, engine=engine, group_size=2)
        assert [(e.status, len(e.calls)) for e in episodes] == [("ok", 1)] * 6
    assert caplog.text.count("works only synchronously") == 1


def test_a_runnable_without_an_async_side(engine):
    (episode,) = run_episodes(one(SyncOnly()), [{"q": "q"}], engine=engine)
    assert (episode.status, episode.state["a"], len(episode.calls)) == ("ok", "x", 1)


@pytest.mark.parametrize("handles", [False, True])
def test_a_tool_without_an_async_side_even_where_the_app_handles_its_errors(handles, engine):
    builder = StateGraph(State)
    call = {"name": "old", "args": {"q": "q"}, "id": "1", "type": "tool_call"}
    builder.add_node("asker", lambda state: {"messages": [AIMessage("", tool_calls=[call])]})
    builder.add_node("tools", ToolNode([OldTool()], handle_tool_errors=handles))
    builder.add_node("writer", lambda s: {"a": model.invoke(s["messages"]).text})
    builder.add_edge(START, "asker").add_edge("asker", "tools").add_edge("tools", "writer")
    (episode,) = run_episodes(builder.compile(), [{"q": "q"}], engine=engine)
    assert episode.ok, episode.error
    assert episode.calls[0].messages[-2]["content"] == "<q>"


def test_a_synchronous_app_samples_the_same_in_every_run(engine):
    graph = one(SyncOnly())
    runs = [
        [e.calls[0].seed for e in run_episodes(graph, [{"q": "q"}], engine=engine, group_size=4)]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4


def test_a_synchronous_app_is_trained_through_its_interrupts(engine):
    builder = StateGraph(State).add_node("ask", lambda state: {"q": interrupt("q?")})
    builder.add_node("writer", SyncOnly()).add_edge(START, "ask").add_edge("ask", "writer")
    (episode,) = run_episodes(
        builder.compile(), [{"q": "q"}], engine=engine, on_interrupt=lambda *_: "answer"
    )
    assert episode.ok, episode.error
    assert episode.calls[0].messages[0]["content"] == "answer"


def test_a_synchronous_app_meets_its_deadline():
    engine = FakeEngine("x", delay=5)
    (episode,) = run_episodes(one(SyncOnly()), [{"q": "q"}], engine=engine, episode_timeout=0.5)
    engine.close()
    assert episode.status == "failed: timeout"


def test_an_asynchronous_app_stays_asynchronous(engine):
    async def node(state):
        raise NotImplementedError("not yet")

    (episode,) = run_episodes(one(node), [{"q": "q"}], engine=engine)
    assert episode.status == "failed: NotImplementedError in writer"
