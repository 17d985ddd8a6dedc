"""What the app is called with beside its state, and the limits of a run."""

import time
from dataclasses import dataclass, field

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.runtime import Runtime
from pydantic import BaseModel
from typing_extensions import TypedDict

from marft_graph import compile_graph
from marft_graph.engine.fake import FakeEngine
from marft_graph.errors import ConfigError, DatasetError
from marft_graph.rollout.runner import run_episodes

model = FakeListChatModel(responses=["own"])


class State(TypedDict, total=False):
    q: str
    a: str


@dataclass
class Needed:
    user: str


@dataclass
class Optional:
    tone: str = "friendly"
    tags: list = field(default_factory=list)


class Pydantic(BaseModel):
    tone: str = "friendly"


def one(node, schema=None, **settings):
    builder = StateGraph(State, context_schema=schema).add_node("writer", node)
    return builder.add_edge(START, "writer").compile(**settings)


def said(graph, examples=({"q": "q"},), **settings):
    engine = FakeEngine("x")
    try:
        episodes = run_episodes(graph, list(examples), engine=engine, **settings)
    finally:
        engine.close()
    assert [episode.error for episode in episodes] == [""] * len(episodes)
    return [episode.calls[0].messages[0]["content"] for episode in episodes]


def by_user(state, runtime: Runtime[Needed]):
    return {"a": model.invoke(f"{runtime.context.user}: {state['q']}").text}


def by_tone(state, runtime: Runtime[Optional]):
    return {"a": model.invoke(runtime.context.tone).text}


# Context


@pytest.mark.parametrize(
    "context",
    [Needed("u0"), {"user": "u0"}, lambda example: Needed(example["who"])],
    ids=["value", "dict", "function"],
)
def test_context_is_a_value_or_made_of_the_example(context):
    graph = one(by_user, Needed)
    assert said(graph, [{"q": "q", "who": "u0"}], context=context) == ["u0: q"]


@pytest.mark.parametrize("schema", [Optional, Pydantic])
def test_a_context_whose_fields_have_defaults_is_made_by_itself(schema):
    assert said(one(by_tone, schema)) == ["friendly"]


def test_a_context_that_is_missing_is_asked_for():
    engine = FakeEngine("x")
    (episode,) = run_episodes(one(by_user, Needed), [{"q": "q"}], engine=engine)
    engine.close()
    assert episode.status == "failed: AttributeError in writer"
    assert "context_schema, Needed, and no context was given: give `context=`" in episode.error


def test_episodes_do_not_share_a_context():
    def node(state, runtime: Runtime[Optional]):
        runtime.context.tags.append("x")
        return {"a": model.invoke(str(runtime.context.tags)).text}

    context = Optional()
    graph = one(node, Optional)
    assert said(graph, group_size=2, concurrency=1, context=context) == ["['x']"] * 2
    assert said(graph, group_size=2, concurrency=1) == ["['x']"] * 2
    assert context.tags == []


def test_what_cannot_be_a_context_is_refused():
    with pytest.raises(ConfigError, match=r"context is the class Needed; give a value such as"):
        said(one(by_user, Needed), context=Needed)
    with pytest.raises(DatasetError, match=r"`context` raised KeyError: 'who', on example"):
        said(one(by_user, Needed), context=lambda example: Needed(example["who"]))


def test_a_dry_run_gets_the_context_too():
    graph = one(by_user, Needed)
    found = compile_graph(graph, [{"q": "q"}], context=Needed("u"))
    assert found.agents == ("writer",)
    assert not [note for note in found.notes if "failed" in note]


# Config


@pytest.mark.parametrize(
    "configurable",
    [{"lang": "de"}, {"configurable": {"lang": "de"}}, lambda example: {"lang": example["lang"]}],
    ids=["value", "whole", "function"],
)
def test_configurable_values_are_given_by_example(configurable):
    def node(state, config: RunnableConfig):
        return {"a": model.invoke(config["configurable"]["lang"]).text}

    assert said(one(node), [{"q": "q", "lang": "de"}], configurable=configurable) == ["de"]


def test_configurable_reaches_graphs_inside_and_is_checked():
    def node(state, config: RunnableConfig):
        return {"a": model.invoke(config["configurable"]["lang"]).text}

    outer = one(one(node))
    assert said(outer, configurable={"lang": "fr"}) == ["fr"]
    with pytest.raises(ConfigError, match="configurable is 3, a int; it must be a mapping"):
        said(outer, configurable=3)


# Steps


def asking(state):
    return {"messages": [model.invoke(state["messages"]), ("user", "Call a tool.")]}


def looping(**settings):
    builder = StateGraph(MessagesState).add_node("ask", asking).add_edge(START, "ask")
    return builder.add_conditional_edges("ask", lambda state: "ask", ["ask"]).compile(**settings)


def steps(graph, **settings):
    engine = FakeEngine("text")
    (episode,) = run_episodes(graph, [{"messages": "hi"}], engine=engine, **settings)
    engine.close()
    assert episode.status == "failed: GraphRecursionError"
    return len(episode.calls), episode.error


def test_a_graph_without_a_limit_ends_after_25_steps():
    count, error = steps(looping())
    assert count == 25
    assert "did not end within 25 steps (recursion_limit); it ran ask 25 times" in error


def test_the_apps_limit_counts_unless_one_is_set():
    graph = looping().with_config(recursion_limit=7)
    assert steps(graph)[0] == 7
    assert steps(graph, recursion_limit=9)[0] == 9


def test_limits_that_libraries_fill_in_are_no_limits_of_the_app():
    inner = looping().with_config(recursion_limit=9_999)  # as create_agent does

    def outer(state):
        return {"messages": inner.invoke({"messages": "hi"})["messages"]}

    builder = StateGraph(MessagesState).add_node("outer", outer).add_edge(START, "outer")
    engine = FakeEngine("text")
    (episode,) = run_episodes(builder.compile(), [{"messages": "hi"}], engine=engine)
    assert (episode.status, len(episode.calls)) == ("failed: GraphRecursionError in outer", 25)
    inner.config["recursion_limit"] = 4
    (episode,) = run_episodes(builder.compile(), [{"messages": "hi"}], engine=engine)
    engine.close()
    assert len(episode.calls) == 4


def test_a_loop_that_does_not_end_can_earn_a_reward():
    engine = FakeEngine("text")
    (episode,) = run_episodes(
        looping(), [{"messages": "hi"}], engine=engine, fault_rewards={"GraphRecursionError": -1}
    )
    engine.close()
    assert (episode.status, episode.total_reward, len(episode.calls)) == ("ok", -1.0, 25)


# Tokens


def asked_for(model, **settings):
    engine = FakeEngine("x")
    node = one(lambda state: {"a": model.invoke(state["q"]).text})
    run_episodes(node, [{"q": "q"}], engine=engine, **settings)
    engine.close()
    return engine.requests[0].sampling.max_tokens


class Limited(FakeListChatModel):
    max_tokens: int = 64_000

    def _get_ls_params(self, stop=None, **kwargs):
        return {**super()._get_ls_params(stop, **kwargs), "ls_max_tokens": self.max_tokens}


def test_a_limit_that_the_class_fills_in_is_not_the_apps():
    assert asked_for(Limited(responses=["x"]), max_new_tokens=32) == 32
    assert asked_for(Limited(responses=["x"], max_tokens=90), max_new_tokens=32) == 90


def test_a_cap_wins_over_the_apps_limit_but_raises_none():
    limited = Limited(responses=["x"], max_tokens=90)
    assert asked_for(limited, max_new_tokens=32, cap_new_tokens=True) == 32
    assert asked_for(limited, max_new_tokens=500, cap_new_tokens=True) == 90


def test_what_anthropics_class_fills_in_is_not_the_apps(caplog):
    anthropic = pytest.importorskip("langchain_anthropic")
    known = anthropic.ChatAnthropic(model="claude-sonnet-4-5", api_key="x")
    assert asked_for(known, max_new_tokens=32) == 32
    own = anthropic.ChatAnthropic(model="claude-sonnet-4-5", api_key="x", max_tokens=50)
    assert asked_for(own, max_new_tokens=32) == 50
    assert not caplog.text
    unknown = anthropic.ChatAnthropic(model="claude-of-tomorrow", api_key="x")
    for _ in range(2):
        asked_for(unknown, max_new_tokens=32)
    assert caplog.text.count("cap_new_tokens makes it count") == 1


# Time-outs


def test_a_time_out_says_which_answer_was_awaited():
    engine = FakeEngine("x", delay=30)
    graph = one(lambda state: {"a": model.invoke("q").text})
    (episode,) = run_episodes(
        graph, [{"q": "q"}], engine=engine, episode_timeout=0.3, max_new_tokens=77
    )
    engine.close()
    assert "waiting for a completion of up to 77 tokens from node 'writer'" in episode.error


def test_a_time_out_says_which_node_was_running():
    engine = FakeEngine("x")
    graph = one(lambda state: time.sleep(1))
    (episode,) = run_episodes(graph, [{"q": "q"}], engine=engine, episode_timeout=0.3)
    engine.close()
    assert "running then: node 'writer' (for 0." in episode.error


def test_a_time_out_says_which_tool_was_running():
    from langchain_core.tools import tool

    @tool
    def slow(q: str) -> str:
        """Slow."""
        time.sleep(1)
        return q

    engine = FakeEngine("x")
    graph = one(lambda state: {"a": slow.invoke({"q": "q"})})
    (episode,) = run_episodes(graph, [{"q": "q"}], engine=engine, episode_timeout=0.3)
    engine.close()
    assert "tool 'slow' (for 0." in episode.error
