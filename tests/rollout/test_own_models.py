"""With no engine the app's own models answer, and what they answered is recorded by node."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import tool
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from marft_graph import run_episodes


class Teacher(BaseChatModel):
    """An API model in miniature: streams word by word, calls a tool once, counts tokens."""

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any):
        message = AIMessage(
            f"{messages[-1].text} is fine",
            usage_metadata={"input_tokens": 7, "output_tokens": 3, "total_tokens": 10},
        )
        if kwargs.get("tools") and not any(m.type == "tool" for m in messages):
            call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "c1"}
            message = AIMessage("", tool_calls=[call])
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        for word in (messages[-1].text, " is", " fine"):
            chunk = ChatGenerationChunk(message=AIMessageChunk(word))
            if run_manager:
                run_manager.on_llm_new_token(word, chunk=chunk)
            yield chunk

    def bind_tools(self, tools: Any, **kwargs: Any):
        return self.bind(tools=tools, **kwargs)

    @property
    def _llm_type(self) -> str:
        return "teacher"


teacher = Teacher()


class State(TypedDict, total=False):
    q: str
    a: str
    pieces: int


def app(body: Any) -> Any:
    return StateGraph(State).add_node("actor", body).add_edge(START, "actor").compile()


async def astream(state: State) -> Any:
    pieces = [chunk.text async for chunk in teacher.astream(state["q"])]
    return {"a": "".join(pieces), "pieces": sum(map(bool, pieces))}


def stream(state: State) -> Any:
    pieces = [chunk.text for chunk in teacher.stream(state["q"])]
    return {"a": "".join(pieces), "pieces": sum(map(bool, pieces))}


async def ainvoke(state: State) -> Any:
    return {"a": (await teacher.ainvoke(state["q"])).text}


WAYS = {
    "invoke": lambda state: {"a": teacher.invoke(state["q"]).text},
    "batch": lambda state: {"a": teacher.batch([state["q"]])[0].text},
    "ainvoke": ainvoke,
    "stream": stream,
    "astream": astream,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_own_model_answers_and_each_call_is_recorded_once(way: str) -> None:
    (episode,) = run_episodes(app(WAYS[way]), [{"q": "tea"}], engine=None)
    assert episode.ok, episode.error
    assert episode.state["a"] == "tea is fine"
    (call,) = episode.calls
    assert call.node == "actor"
    assert call.completion_ids == ()
    assert call.messages == (
        {"role": "user", "content": "tea"},
        {"role": "assistant", "content": "tea is fine"},
    )
    if "stream" in way:
        assert episode.state["pieces"] == 3  # as the app streams, not in one piece
    elif way != "batch":
        assert call.tokens == (7, 3)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_tools_and_what_was_called_are_recorded() -> None:
    def agent(state: State) -> Any:
        model = teacher.bind_tools([add])
        asked = [HumanMessage(state["q"])]
        first = model.invoke(asked)
        done = add.invoke(first.tool_calls[0])
        return {"a": model.invoke([*asked, first, done]).text}

    (episode,) = run_episodes(app(agent), [{"q": "1+2"}], engine=None)
    first, second = episode.calls
    assert second.parents == (0,)
    assert first.tools[0]["function"]["name"] == "add"
    called = {"name": "add", "args": {"a": 1, "b": 2}, "id": "c1"}
    assert first.messages[-1]["tool_calls"] == [called]
    assert second.messages[2] == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    assert second.messages[-1]["content"] == "3 is fine"


def test_an_own_model_that_fails_fails_the_episode_with_its_error() -> None:
    class Broken(Teacher):
        def _generate(self, *args: Any, **kwargs: Any):
            raise ConnectionError("no route to the API")

    broken = Broken()
    body = lambda state: {"a": broken.invoke(state["q"]).text}  # noqa: E731
    (episode,) = run_episodes(app(body), [{"q": "tea"}], engine=None)
    assert episode.status == "failed: ConnectionError in actor"
    assert episode.calls == ()


def test_the_reward_and_several_episodes_work_as_with_an_engine() -> None:
    async def body(state: State) -> Any:
        await asyncio.sleep(0)
        return {"a": teacher.invoke(state["q"]).text}

    rows = [{"q": str(i)} for i in range(3)]
    episodes = run_episodes(
        app(body), rows, engine=None, reward=lambda e, s: float(e["q"] in s["a"]), group_size=2
    )
    assert [e.total_reward for e in episodes] == [1.0] * 6
