"""Every LangGraph construct: the dependency function as written by hand, and as runs show it.

Each case is a graph, the dependencies that are not `never`, and the input of a run with scripted
answers, in which no call may depend on one that the compiled graph calls `never`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.runtime import Runtime
from langgraph.store.memory import InMemoryStore
from langgraph.types import CachePolicy, Command, RetryPolicy, Send
from pydantic import BaseModel

from marft_graph import FakeEngine, FlexMG, compile_graph, run_episodes
from marft_graph.names import agent_path
from tests.apps import model

Expected = Mapping[str, Mapping[str, str]]
A, P = "always", "possible"


class State(TypedDict, total=False):
    """Channels of most graphs here."""

    q: str
    a: str
    b: str
    c: str
    d: str
    next: str
    items: list[str]
    log: Annotated[list[str], operator.add]


class OnlyB(TypedDict):
    """An input schema."""

    b: str


class OnlyC(TypedDict):
    """An output schema."""

    c: str


class Private(TypedDict):
    secret: str


class In(TypedDict):
    q: str


class Out(TypedDict):
    a: str


class Context(TypedDict, total=False):
    who: str


class Shape(BaseModel):
    q: str = ""
    a: str = ""
    b: str = ""


@dataclass
class Seen:
    b: str = field(default="")


class Chat(TypedDict):
    messages: Annotated[list[AnyMessage], operator.add]


class Other(TypedDict):
    q: str
    draft: str


def ask() -> str:
    """Not a node: calls the model for one."""
    return model.invoke("?").text


def write_a(state: State) -> Any:
    return {"a": model.invoke(f"a {state}").text}


def write_b(state: State) -> Any:
    return {"b": model.invoke(f"b {state}").text}


def write_c(state: State) -> Any:
    return {"c": model.invoke(f"c {state}").text}


def write_d(state: State) -> Any:
    reply = model.invoke(f"d {state}")
    return {"d": reply.text}


def write_log(state: State) -> Any:
    return {"log": [model.invoke(f"log {state}").text]}


def write_c_from_b(state: OnlyB) -> Any:
    return {"c": model.invoke(state["b"]).text}


def pass_on(state: State) -> Any:
    return {"log": ["environment"]}


def go_b(state: State) -> str:
    return "b" if state.get("a") else "c"


def build(
    nodes: Mapping[str, Any],
    *edges: tuple[Any, Any],
    state: Any = State,
    compiled: bool = True,
    **given: Any,
) -> Any:
    """A graph of nodes and plain edges; it ends where no edge leads on."""
    builder = StateGraph(state, **given)
    for name, node in nodes.items():
        builder.add_node(name, node)
    for a, b in edges:
        builder.add_edge(a, b)
    return builder.compile() if compiled else builder


# One function for each construct: the app and what its agents observe.


def plain_edges() -> tuple[Any, Expected]:
    app = build({"a": write_a, "b": write_b}, (START, "a"), ("a", "b"), ("b", END))
    return app, {"b": {"a": A}}


def chain_of_three() -> tuple[Any, Expected]:
    nodes = {"a": write_a, "b": write_b, "c": write_c}
    app = build(nodes, (START, "a"), ("a", "b"), ("b", "c"))
    return app, {"b": {"a": A}, "c": {"a": A, "b": A}}


def declared_input_schema() -> tuple[Any, Expected]:
    nodes = {"a": write_a, "b": write_b, "c": write_c_from_b}
    app = build(nodes, (START, "a"), ("a", "b"), ("b", "c"))
    return app, {"b": {"a": A}, "c": {"b": A}}  # c sees only what b made of a's answer


def through_an_environment_node() -> tuple[Any, Expected]:
    def shorten(state: State) -> Any:
        return {"b": state["a"][:2]}

    nodes = {"a": write_a, "shorten": shorten, "c": write_c_from_b}
    app = build(nodes, (START, "a"), ("a", "shorten"), ("shorten", "c"))
    return app, {"c": {"a": P}}


def overwritten_channel() -> tuple[Any, Expected]:
    nodes = {"a": write_a, "again": write_a, "b": write_b}
    app = build(nodes, (START, "a"), ("a", "again"), ("again", "b"))
    return app, {"again": {"a": A}, "b": {"a": P, "again": A}}


def diamond() -> tuple[Any, Expected]:
    nodes = {"a": write_a, "b": write_b, "c": write_c, "d": write_d}
    edges = [(START, "a"), ("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]
    return build(nodes, *edges), {"b": {"a": A}, "c": {"a": A}, "d": {"a": A, "b": A, "c": A}}


def join() -> tuple[Any, Expected]:
    nodes = {"a": write_a, "e": pass_on, "b": write_b, "c": write_c}
    app = build(nodes, (START, "a"), (START, "e"), ("e", "b"), (["a", "b"], "c"))
    return app, {"b": {"a": A}, "c": {"a": A, "b": A}}  # a is over when b begins


def sooner_in_another_branch() -> tuple[Any, Expected]:
    nodes = {"a": write_a, "e": pass_on, "b": write_b}
    return build(nodes, (START, "a"), (START, "e"), ("e", "b")), {"b": {"a": A}}


def conditional_with_path_map() -> tuple[Any, Expected]:
    builder = build({"a": write_a, "b": write_b, "c": write_c}, (START, "a"), compiled=False)
    builder.add_conditional_edges("a", lambda s: s["a"] == "x", {True: "b", False: "c"})
    return builder.compile(), {"b": {"a": A}, "c": {"a": A}}


def conditional_read_from_source() -> tuple[Any, Expected]:
    builder = build({"a": write_a, "b": write_b, "c": write_c}, (START, "a"), compiled=False)
    builder.add_conditional_edges("a", go_b)
    return builder.compile(), {"b": {"a": A}, "c": {"a": A}}


def conditional_that_can_go_anywhere() -> tuple[Any, Expected]:
    builder = build({"a": write_a, "b": write_b}, (START, "a"), ("b", END), compiled=False)
    builder.add_conditional_edges("a", lambda s: s.get("next", "b"))
    return builder.compile(), {"a": {"a": P, "b": P}, "b": {"a": A, "b": P}}


def conditional_entry() -> tuple[Any, Expected]:
    builder = build({"b": write_b, "c": write_c, "d": write_d}, ("b", "d"), compiled=False)
    builder.add_edge("c", "d")
    builder.add_conditional_edges(START, go_b)
    return builder.compile(), {"d": {"b": P, "c": P}}


def command_with_declared_targets() -> tuple[Any, Expected]:
    def a(state: State) -> Command[Literal["b", "c"]]:
        text = model.invoke("a").text
        return Command(goto="b" if text else "c", update={"a": text})

    app = build({"a": a, "b": write_b, "c": write_c}, (START, "a"))
    return app, {"b": {"a": A}, "c": {"a": A}}


def command_read_from_source() -> tuple[Any, Expected]:
    def a(state: State) -> Any:
        text = model.invoke("a").text
        if text:
            return Command(goto="b", update={"a": text})
        return Command(goto=END)

    app = build({"a": a, "b": write_b, "c": write_c}, (START, "a"), ("b", "c"))
    return app, {"b": {"a": P}, "c": {"a": P, "b": A}}


def command_that_can_go_anywhere() -> tuple[Any, Expected]:
    def a(state: State) -> Any:
        return Command(goto=state.get("next", "b"), update={"a": model.invoke("a").text})

    app = build({"a": a, "b": write_b}, (START, "a"))
    return app, {"b": {"a": A, "b": P}}  # a reads `next`, which nobody writes


def send_fan_out() -> tuple[Any, Expected]:
    def fan(state: State) -> list[Send]:
        return [Send("worker", {"q": item}) for item in "xyz"]

    nodes = {"plan": write_a, "worker": write_log, "reduce": write_b}
    builder = build(nodes, (START, "plan"), ("worker", "reduce"), compiled=False)
    builder.add_conditional_edges("plan", fan, ["worker"])
    # what is sent may be made of the plan; only a run tells
    return builder.compile(), {"worker": {"plan": P}, "reduce": {"plan": A, "worker": A}}


def send_hands_on_what_the_sender_knew() -> tuple[Any, Expected]:
    def fan(state: State) -> list[Send]:
        return [Send("worker", {"b": state["a"]})]

    nodes = {"first": write_a, "sender": write_d, "worker": write_c_from_b}
    builder = build(nodes, (START, "first"), ("first", "sender"), compiled=False)
    builder.add_conditional_edges("sender", fan, ["worker"])
    return builder.compile(), {"sender": {"first": A}, "worker": {"first": P, "sender": P}}


def loop_with_an_exit() -> tuple[Any, Expected]:
    builder = build({"a": write_a, "b": write_b}, (START, "a"), ("a", "b"), compiled=False)
    builder.add_conditional_edges("b", lambda s: END if s["b"] else "a", ["a", END])
    return builder.compile(), {"a": {"a": P, "b": P}, "b": {"a": A, "b": P}}


def self_loop() -> tuple[Any, Expected]:
    def often(state: State) -> Literal["a", "b"]:
        return "a" if len(state.get("log", ())) < 2 else "b"

    builder = build({"a": write_log, "b": write_b}, (START, "a"), compiled=False)
    builder.add_conditional_edges("a", often)
    return builder.compile(), {"a": {"a": P}, "b": {"a": A}}


def alternatives_after_a_loop() -> tuple[Any, Expected]:
    nodes = {"a": write_a, "b": write_b, "c": write_c}
    builder = build(nodes, (START, "a"), ("b", "c"), compiled=False)
    builder.add_conditional_edges("a", lambda s: "b" if s["a"] else "a", ["a", "b"])
    return builder.compile(), {"a": {"a": P}, "b": {"a": A}, "c": {"a": A, "b": A}}


def subgraph_as_a_node() -> tuple[Any, Expected]:
    inner = build({"x": write_b, "y": write_c}, (START, "x"), ("x", "y"))
    app = build(
        {"a": write_a, "team": inner, "d": write_d}, (START, "a"), ("a", "team"), ("team", "d")
    )
    return app, {
        "team/x": {"a": P},
        "team/y": {"a": P, "team/x": A},
        "d": {"a": A, "team/x": P, "team/y": P},
    }


def subgraph_with_an_output_schema() -> tuple[Any, Expected]:
    nodes = {"x": write_b, "y": write_c_from_b}
    inner = build(nodes, (START, "x"), ("x", "y"), output_schema=OnlyC)
    app = build({"team": inner, "d": write_d}, (START, "team"), ("team", "d"))
    return app, {"team/y": {"team/x": A}, "d": {"team/y": P}}


def subgraph_with_another_state() -> tuple[Any, Expected]:
    def draft(state: Other) -> Any:
        return {"draft": model.invoke(state["q"]).text}

    inner = build({"x": draft}, (START, "x"), state=Other)
    app = build(
        {"a": write_a, "team": inner, "d": write_d}, (START, "a"), ("a", "team"), ("team", "d")
    )
    return app, {"d": {"a": A}}  # x gets q alone, and its draft stays inside


def subgraph_called_in_a_node() -> tuple[Any, Expected]:
    inner = build({"x": write_b}, (START, "x"))

    def run_team(state: State) -> Any:
        return {"c": inner.invoke({"q": state["a"]})["b"]}

    app = build(
        {"a": write_a, "team": run_team, "d": write_d}, (START, "a"), ("a", "team"), ("team", "d")
    )
    return app, {"team/x": {"a": P, "team/x": P}, "d": {"a": A, "team/x": P}}


def subgraph_nested_twice() -> tuple[Any, Expected]:
    innermost = build({"z": write_c}, (START, "z"))
    inner = build({"y": write_b, "deep": innermost}, (START, "y"), ("y", "deep"))
    app = build({"a": write_a, "team": inner}, (START, "a"), ("a", "team"))
    return app, {"team/y": {"a": P}, "team/deep/z": {"a": P, "team/y": P}}


def same_inner_name_twice() -> tuple[Any, Expected]:
    left = build({"writer": write_b}, (START, "writer"))
    right = build({"writer": write_c}, (START, "writer"))
    app = build({"left": left, "right": right}, (START, "left"), ("left", "right"))
    return app, {"right/writer": {"left/writer": P}}


def prebuilt_react_agent() -> tuple[Any, Expected]:
    from langgraph.prebuilt import create_react_agent

    agent = create_react_agent(model, [lookup])
    app = build({"helper": agent}, (START, "helper"), state=MessagesState)
    return app, {"helper": {"helper": P}}


def langchain_agent() -> tuple[Any, Expected]:
    agent = create_agent(model, [lookup])
    app = build({"helper": agent}, (START, "helper"), state=MessagesState)
    return app, {"helper": {"helper": P}}


def functional_api() -> tuple[Any, Expected]:
    @task
    def draft(topic: str) -> str:
        return model.invoke(topic).text

    @task
    def grade(text: str) -> str:
        return model.invoke(text).text

    @entrypoint()
    def flow(given: dict[str, Any]) -> dict[str, Any]:
        text = draft(given["q"]).result()
        return {"text": text, "grade": grade(text).result()}

    both = {"flow/draft": P, "flow/grade": P}  # code decides their order
    return flow, {"flow/draft": both, "flow/grade": both}


def task_called_in_a_node() -> tuple[Any, Expected]:
    @task
    def draft(topic: str) -> str:
        return model.invoke(topic).text

    def writer(state: State) -> Any:
        return {"b": draft(state["q"]).result()}

    app = build({"writer": writer, "c": write_c}, (START, "writer"), ("writer", "c"))
    return app, {"writer/draft": {"writer/draft": P}, "c": {"writer/draft": P}}


def private_and_io_schemas() -> tuple[Any, Expected]:
    def hide(state: State) -> Any:
        return {"secret": model.invoke("s").text}

    def use(state: Private) -> Any:
        return {"a": model.invoke(state["secret"]).text}

    nodes = {"hide": hide, "other": write_b, "use": use}
    edges = [(START, "hide"), ("hide", "other"), ("other", "use")]
    app = build(nodes, *edges, input_schema=In, output_schema=Out)
    return app, {"use": {"hide": A}}  # `other` reads State, which has no `secret`


def messages_state() -> tuple[Any, Expected]:
    def talk(state: MessagesState) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    app = build({"a": talk, "b": talk}, (START, "a"), ("a", "b"), state=MessagesState)
    return app, {"b": {"a": A}}


def annotated_messages() -> tuple[Any, Expected]:
    def talk(state: Chat) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    app = build({"a": talk, "b": talk, "c": talk}, (START, "a"), ("a", "b"), ("b", "c"), state=Chat)
    return app, {"b": {"a": A}, "c": {"a": A, "b": A}}


def pydantic_and_dataclass_state() -> tuple[Any, Expected]:
    def first(state: Shape) -> Any:
        return {"b": model.invoke(state.q).text}

    def second(state: Seen) -> Any:
        return {"a": model.invoke(state.b).text}

    app = build({"x": first, "y": second}, (START, "x"), ("x", "y"), state=Shape)
    return app, {"y": {"x": A}}


def runnable_nodes() -> tuple[Any, Expected]:
    chain = (
        RunnableLambda(lambda state: {"text": state.get("q", "")})
        | ChatPromptTemplate.from_messages([("user", "{text}")])
        | model
        | RunnableLambda(lambda reply: {"a": reply.text})
    )
    return build({"chain": chain, "b": write_b}, (START, "chain"), ("chain", "b")), {
        "b": {"chain": P}  # that a chain always reaches its model is not read from its steps
    }


def lambdas_partials_methods_and_async() -> tuple[Any, Expected]:
    class Desk:
        def __init__(self) -> None:
            self.model = model

        def work(self, state: State) -> Any:
            return {"b": self.model.invoke(f"b {state}").text}

        def __call__(self, state: State) -> Any:
            return {"c": self.model.invoke(f"c {state}").text}

    def sign(name: str, state: State) -> Any:
        return {"d": model.invoke(f"{name} {state}").text}

    async def late(state: State) -> Any:
        reply = await model.ainvoke(f"late {state}")
        return {"log": [reply.text]}

    nodes = {
        "lambda": lambda state: {"a": model.invoke(f"a {state}").text},
        "method": Desk().work,
        "object": Desk(),
        "partial": functools.partial(sign, "me"),
        "async": late,
    }
    names = list(nodes)
    app = build(nodes, *zip([START, *names[:-1]], names, strict=True))
    return app, {
        "method": {"lambda": A, "method": P},  # how often it calls self.model is not read
        "object": {"lambda": A, "method": P, "object": P},
        "partial": {"lambda": A, "method": P, "object": P},
        "async": {"lambda": A, "method": P, "object": P, "partial": A},
    }


def deferred_node() -> tuple[Any, Expected]:
    builder = build(
        {"a": write_a, "e": pass_on, "b": write_b},
        (START, "a"),
        (START, "e"),
        ("e", "b"),
        compiled=False,
    )
    builder.add_node("last", write_c, defer=True)
    builder.add_edge("a", "last")
    builder.add_edge("b", "last")
    return builder.compile(), {"b": {"a": A}, "last": {"a": A, "b": A}}


def retry_and_cache_policies() -> tuple[Any, Expected]:
    builder = build({"b": write_b}, compiled=False)
    builder.add_node("a", write_a, retry_policy=RetryPolicy(max_attempts=2))
    builder.add_node("c", write_c_from_b, cache_policy=CachePolicy(ttl=60))
    builder.add_edge(START, "a")
    builder.add_edge("a", "b")
    builder.add_edge("b", "c")
    return builder.compile(cache=InMemoryCache()), {"b": {"a": A}, "c": {"b": A}}


def interrupt_checkpointer_and_store() -> tuple[Any, Expected]:
    builder = build({"a": write_a, "b": write_b}, (START, "a"), ("a", "b"), compiled=False)
    app = builder.compile(checkpointer=InMemorySaver(), store=InMemoryStore())
    return app, {"b": {"a": A}}


def runtime_and_context() -> tuple[Any, Expected]:
    def a(state: State, runtime: Runtime[Context]) -> Any:
        return {"a": model.invoke(str(runtime.context)).text}

    app = build({"a": a, "b": write_b}, (START, "a"), ("a", "b"), context_schema=Context)
    return app, {"b": {"a": A}}


def uncompiled_builder() -> tuple[Any, Expected]:
    builder = build({"a": write_a, "b": write_b}, (START, "a"), ("a", "b"), compiled=False)
    return builder, {"b": {"a": A}}


def names_with_other_letters() -> tuple[Any, Expected]:
    names = ["Bull Researcher", "a/b", "v1.2", "критик", "日本"]
    nodes = dict(zip(names, [write_a, write_b, write_c, write_d, write_log], strict=True))
    app = build(nodes, *zip([START, *names[:-1]], names, strict=True))
    return app, {name: dict.fromkeys(names[:i], A) for i, name in enumerate(names) if i}


def supervisor_with_commands() -> tuple[Any, Expected]:
    def supervisor(state: State) -> Command[Literal["x", "y", "__end__"]]:
        done = len(state.get("log", ()))
        model.invoke("who is next?")
        return Command(goto=["x", "y", END][min(done, 2)])

    def x(state: State) -> Command[Literal["supervisor"]]:
        return Command(goto="supervisor", update={"log": [model.invoke(f"x {state}").text]})

    def y(state: State) -> Command[Literal["supervisor"]]:
        return Command(goto="supervisor", update={"log": [model.invoke(f"y {state}").text]})

    app = build({"supervisor": supervisor, "x": x, "y": y}, (START, "supervisor"))
    workers = {"x": P, "y": P}  # who was asked, and when, was the supervisor's to say
    return app, {"supervisor": workers, "x": workers, "y": workers}


def hand_off_to_the_parent_graph() -> tuple[Any, Expected]:
    def x(state: State) -> Any:
        text = model.invoke(f"x {state}").text
        return Command(goto="b", graph=Command.PARENT, update={"a": text})

    inner = build({"x": x}, (START, "x"))
    app = build({"team": inner, "b": write_b}, (START, "team"))
    return app, {"team/x": {"team/x": P, "b": P}, "b": {"team/x": P, "b": P}}


def several_calls_in_one_node() -> tuple[Any, Expected]:
    def twice(state: State) -> Any:
        draft = model.invoke("a").text
        return {"a": model.invoke(draft).text}

    app = build({"a": twice, "b": write_b}, (START, "a"), ("a", "b"))
    return app, {"a": {"a": P}, "b": {"a": A}}


def call_that_may_be_left_out() -> tuple[Any, Expected]:
    def maybe(state: State) -> Any:
        if state.get("q") == "skip":
            return {"b": state["a"]}
        return {"b": ask()}

    nodes = {"a": write_a, "maybe": maybe, "c": write_c_from_b}
    app = build(nodes, (START, "a"), ("a", "maybe"), ("maybe", "c"))
    return app, {"maybe": {"a": P, "maybe": P}, "c": {"a": P, "maybe": P}}


@tool
def lookup(word: str) -> str:
    """Look a word up."""
    return f"about {word}"


CONSTRUCTS: list[Callable[[], tuple[Any, Expected]]] = [
    plain_edges,
    chain_of_three,
    declared_input_schema,
    through_an_environment_node,
    overwritten_channel,
    diamond,
    join,
    sooner_in_another_branch,
    conditional_with_path_map,
    conditional_read_from_source,
    conditional_that_can_go_anywhere,
    conditional_entry,
    command_with_declared_targets,
    command_read_from_source,
    command_that_can_go_anywhere,
    send_fan_out,
    send_hands_on_what_the_sender_knew,
    loop_with_an_exit,
    self_loop,
    alternatives_after_a_loop,
    subgraph_as_a_node,
    subgraph_with_an_output_schema,
    subgraph_with_another_state,
    subgraph_called_in_a_node,
    subgraph_nested_twice,
    same_inner_name_twice,
    prebuilt_react_agent,
    langchain_agent,
    functional_api,
    task_called_in_a_node,
    private_and_io_schemas,
    messages_state,
    annotated_messages,
    pydantic_and_dataclass_state,
    runnable_nodes,
    lambdas_partials_methods_and_async,
    deferred_node,
    retry_and_cache_policies,
    interrupt_checkpointer_and_store,
    runtime_and_context,
    uncompiled_builder,
    names_with_other_letters,
    supervisor_with_commands,
    hand_off_to_the_parent_graph,
    several_calls_in_one_node,
    call_that_may_be_left_out,
]


def dependencies(flex_mg: FlexMG) -> dict[str, dict[str, str]]:
    """All that is not `never`."""
    found = {
        i: {
            j: flex_mg.dependency(i, j)
            for j in flex_mg.agents
            if flex_mg.dependency(i, j) != "never"
        }
        for i in flex_mg.agents
    }
    return {agent: seen for agent, seen in found.items() if seen}


def answer(agent: str, messages: Any, tools: Any) -> Any:
    """Use a tool once, then answer."""
    if tools and not any(message.type == "tool" for message in messages):
        name = tools[0]["function"]["name"]
        return AIMessage("", tool_calls=[{"name": name, "args": {"word": "x"}, "id": "1"}])
    return f"said by {agent}"


@pytest.mark.filterwarnings("ignore:create_react_agent")
@pytest.mark.parametrize("construct", CONSTRUCTS, ids=lambda function: function.__name__)
def test_the_dependency_function_is_the_hand_written_one(construct: Any) -> None:
    app, expected = construct()
    assert dependencies(compile_graph(app)) == expected


@pytest.mark.filterwarnings("ignore:create_react_agent")
@pytest.mark.parametrize("construct", CONSTRUCTS, ids=lambda function: function.__name__)
def test_no_run_contradicts_the_dependency_function(construct: Any) -> None:
    app, _ = construct()
    flex_mg = compile_graph(app)
    messages = "messages" in getattr(app, "channels", ())
    example = {"messages": [("user", "hello")]} if messages else {"q": "hello"}
    (episode,) = run_episodes(
        app, [example], engine=FakeEngine(answer), reward=lambda example, state: 0.0
    )
    assert episode.status == "ok"
    assert {agent_path(call.node) for call in episode.calls} <= set(flex_mg.agents)
    assert episode.calls
    for call in episode.calls:
        for parent in call.parents:
            other = episode.calls[parent]
            assert flex_mg.dependency(agent_path(call.node), agent_path(other.node)) != "never"


def test_alternatives_are_not_parallel_and_branches_are() -> None:
    assert compile_graph(conditional_with_path_map()[0]).parallel_groups == ()
    assert compile_graph(diamond()[0]).parallel_groups == (("b", "c"),)
    assert compile_graph(send_fan_out()[0]).fan_outs == ("worker",)


def test_a_chain_explains_why_the_end_never_sees_the_beginning() -> None:
    flex_mg = compile_graph(declared_input_schema()[0])
    assert flex_mg.explain("c", "b") == "c observes b (always, by its code): b -> c through b"
    assert flex_mg.explain("c", "a") == (
        "c never observes a itself, only what b made of it: a -> b -> c"
    )
    assert flex_mg.explain("a", "c") == "a never observes c: no run of a comes after one of c"


def test_langgraph_itself_refuses_a_colon_in_a_name() -> None:
    with pytest.raises(ValueError, match="reserved"):
        build({"a:b": write_a})


def test_a_node_that_only_raises_compiles() -> None:
    def broken(state: State) -> State:
        raise NotImplementedError

    builder = StateGraph(State)
    builder.add_node("broken", broken)
    builder.add_edge(START, "broken")
    assert compile_graph(builder.compile()).environment == ("broken",)
