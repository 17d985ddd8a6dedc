"""Every common provider's class: what it asks for is recognised, told, constrained and parsed."""

from __future__ import annotations

import json
import socket

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage
from langchain_google_genai import ChatGoogleGenerativeAI
from langchain_groq import ChatGroq
from langchain_mistralai import ChatMistralAI
from langchain_ollama import ChatOllama
from langchain_openai import AzureChatOpenAI, ChatOpenAI
from langgraph.graph import START, StateGraph
from pydantic import BaseModel
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.policy.forms import choices_in
from marft_graph.rollout.runner import run_episodes

NOWHERE = "http://127.0.0.1:9"
RECIPE = {"OutputParserException": -1.0, "ValidationError": -1.0}


class Answer(BaseModel):
    """A sum."""

    number: int


def sub(a: int, b: int) -> int:
    """Subtract."""
    return a - b


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


MODELS = {
    "openai": ChatOpenAI(model="gpt-4o", api_key="x", base_url=NOWHERE),
    "openai responses": ChatOpenAI(
        model="gpt-4o", api_key="x", base_url=NOWHERE, use_responses_api=True
    ),
    "azure": AzureChatOpenAI(
        azure_endpoint=NOWHERE, api_key="x", api_version="2024-10-21", azure_deployment="mine"
    ),
    "anthropic": ChatAnthropic(model="claude-sonnet-4-5", api_key="x", base_url=NOWHERE),
    "google": ChatGoogleGenerativeAI(model="gemini-2.5-flash", google_api_key="x"),
    "ollama": ChatOllama(model="llama3.1", base_url=NOWHERE),
    "mistral": ChatMistralAI(model="mistral-large-latest", api_key="x", endpoint=NOWHERE),
    "groq": ChatGroq(model="llama-3.3-70b-versatile", api_key="x", base_url=NOWHERE),
}
METHODS = ("json_schema", "json_mode", "function_calling")
every_way = pytest.mark.parametrize(
    ("provider", "method"),
    [(p, m) for p in MODELS for m in METHODS if (p, m) != ("anthropic", "json_mode")],
)


class State(TypedDict, total=False):
    q: str
    out: object


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a socket to {address} was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def run(body, script, **settings):
    builder = StateGraph(State).add_node("solver", body).add_edge(START, "solver")
    engine = FakeEngine(script)
    (episode,) = run_episodes(builder.compile(), [{"q": "7+5?"}], engine=engine, **settings)
    engine.close()
    return episode, engine.requests


def call_of(name: str, **args: object) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": "1"}])


def structured(provider: str, method: str, **more):
    model = MODELS[provider].with_structured_output(Answer, method=method, **more)
    return lambda state: {"out": model.invoke("7+5? As JSON.")}


def written(method: str) -> object:
    return call_of("Answer", number=12) if method == "function_calling" else '{"number": 12}'


@every_way
def test_structured_output_is_parsed_told_and_constrained(provider, method):
    episode, (request,) = run(structured(provider, method), written(method), constrain_output=True)
    assert episode.ok, episode.error
    assert episode.state["out"] == Answer(number=12)
    told = bytes(request.prompt_ids).decode()
    if method == "function_calling":
        (choice,) = choices_in(request.grammar)
        assert any(isinstance(part, dict) and "number" in part["properties"] for part in choice)
    else:
        assert json.loads(request.grammar)["type"] == "object"
        assert "Answer with" in told
        assert "7+5?" in told
    assert "number" in told


@every_way
@pytest.mark.parametrize("said", ["seven", '{"numb": 7}', '{"number": "many"}', "", "[7]"])
def test_the_recipe_reaches_every_answer_that_does_not_parse(provider, method, said):
    episode, _ = run(
        lambda state: {"out": structured(provider, method)(state)["out"].number},
        said,
        fault_rewards=RECIPE,
    )
    assert episode.ok
    assert episode.total_reward == -1.0
    assert episode.error.startswith("StructuredOutputError in node 'solver'")


@pytest.mark.parametrize("provider", MODELS)
def test_a_call_with_wrong_arguments_has_the_same_name(provider):
    for args in ({"numb": 7}, {"number": "many"}):
        episode, _ = run(structured(provider, "function_calling"), call_of("Answer", **args))
        assert episode.status == "failed: StructuredOutputError in solver"


FORCED = {
    "any": {"tool_choice": "any"},
    "a name": {"tool_choice": "add"},
}


@pytest.mark.parametrize("provider", [name for name in MODELS if name != "ollama"])
@pytest.mark.parametrize("choice", FORCED)
def test_a_forced_tool_call_is_recognised_in_every_class_s_words(provider, choice):
    model = MODELS[provider].bind_tools([sub, add], **FORCED[choice])
    episode, (request,) = run(
        lambda state: {"out": model.invoke("hi").tool_calls[0]["name"]},
        call_of("add", a=1, b=2),
        constrain_output=True,
    )
    assert episode.state["out"] == "add"
    choices = choices_in(request.grammar)
    assert len(choices) == (2 if choice == "any" else 1)
    assert '"add"' in choices[-1][0]


RAW = {
    "openai function": {"tool_choice": {"type": "function", "function": {"name": "add"}}},
    "responses function": {"tool_choice": {"type": "function", "name": "add"}},
    "openai required": {"tool_choice": "required"},
    "true": {"tool_choice": True},
    "anthropic tool": {"tool_choice": {"type": "tool", "name": "add"}},
    "anthropic any": {"tool_choice": {"type": "any"}},
    "google mode": {
        "tool_config": {
            "function_calling_config": {"mode": "ANY", "allowed_function_names": ["add"]}
        }
    },
    "openai allowed": {
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "add"}}],
            },
        }
    },
}


@pytest.mark.parametrize("form", RAW)
def test_each_form_of_a_forced_call_is_one(form):
    model = MODELS["openai"].bind_tools([sub, add]).bind(**RAW[form])
    _, (request,) = run(
        lambda state: {"out": model.invoke("hi").text}, "text", constrain_output=True
    )
    both = form in ("openai required", "true", "anthropic any")
    assert len(choices_in(request.grammar)) == (2 if both else 1)


@pytest.mark.parametrize(
    "free",
    [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": {"type": "auto"}}],
)
def test_a_call_that_is_not_forced_stays_free(free):
    model = MODELS["openai"].bind_tools([sub, add]).bind(**free)
    episode, (request,) = run(
        lambda state: {"out": model.invoke("hi").text}, "text", constrain_output=True
    )
    assert episode.ok
    assert request.grammar == ""


def test_tools_that_may_not_be_called_are_not_called():
    model = MODELS["groq"].bind_tools([add], tool_choice="none")
    episode, _ = run(lambda state: {"out": model.invoke("hi").tool_calls}, "just text")
    assert episode.state["out"] == []


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_one_call_at_a_time_is_respected(provider):
    model = MODELS[provider].bind_tools([add, sub], parallel_tool_calls=False)
    two = AIMessage(
        "",
        tool_calls=[
            {"name": "add", "args": {"a": 1, "b": 2}, "id": "1"},
            {"name": "sub", "args": {"a": 1, "b": 2}, "id": "2"},
        ],
    )
    episode, _ = run(lambda state: {"out": [c["name"] for c in model.invoke("hi").tool_calls]}, two)
    assert episode.state["out"] == ["add"]


def test_anthropic_s_and_google_s_own_arguments_are_read():
    schema = Answer.model_json_schema()
    forms = {
        "anthropic": {"output_format": {"type": "json_schema", "schema": schema}},
        "google": {
            "response_mime_type": "application/json",
            "response_schema": {"type": "OBJECT", "properties": {"number": {"type": "INTEGER"}}},
        },
        "ollama": {"format": schema},
        "groq": {"response_format": {"type": "json_object"}},
    }
    for provider, asked in forms.items():
        model = MODELS[provider].bind(**asked)
        episode, (request,) = run(
            lambda state, model=model: {"out": model.invoke("hi").text},
            '{"number": 1}',
            constrain_output=True,
        )
        assert episode.ok
        assert json.loads(request.grammar)["type"] == "object"
        if provider != "groq":
            assert json.loads(request.grammar)["properties"]["number"]["type"] == "integer"


def test_what_a_model_itself_is_set_to_is_read_too():
    google = ChatGoogleGenerativeAI(
        model="gemini-2.5-flash", google_api_key="x", response_mime_type="application/json"
    )
    ollama = ChatOllama(model="llama3.1", format="json")
    openai = ChatOpenAI(
        model="m", api_key="x", model_kwargs={"response_format": {"type": "json_object"}}
    )
    for model in (google, ollama, openai):
        _, (request,) = run(
            lambda state, model=model: {"out": model.invoke("hi").text},
            "{}",
            constrain_output=True,
        )
        assert json.loads(request.grammar)["type"] == "object"


def test_a_tool_of_the_provider_s_own_is_told_of_once(caplog):
    model = MODELS["anthropic"].bind_tools(
        [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}, add]
    )

    def body(state):
        return {"out": [model.invoke("hi").text, model.invoke("hi again").text]}

    episode, requests = run(body, "text")
    assert episode.ok
    assert [tool["function"]["name"] for tool in requests[0].tools] == ["add"]
    told = [record.getMessage() for record in caplog.records if "provider's own" in record.message]
    assert len(told) == 1
    assert "'solver'" in told[0]
    assert "web_search" in told[0]


def test_the_schema_stays_out_of_the_prompt_where_the_setting_says_so():
    body = structured("openai", "json_schema")
    _, (told,) = run(body, '{"number": 12}')
    _, (silent,) = run(body, '{"number": 12}', schema_in_prompt=False)
    assert b"Answer with JSON" in bytes(told.prompt_ids)
    assert bytes(silent.prompt_ids) == b"human: 7+5? As JSON.\nai: "


def test_a_schema_that_the_context_has_no_room_for_is_left_out_and_told_of(caplog):
    body = structured("mistral", "json_schema")
    builder = StateGraph(State).add_node("cramped", body).add_edge(START, "cramped").compile()
    engine = FakeEngine('{"number": 12}', context_length=100)
    (episode,) = run_episodes(builder, [{"q": ""}], engine=engine, max_new_tokens=50)
    engine.close()
    assert episode.ok
    assert b"Answer with" not in bytes(engine.requests[0].prompt_ids)
    assert "'cramped'" in caplog.text
    assert "schema_in_prompt" in caplog.text
