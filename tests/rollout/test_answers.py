"""An answer carries what the app's own model's would, and comes in the same pieces."""

from __future__ import annotations

import asyncio
import functools
import operator
from typing import Any

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_google_genai import ChatGoogleGenerativeAI
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI
from langgraph.config import get_stream_writer
from langgraph.graph import START, MessagesState, StateGraph
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.rollout.runner import run_episodes

openai = ChatOpenAI(model="gpt-4o", api_key="x", base_url="http://127.0.0.1:9", max_retries=0)
anthropic = ChatAnthropic(model="claude-sonnet-4-5", api_key="x")
google = ChatGoogleGenerativeAI(model="gemini-2.5-flash", google_api_key="x")
ollama = ChatOllama(model="llama3.1")


class State(TypedDict, total=False):
    q: str
    out: object


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def graph_of(body):
    return StateGraph(State).add_node("writer", body).add_edge(START, "writer").compile()


def run(body, script="seven plus five", **settings):
    engine = FakeEngine(script)
    (episode,) = run_episodes(graph_of(body), [{"q": "1"}], engine=engine, **settings)
    engine.close()
    return episode


def out(body, script="seven plus five", **settings):
    episode = run(body, script, **settings)
    assert episode.ok, episode.error
    return episode.state["out"]


# Metadata


def test_token_usage_model_name_and_finish_reason_are_where_openai_s_class_has_them():
    message = out(lambda state: {"out": openai.invoke("hi")}, "twelve")
    known = message.response_metadata
    assert known["token_usage"] == {
        "prompt_tokens": message.usage_metadata["input_tokens"],
        "completion_tokens": len("twelve") + 1,
        "total_tokens": message.usage_metadata["total_tokens"],
    }
    assert known["model_name"] == "gpt-4o"
    assert known["adapter"] == "writer"
    assert known["finish_reason"] == "stop"


CALL = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 1, "b": 2}, "id": "1"}])


@pytest.mark.parametrize(
    ("model", "key", "words"),
    [
        (openai, "finish_reason", ("stop", "length", "tool_calls")),
        (anthropic, "stop_reason", ("end_turn", "max_tokens", "tool_use")),
        (google, "finish_reason", ("STOP", "MAX_TOKENS", "STOP")),
        (ollama, "done_reason", ("stop", "length", "stop")),
    ],
    ids=["openai", "anthropic", "google", "ollama"],
)
def test_the_reason_of_an_end_is_in_the_provider_s_own_words(model, key, words):
    asked = model.bind_tools([add])
    ended = [
        out(lambda state: {"out": asked.invoke("hi")}, "twelve"),
        out(lambda state: {"out": asked.invoke("hi", max_tokens=3)}, "twelve", max_new_tokens=3),
        out(lambda state: {"out": asked.invoke("hi")}, CALL),
    ]
    assert tuple(message.response_metadata[key] for message in ended) == words


def test_logprobs_are_those_of_the_sampled_tokens():
    episode = run(
        lambda state: {"out": openai.bind(logprobs=True).invoke("hi").response_metadata}, "no"
    )
    content = episode.state["out"]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["n", "o", ""]
    assert tuple(entry["logprob"] for entry in content) == episode.calls[0].logprobs
    assert content[0]["bytes"] == [ord("n")]
    assert "logprobs" not in out(lambda state: {"out": openai.invoke("hi")}).response_metadata


def test_logprobs_of_the_model_itself_are_given_too():
    model = ChatOpenAI(model="m", api_key="x", logprobs=True)
    assert out(lambda state: {"out": model.invoke("hi")}).response_metadata["logprobs"]["content"]


def test_logprobs_of_tokens_that_were_not_written_are_refused():
    model = openai.bind(logprobs=True, top_logprobs=3)
    episode = run(lambda state: {"out": model.invoke("hi").text})
    assert episode.status == "failed: ConfigError in writer"
    assert "top_logprobs" in episode.error
    assert "'writer'" in episode.error


def test_usage_callbacks_count_under_the_app_s_own_model():
    usage = UsageMetadataCallbackHandler()

    def body(state):
        openai.invoke("hi", {"callbacks": [usage]})
        return {"out": usage.usage_metadata}

    assert out(body, "no") == {
        "gpt-4o": {
            "input_tokens": len(b"human: hi\nai: "),
            "output_tokens": 3,
            "total_tokens": len(b"human: hi\nai: ") + 3,
        }
    }


def test_llm_output_has_what_openai_s_class_puts_there():
    seen = []

    class Watch(BaseCallbackHandler):
        def on_llm_end(self, response, **kwargs):
            seen.append(response.llm_output)

    out(lambda state: {"out": openai.invoke("hi", {"callbacks": [Watch()]}).text}, "no")
    assert seen[0]["token_usage"]["completion_tokens"] == 3
    assert seen[0]["model_name"] == "gpt-4o"


# Pieces


class Listener(BaseCallbackHandler):
    """Counts what is told of a call."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.told.append("start")

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.told.append(token)

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.told.append("end")

    def on_llm_error(self, *args: Any, **kwargs: Any) -> None:
        self.told.append("error")


WORDS = ["seven ", "plus ", "five", ""]


def streamed(listener):
    for _ in openai.stream("hi", {"callbacks": [listener]}):
        pass


async def astreamed(listener):
    async for _ in openai.astream("hi", {"callbacks": [listener]}):
        pass


@pytest.mark.parametrize("way", [streamed, astreamed, "streaming=True"])
def test_token_callbacks_hear_each_piece_once_between_one_start_and_one_end(way):
    listener = Listener()
    model = ChatOpenAI(model="m", api_key="x", streaming=True)

    async def body(state):
        if way == "streaming=True":
            await model.ainvoke("hi", {"callbacks": [listener]})
        elif asyncio.iscoroutinefunction(way):
            await way(listener)
        else:
            way(listener)
        return {"out": listener.told}

    assert out(body) == ["start", *WORDS, "end"]


def test_nobody_hears_pieces_of_a_call_that_nobody_streams():
    listener = Listener()
    out(lambda state: {"out": openai.invoke("hi", {"callbacks": [listener]}).text})
    assert listener.told == ["start", "end"]


@pytest.mark.filterwarnings("ignore:astream_events version='v1'")
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    "model", [openai, GenericFakeChatModel(messages=iter([]))], ids=["openai", "fake"]
)
def test_stream_events_of_the_model_have_the_pieces(model, version):
    async def body(state):
        events = [event async for event in model.astream_events("hi", version=version)]
        chunks = [e["data"]["chunk"] for e in events if e["event"] == "on_chat_model_stream"]
        names = [event["event"] for event in events]
        return {"out": ([chunk.text for chunk in chunks], names[0], names[-1])}

    assert out(body) == (WORDS, "on_chat_model_start", "on_chat_model_end")


def test_stream_events_around_an_invoked_model_have_the_pieces():
    inner = (
        StateGraph(MessagesState)
        .add_node("inner", lambda state: {"messages": [openai.invoke(state["messages"])]})
        .add_edge(START, "inner")
        .compile()
    )

    async def body(state):
        events = [e async for e in inner.astream_events({"messages": "hi"}, version="v2")]
        return {
            "out": [e["data"]["chunk"].text for e in events if e["event"] == "on_chat_model_stream"]
        }

    assert out(body) == WORDS


def test_messages_mode_inside_a_node_gives_chunks_and_no_answer_twice():
    inner = (
        StateGraph(MessagesState)
        .add_node("inner", lambda state: {"messages": [openai.invoke(state["messages"])]})
        .add_edge(START, "inner")
        .compile()
    )

    def body(state):
        items = list(inner.stream({"messages": "hi"}, stream_mode="messages"))
        assert all(isinstance(message, AIMessageChunk) for message, _ in items)
        assert {meta["langgraph_node"] for _, meta in items} == {"inner"}
        return {"out": [message.text for message, _ in items]}

    assert out(body) == WORDS


def test_tool_calls_and_reasoning_come_in_pieces_that_add_up():
    async def body(state):
        model = anthropic.bind_tools([add])
        return {"out": [chunk async for chunk in model.astream("hi")]}

    script = AIMessage("Let me add.", tool_calls=CALL.tool_calls)
    chunks = out(body, script)
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert len(pieces) > 2
    assert pieces[0]["name"] == "add"
    whole = functools.reduce(operator.add, chunks)
    assert whole.text == "Let me add."
    assert [call["args"] for call in whole.tool_calls] == [{"a": 1, "b": 2}]
    assert whole.response_metadata["stop_reason"] == "tool_use"


def test_pieces_of_content_blocks_add_up_to_the_same_text():
    model = ChatOpenAI(model="m", api_key="x", output_version="v1")

    def body(state):
        chunks = list(model.stream("hi"))
        assert all(isinstance(chunk.content, list) for chunk in chunks)
        return {"out": functools.reduce(operator.add, chunks).text}

    assert out(body) == "seven plus five"


def test_structured_output_streams():
    schema = {"title": "Answer", "type": "object", "properties": {"n": {"type": "integer"}}}
    model = openai.with_structured_output(schema)

    def body(state):
        return {"out": list(model.stream("hi"))[-1]}

    assert out(body, '{"n": 12}') == {"n": 12}


def test_a_stream_writer_of_the_app_still_works_beside_it():
    def body(state):
        writer = get_stream_writer()
        for chunk in openai.stream("hi"):
            writer(chunk.text)
        return {"out": "done"}

    assert out(body) == "done"


def test_an_error_of_the_engine_ends_a_stream_as_an_error():
    listener = Listener()

    def body(state):
        try:
            list(openai.stream("hi", {"callbacks": [listener]}))
        except ConnectionError as error:
            return {"out": str(error)}
        raise AssertionError("no error")

    assert out(body, lambda request: ConnectionError("away")) == "away"
    assert listener.told == ["start", "error"]
