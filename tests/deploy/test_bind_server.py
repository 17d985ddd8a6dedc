"""The app on a server with its adapters: what is asked, what passes through, what it falls to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from pydantic import BaseModel
from typing_extensions import TypedDict

from marft_graph import Trainer, bind
from marft_graph.deploy.bind import ANSWERED_BY
from marft_graph.errors import ConfigError
from tests.deploy.chat_server import ChatServer, chat_server
from tests.rollout.test_own_models import Teacher
from tests.training import config

own = Teacher()


class Grade(BaseModel):
    score: int


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class State(TypedDict, total=False):
    q: str
    plan: str
    grade: Any
    a: str


def planner(state: State) -> State:
    model = own.bind_tools([add], tool_choice="any")
    asked = [HumanMessage(state["q"])]
    called = model.invoke(asked)
    if not called.tool_calls:
        return {"plan": called.text}
    return {"plan": add.invoke(called.tool_calls[0]).text}


async def aplanner(state: State) -> State:
    return {"plan": (await own.ainvoke(state["q"])).text}


def writer(state: State) -> State:
    return {"a": "".join(chunk.text for chunk in own.stream(state["plan"]))}


def frozen(state: State) -> State:
    return {"q": own.invoke(state["q"]).text}


def app(first: Any = planner, **more: Any) -> Any:
    builder = StateGraph(State).add_node("frozen", frozen)
    builder.add_node("planner", first).add_node("writer", writer)
    builder.add_edge(START, "frozen").add_edge("frozen", "planner").add_edge("planner", "writer")
    return builder.compile(**more)


@pytest.fixture(scope="module")
def export(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    settings = config(tiny_model, nodes=("planner", "writer"), max_new_tokens=9)
    with Trainer(
        app(),
        train_dataset=[{"q": "x"}],
        reward=lambda e, s: 0.0,
        config=settings,
        run_dir=folder / "run",
    ) as trainer:
        return trainer.export(folder / "out")


def answers(body: Mapping[str, Any]) -> dict[str, Any]:
    """The planner calls a tool where it may; the writer writes."""
    if body["model"] == "planner" and body.get("tools"):
        function = {"name": "add", "arguments": json.dumps({"a": 1, "b": 2})}
        return {"tool_calls": [{"id": "t1", "type": "function", "function": function}]}
    if body.get("response_format"):
        return {"content": '{"score": 7}'}
    return {"content": f"{body['model']}!"}


@pytest.fixture
def server() -> Any:
    with chat_server(answers) as running:
        yield running


def models(server: ChatServer) -> list[str]:
    return [request["model"] for request in server.requests]


def test_each_node_asks_its_adapter_and_other_nodes_their_own_model(
    export: Path, server: ChatServer
) -> None:
    state = bind(app(), export, base_url=server.url).invoke({"q": "1+2"})
    assert state["q"] == "1+2 is fine"  # the frozen node's own model
    assert state["plan"] == "3"  # the tool that the server called, with its arguments
    assert state["a"] == "writer!"
    assert models(server) == ["planner", "writer"]
    asked = server.requests[0]
    assert asked["messages"] == [{"role": "user", "content": "1+2 is fine"}]
    assert asked["tools"][0]["function"]["name"] == "add"
    assert asked["tool_choice"] == "required"
    assert (asked["temperature"], asked["max_tokens"]) == (0.0, 9)


def test_structured_output_passes_through(export: Path, server: ChatServer) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="gpt-4o", api_key="none", base_url="http://127.0.0.1:9", max_retries=0)

    def grades(state: State) -> State:
        return {"grade": model.with_structured_output(Grade).invoke("grade it"), "plan": "p"}

    state = bind(app(grades), export, base_url=server.url).invoke({"q": "x"})
    assert state["grade"] == Grade(score=7)
    asked = server.requests[0]["response_format"]
    assert asked["json_schema"]["schema"]["properties"]["score"]["type"] == "integer"


async def test_answers_are_streamed_as_they_come(export: Path, server: ChatServer) -> None:
    bound = bind(app(), export, base_url=server.url)
    for mode in ("sync", "async"):
        if mode == "sync":
            events = list(bound.stream({"q": "x"}, stream_mode="messages"))
        else:
            events = [e async for e in bound.astream({"q": "x"}, stream_mode="messages")]
        pieces = [c.text for c, known in events if known["langgraph_node"] == "writer" and c.text]
        assert pieces == list("writer!")
    assert server.requests[-1]["stream"] is True


async def test_async_nodes_ask_the_server(export: Path, server: ChatServer) -> None:
    state = await bind(app(aplanner), export, base_url=server.url).ainvoke({"q": "x"})
    assert (state["plan"], state["a"]) == ("planner!", "writer!")


def broken(body: Mapping[str, Any]) -> dict[str, Any]:
    raise RuntimeError("out of memory")


async def test_the_apps_own_models_answer_where_the_server_fails(
    export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with chat_server(broken) as server:
        expected = await app(aplanner).ainvoke({"q": "tea"})
        bound = bind(app(aplanner), export, base_url=server.url)
        assert await bound.ainvoke({"q": "tea"}) == expected
        assert "failed for node 'planner', whose own model answers instead" in caplog.text
        assert "failed for node 'writer'" in caplog.text
        url = server.url
    assert await bind(app(aplanner), export, base_url=url).ainvoke({"q": "tea"}) == expected
    import openai

    with pytest.raises(openai.APIError):
        bind(app(), export, base_url=url, fallback=False).invoke({"q": "tea"})


class Metadata(BaseCallbackHandler):
    """The metadata that LangSmith would be given."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def on_chain_start(self, *args: Any, metadata: Any = None, **kwargs: Any) -> None:
        self.seen.add((metadata or {}).get(ANSWERED_BY))


def answered_by(bound: Any, **configurable: Any) -> str:
    seen = Metadata()
    bound.invoke({"q": "x"}, {"callbacks": [seen], "configurable": configurable})
    (word,) = seen.seen
    return str(word)


def test_a_share_of_the_runs_is_the_adapters_and_callbacks_see_which(
    export: Path, server: ChatServer
) -> None:
    bound = bind(app(), export, base_url=server.url, share=0.5)
    words = [answered_by(bound, thread_id=str(n)) for n in range(40)]
    assert words == [answered_by(bound, thread_id=str(n)) for n in range(40)]
    assert 8 <= words.count("adapters") <= 32
    assert set(words) == {"adapters", "own models"}
    assert len(server.requests) == 2 * 2 * words.count("adapters")
    assert answered_by(bind(app(), export, base_url=server.url, share=0.0)) == "own models"
    assert answered_by(bind(app(), export, base_url=server.url)) == "adapters"
    with pytest.raises(ConfigError, match="share is 2; it must be between 0 and 1"):
        bind(app(), export, base_url=server.url, share=2)


def test_the_bound_app_is_a_graph_for_servers_that_copy_it(
    export: Path, server: ChatServer
) -> None:
    bound = bind(app(), export, base_url=server.url).compiled
    served = bound.copy(update={"checkpointer": InMemorySaver()})
    run: Any = {"configurable": {"thread_id": "1"}}
    assert served.invoke({"q": "x"}, run)["a"] == "writer!"
    assert served.get_state(run).values["a"] == "writer!"
    assert set(served.get_graph().nodes) >= {"planner", "writer"}


@pytest.mark.usefixtures("untouched_langchain")
def test_langchain_is_left_as_it_was(export: Path, server: ChatServer) -> None:
    before = dict(vars(BaseChatModel))
    bind(app(), export, base_url=server.url).invoke({"q": "x"})
    assert dict(vars(BaseChatModel)) == before
