"""Structured output that does not parse: the app's own exception, and one name for the episode.

What the app's own class would raise is not written down here: the real class is asked, with a
transport that answers as its provider would.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_groq import ChatGroq
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from pydantic import BaseModel
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.errors import MarftError, StructuredOutputError
from marft_graph.rollout.runner import run_episodes

RECIPE = {"OutputParserException": -1.0, "ValidationError": -1.0}


class Answer(BaseModel):
    """A sum."""

    number: int
    is_sure: bool = True


class State(TypedDict, total=False):
    q: str
    out: object
    more: object


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def completion(text: str, reason: str) -> dict[str, Any]:
    """A completion as OpenAI's and Groq's servers answer."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def answering(text: str, reason: str) -> httpx.Client:
    body = completion(text, reason)
    return httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, json=body)))


def openai(**settings: Any) -> ChatOpenAI:
    return ChatOpenAI(model="gpt-4o", api_key="x", max_retries=0, **settings)


def groq(**settings: Any) -> ChatGroq:
    return ChatGroq(model="llama-3.3-70b-versatile", api_key="x", max_retries=0, **settings)


def graph_of(*bodies):
    builder = StateGraph(State)
    before = START
    for number, body in enumerate(bodies):
        name = "solver" if number == 0 else f"after{number}"
        builder.add_node(name, body).add_edge(before, name)
        before = name
    return builder.compile()


def run(graph, script, **settings):
    engine = FakeEngine(script)
    (episode,) = run_episodes(graph, [{"q": "7+5?"}], engine=engine, **settings)
    engine.close()
    return episode


def outcome(chain) -> str:
    """What a chain raises, or what it gives."""
    try:
        given = chain.invoke("7+5? As JSON.")
    except Exception as error:  # noqa: BLE001 - its class is what is asked for
        return type(error).__name__
    if isinstance(given, dict) and "parsing_error" in given:
        return f"{given['parsed']!r}, {type(given['parsing_error']).__name__}"
    return repr(given)


SCHEMAS = {"class": Answer, "dict": Answer.model_json_schema()}


@pytest.mark.parametrize("model", [openai, groq])
@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize("said", ["seven", '{"numb": 7}', '{"number": 7', '{"number": 12}'])
def test_the_app_meets_what_its_own_class_gives(model, method, schema, include_raw, said):
    asked = {"method": method, "include_raw": include_raw}
    client = answering(said, "stop")
    own = model(http_client=client).with_structured_output(SCHEMAS[schema], **asked)
    ours = model().with_structured_output(SCHEMAS[schema], **asked)
    episode = run(graph_of(lambda state: {"out": outcome(ours)}), said)
    assert episode.state["out"] == outcome(own)
    client.close()


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_cut_off_answer_raises_what_openai_s_class_raises(schema):
    client = answering('{"numb', "length")
    own = openai(http_client=client).with_structured_output(SCHEMAS[schema])
    ours = openai().with_structured_output(SCHEMAS[schema])
    graph = graph_of(lambda state: {"out": outcome(ours)})
    episode = run(graph, '{"number": 12}', max_new_tokens=6)
    assert episode.state["out"] == outcome(own) == "LengthFinishReasonError"
    client.close()


def test_a_cut_off_answer_says_so():
    for model in (openai, groq):
        asked = model().with_structured_output(Answer, method="json_schema")
        graph = graph_of(lambda state, asked=asked: {"out": asked.invoke("hi").number})
        episode = run(graph, '{"is_sure": true, "number": 12}', max_new_tokens=8)
        assert episode.status == "failed: StructuredOutputError in solver"
        assert "cut off at max tokens, after 8" in episode.error
        rewarded = run(graph, '{"is_sure": true}', max_new_tokens=8, fault_rewards=RECIPE)
        assert rewarded.total_reward == -1.0


def test_a_cut_off_tool_call_says_so():
    asked = groq().with_structured_output(Answer)
    graph = graph_of(lambda state: {"out": asked.invoke("hi").number})
    episode = run(graph, '<tool_call>{"name": "Answer", "ar', max_new_tokens=20)
    assert "the tool call was cut off at max tokens" in episode.error


def test_a_forced_tool_call_that_was_not_written_is_named_where_the_app_meets_none():
    asked = openai().with_structured_output(Answer, method="function_calling")

    def here(state):
        return {"out": asked.invoke("hi").number}

    def later(state):
        return {"more": state["out"].number}

    for graph in (graph_of(here), graph_of(lambda s: {"out": asked.invoke("hi")}, later)):
        episode = run(graph, "seven")
        assert "StructuredOutputError" in episode.status
        assert "a forced tool call ('Answer') was not written: 'seven'" in episode.error
        assert "AttributeError" in episode.error
        assert run(graph, "seven", fault_rewards=RECIPE).total_reward == -1.0


def test_the_one_name_is_enough_and_an_exception_s_own_name_comes_first():
    asked = openai().with_structured_output(Answer)
    graph = graph_of(lambda state: {"out": asked.invoke("hi")})
    assert issubclass(StructuredOutputError, MarftError)
    assert run(graph, "seven", fault_rewards={"StructuredOutputError": -0.5}).total_reward == -0.5
    both = {"StructuredOutputError": -0.5, "ValidationError": -0.25}
    assert run(graph, "seven", fault_rewards=both).total_reward == -0.25


def test_a_node_that_asked_again_and_failed_later_failed_by_something_else():
    asked = openai().with_structured_output(Answer, method="function_calling")

    def body(state):
        if asked.invoke("hi") is None:
            asked.invoke("hi again")
        return {"out": None.number}

    answers = iter(["seven", AIMessage("", tool_calls=[ANSWER])])
    episode = run(graph_of(body), lambda agent, messages: next(answers), fault_rewards=RECIPE)
    assert episode.status == "failed: AttributeError in solver"


ANSWER = {"name": "Answer", "args": {"number": 12}, "id": "1"}


def test_an_error_that_is_no_parser_s_keeps_its_name():
    free = openai()
    asked = openai().with_structured_output(Answer)

    def unstructured(state):
        return {"out": Answer(number=free.invoke("hi").text)}

    def unrelated(state):
        asked.invoke("hi")
        raise ConnectionError("away")

    assert run(graph_of(unstructured), "x").status == "failed: ValidationError in solver"
    episode = run(graph_of(unrelated), '{"number": 1}', fault_rewards=RECIPE)
    assert episode.status == "failed: ConnectionError in solver"


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (ToolStrategy(Answer, handle_errors=False), '<tool_call>{"name": "Answer", "args": {}}'),
        (ToolStrategy(Answer), '<tool_call>{"name": "Answer", "args": {"numb": 1}}</tool_call>'),
        (ProviderStrategy(Answer), "seven"),
        (ProviderStrategy(Answer), '{"numb": 7}'),
    ],
)
def test_the_recipe_reaches_agents_with_a_response_format(strategy, said):
    agent = create_agent(openai(), [add], response_format=strategy)

    def body(state):
        return {"out": agent.invoke({"messages": "7+5?"}, {"recursion_limit": 12})}

    episode = run(graph_of(body), said, fault_rewards=RECIPE)
    assert episode.error.startswith("StructuredOutputError")
    assert episode.total_reward == -1.0


def test_include_raw_hands_the_failure_to_the_app():
    asked = groq().with_structured_output(Answer, method="json_mode", include_raw=True)
    graph = graph_of(lambda state: {"out": asked.invoke("hi")["parsed"].number})
    episode = run(graph, "seven", fault_rewards=RECIPE)
    assert episode.total_reward == -1.0
    assert "the answer is no JSON" in episode.error


def test_a_dict_that_lacks_a_key_is_named_by_what_it_lacks():
    asked = openai().with_structured_output(Answer.model_json_schema())
    graph = graph_of(lambda state: {"out": asked.invoke("hi")["number"]})
    episode = run(graph, '{"numb": 7}', fault_rewards=RECIPE)
    assert episode.total_reward == -1.0
    assert "lacks 'number'" in episode.error


@pytest.mark.parametrize("is_global", [True, False])
def test_own_models_whose_answers_a_cache_has_are_recorded(is_global):
    cache = InMemoryCache()
    model = GenericFakeChatModel(
        messages=iter([AIMessage("twelve")] * 9), cache=None if is_global else cache
    )
    graph = graph_of(lambda state: {"out": model.invoke("hi").text})
    set_llm_cache(cache if is_global else None)
    try:
        episodes = run_episodes(graph, [{"q": ""}], engine=None, group_size=3, concurrency=1)
    finally:
        set_llm_cache(None)
    assert [episode.status for episode in episodes] == ["ok"] * 3
    assert [episode.calls[0].usage for episode in episodes] == [None] * 3


def test_a_class_without_a_json_schema_is_still_parsed():
    class Odd(BaseModel):
        model_config = {"arbitrary_types_allowed": True}
        number: int
        place: httpx.URL | None = None

    asked = openai().bind(response_format=Odd)
    episode = run(graph_of(lambda state: {"out": asked.invoke("hi").text}), '{"number": 1}')
    assert json.loads(episode.state["out"]) == {"number": 1}


def test_a_scripted_run_takes_forced_tools_in_turn_until_the_structure():
    from marft_graph.rollout.dry_run import Script

    agent = create_agent(openai(), [add], response_format=ToolStrategy(Answer))

    def body(state):
        given = agent.invoke({"messages": "7+5?"}, {"recursion_limit": 12})
        return {"out": given["structured_response"]}

    episode = run(graph_of(body), Script())
    assert episode.state["out"] == Answer(number=1)
    assert len(episode.calls) == 2
