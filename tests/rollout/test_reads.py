"""What calls depend on, against two oracles that know nothing of the tracer.

Every answer of a model holds a mark of its own, and the apps hand texts on as they are. So the
marks in a call's prompt say what the prompt was made from; and where one answer is changed, the
prompts that change say who depends on it. All apps share one state schema, which tells nothing.
"""

import asyncio
import dataclasses
import itertools
import json
import operator
import re
from typing import Annotated, Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send
from pydantic import BaseModel
from typing_extensions import TypedDict

from marft_graph import FakeEngine, compile_graph, run_episodes
from marft_graph.names import agent_path

model = FakeListChatModel(responses=["the app's own model"])
MARK = re.compile(r"<[^<>]+>")


class State(TypedDict, total=False):
    q: str
    a: str
    b: str
    c: str
    d: str
    votes: Annotated[list[str], operator.add]
    messages: Annotated[list[AnyMessage], add_messages]


class Model(BaseModel):
    q: str = ""
    a: str = ""
    b: str = ""
    c: str = ""
    d: str = ""
    votes: Annotated[list[str], operator.add] = []


@dataclasses.dataclass
class Data:
    q: str = ""
    a: str = ""
    b: str = ""
    c: str = ""
    d: str = ""
    votes: Annotated[list[str], operator.add] = dataclasses.field(default_factory=list)


def say(text):
    return model.invoke(str(text)).text


def play(graph, value=None, changed=None):
    """Run a graph; the call of number `changed` answers otherwise."""
    numbers = itertools.count()
    marks = []

    def script(agent, messages):
        number = next(numbers)
        marks.append(f"<{'other' if number == changed else 'call'}-{number}>")
        return marks[-1]

    engine = FakeEngine(script)
    try:
        (episode,) = run_episodes(graph, [value or {"q": "why"}], engine=engine)
    finally:
        engine.close()
    assert episode.status == "ok", episode.error
    return episode


def text_of(call):
    return json.dumps(call.messages[:-1])


def marks_in(text):
    return set(MARK.findall(text))


def check(graph, value=None, *, perturbed=True):
    """Parents are what the marks say, and what changing an answer says, and D covers them."""
    flex_mg = compile_graph(graph)
    episode = play(graph, value)
    own = {call.index: call.messages[-1]["content"] for call in episode.calls}
    for call in episode.calls:
        seen = marks_in(text_of(call))
        expected = {index for index, mark in own.items() if mark in seen}
        expected |= {c.index for c in episode.calls[: call.index] if c.task_id == call.task_id}
        assert set(call.parents) == expected, (call.node, call.parents, expected)
        for parent in call.parents:
            i, j = agent_path(call.node), agent_path(episode.calls[parent].node)
            assert flex_mg.dependency(i, j) != "never", (i, j)
    for call in episode.calls:
        i = agent_path(call.node)
        seen = {agent_path(episode.calls[p].node) for p in call.parents}
        is_first = not any(episode.calls[p].task_id == call.task_id for p in call.parents)
        for j in flex_mg.agents:
            assert not (is_first and flex_mg.dependency(i, j) == "always" and j not in seen), (i, j)
    if perturbed:
        check_by_change(graph, value, episode)
    return [(call.node, call.parents) for call in episode.calls]


def check_by_change(graph, value, episode):
    """A sequential app: what depends on an answer, directly or not, is what its change changes."""
    downstream = {call.index: {call.index} for call in episode.calls}
    for call in reversed(episode.calls):
        for parent in call.parents:
            downstream[parent] |= downstream[call.index]
    before = [(call.node, text_of(call)) for call in episode.calls]
    for number, call in enumerate(episode.calls):
        after = play(graph, value, changed=number)
        assert len(after.calls) == len(before)
        changed = {
            other.index
            for other, (node, text) in zip(after.calls, before, strict=True)
            if text_of(other).replace("<other-", "<call-") == text and text_of(other) != text
        }
        direct = {c.index for c in episode.calls if call.index in c.parents}
        same_task = {c.index for c in episode.calls if c.task_id == call.task_id}
        assert changed - same_task == direct - same_task, (call.node, changed, direct)


def chain(*nodes, state=State, **settings):
    builder = StateGraph(state, **settings)
    for name, node in nodes:
        builder.add_node(name, node)
    names = [START, *(name for name, _ in nodes), END]
    for a, b in itertools.pairwise(names):
        builder.add_edge(a, b)
    return builder.compile()


def asks(channel, *reads):
    def node(state):
        return {channel: say([state.get(read) for read in reads])}

    return node


def test_a_node_that_never_looks_at_a_channel_does_not_depend_on_its_writer():
    graph = chain(
        ("one", lambda state: {"a": say(state["q"])}), ("two", lambda state: {"b": say(state["q"])})
    )
    assert check(graph) == [("one", ()), ("two", ())]
    assert compile_graph(graph).dependency("two", "one") == "never"


def test_only_what_is_read_counts_in_one_shared_state():
    graph = chain(
        ("one", asks("a", "q")),
        ("two", asks("b", "a")),
        ("three", asks("c", "a", "b")),
        ("four", asks("d", "b")),
    )
    assert check(graph) == [("one", ()), ("two", (0,)), ("three", (0, 1)), ("four", (1,))]


WAYS = {
    "item": lambda s: s["a"],
    "get": lambda s: s.get("a", ""),
    "alias": lambda s: (lambda same: same["a"])(s),
    "whole": str,
    "repr": lambda s: f"{s!r}",
    "items": lambda s: " ".join(f"{k}={v}" for k, v in s.items()),
    "values": lambda s: list(s.values()),
    "keys": lambda s: [s[key] for key in s],
    "copied": lambda s: s.copy()["a"],
    "merged": lambda s: {**s, "x": 1},
    "dict": lambda s: dict(s),
    "united": lambda s: s | {"x": 1},
    "kwargs": lambda s: (lambda **given: given["a"])(**s),
    "json": lambda s: json.dumps(s, default=str),
    "template": lambda s: "{a}".format_map(s),
    "pattern": lambda s: next(v for k, v in s.items() if k == "a"),
    "itemgetter": operator.itemgetter("a"),
    "popped": lambda s: s.pop("a"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reading_a_dict_is_seen(way):
    graph = chain(("one", asks("a", "q")), ("two", lambda state: {"b": say(WAYS[way](state))}))
    assert check(graph) == [("one", ()), ("two", (0,))]


@pytest.mark.parametrize("way", ["in", "len", "keys", "nothing", "own"])
def test_asking_for_names_is_no_read(way):
    def two(state):
        shown = {
            "in": lambda: "a" in state,
            "len": lambda: len(state),
            "keys": lambda: sorted(state),
            "nothing": lambda: "",
            "own": lambda: (state.__setitem__("a", "mine"), state["a"]),
        }[way]()
        return {"b": say(shown)}

    assert check(chain(("one", asks("a", "q")), ("two", two))) == [("one", ()), ("two", ())]


@pytest.mark.parametrize("schema", [Model, Data])
def test_attributes_of_models_and_dataclasses_are_seen(schema):
    def one(state: schema):
        assert isinstance(state, schema)
        assert state.__class__ is schema
        return {"a": say(state.q)}

    def two(state: schema):
        return {"b": say(state.q)}

    def three(state: schema):
        return {"c": say(state.b)}

    def four(state: schema):
        return {"d": say(state)}

    graph = chain(("one", one), ("two", two), ("three", three), ("four", four), state=schema)
    assert check(graph) == [("one", ()), ("two", ()), ("three", (1,)), ("four", (0, 1, 2))]


def test_what_is_read_after_a_call_is_no_parent_of_it():
    def two(state):
        first = say(state["q"])
        return {"b": say(first + state["a"])}

    graph = chain(("one", asks("a", "q")), ("two", two))
    assert check(graph) == [("one", ()), ("two", ()), ("two", (0, 1))]


def test_the_whole_state_returned_keeps_each_writer():
    graph = chain(
        ("one", asks("a", "q")),
        ("two", lambda state: {**state, "b": say(state["q"])}),
        ("three", asks("c", "a")),
        ("four", asks("d", "b")),
    )
    assert check(graph) == [("one", ()), ("two", ()), ("three", (0,)), ("four", (1,))]


def test_an_environment_node_passes_on_what_it_read():
    graph = chain(
        ("one", asks("a", "q")),
        ("two", asks("b", "q")),
        ("join", lambda state: {"c": f"{state['a']}!"}),
        ("three", asks("d", "c")),
    )
    assert check(graph) == [("one", ()), ("two", ()), ("three", (0,))]


def test_a_value_that_is_moved_keeps_its_writer_beside_the_node_s_own_call():
    def two(state):
        return {"b": say(state["q"]), "c": state["a"]}

    graph = chain(("one", asks("a", "q")), ("two", two), ("three", asks("d", "c")))
    assert check(graph) == [("one", ()), ("two", ()), ("three", (0,))]


def test_a_prompt_template_reads_its_variables_alone():
    prompt = ChatPromptTemplate.from_messages([("user", "{q} {b}")])
    link = prompt | model | RunnableLambda(lambda reply: {"c": reply.text})
    graph = chain(
        ("one", asks("a", "q")),
        ("two", asks("b", "q")),
        ("as_node", link),
        ("inside", lambda state: {"d": (prompt | model).invoke(state).text}),
    )
    assert check(graph) == [("one", ()), ("two", ()), ("as_node", (1,)), ("inside", (1,))]


async def test_async_nodes_and_threads_are_seen():
    async def two(state):
        text = await asyncio.to_thread(lambda: state["a"])
        return {"b": (await model.ainvoke(text)).text}

    graph = chain(("one", asks("a", "q")), ("two", two), ("three", asks("c", "q")))
    assert check(graph) == [("one", ()), ("two", (0,)), ("three", ())]


def test_helpers_get_the_view_too():
    def helper(given):
        return given["b"]

    graph = chain(
        ("one", lambda state: {"a": say(state["q"])}),
        ("two", lambda state: {"b": model.invoke(state["q"]).text}),
        ("three", lambda state: {"c": say(helper(state))}),
    )
    assert check(graph) == [("one", ()), ("two", ()), ("three", (1,))]
    assert compile_graph(graph).dependency("three", "one") == "never"
    assert compile_graph(graph).dependency("three", "two") == "always"


def inner_chat():
    builder = StateGraph(MessagesState)
    builder.add_node(
        "talk", lambda state: {"messages": [AIMessage(say([m.text for m in state["messages"]]))]}
    )
    builder.add_edge(START, "talk")
    return builder.compile()


def test_what_reaches_a_graph_through_a_reducer_keeps_its_writers():
    chat = inner_chat()

    def team(state):
        result = chat.invoke({"messages": [HumanMessage(state["a"])]})
        result = chat.invoke({"messages": result["messages"] + [HumanMessage(state["b"])]})
        return {"c": result["messages"][-1].text}

    graph = chain(("one", asks("a", "q")), ("two", asks("b", "q")), ("team", team))
    assert check(graph) == [
        ("one", ()),
        ("two", ()),
        ("team/talk", (0,)),
        ("team/talk", (0, 1, 2)),
    ]


def test_a_reducer_that_the_inner_graph_does_not_return_keeps_its_writers():
    class Inner(TypedDict, total=False):
        given: str
        notes: Annotated[list[str], operator.add]
        out: str

    class Out(TypedDict):
        out: str

    builder = StateGraph(Inner, output_schema=Out)
    builder.add_node("note", lambda state: {"notes": [say(state["given"])]})
    builder.add_node("more", lambda state: {"notes": [say("more")]})
    builder.add_node("sum", lambda state: {"out": say(state["notes"])})
    for a, b in itertools.pairwise([START, "note", "more", "sum"]):
        builder.add_edge(a, b)
    inner = builder.compile()

    def team(state):
        return {"b": inner.invoke({"given": state["a"], "notes": [state["a"]]})["out"]}

    graph = chain(("one", asks("a", "q")), ("team", team), ("last", asks("c", "b")))
    assert check(graph) == [
        ("one", ()),
        ("team/note", (0,)),
        ("team/more", ()),
        ("team/sum", (0, 1, 2)),
        ("last", (3,)),
    ]


def test_only_the_last_message_of_an_inner_agent_is_handed_on():
    chat = inner_chat()

    def team(state):
        result = chat.invoke({"messages": [HumanMessage(state["a"])]})
        return {"messages": [result["messages"][-1]]}

    graph = chain(
        ("one", asks("a", "q")),
        ("team", team),
        ("last", lambda state: {"c": say([m.text for m in state["messages"]])}),
    )
    assert check(graph) == [("one", ()), ("team/talk", (0,)), ("last", (1,))]


def test_a_graph_that_is_handed_the_state_itself_gets_its_channels_by_name():
    inner = chain(("x", asks("c", "b")), ("y", asks("d", "c")))

    def team(state):
        return {"d": inner.invoke(state)["d"]}

    graph = chain(
        ("one", asks("a", "q")), ("two", asks("b", "q")), ("team", team), ("last", asks("a", "d"))
    )
    assert check(graph) == [
        ("one", ()),
        ("two", ()),
        ("team/x", (1,)),
        ("team/y", (2,)),
        ("last", (3,)),
    ]


def test_each_item_that_is_sent_keeps_its_own_writer():
    builder = StateGraph(State)
    builder.add_node("voter", lambda given: {"votes": [say(given["q"])]})
    builder.add_node("judge", lambda given: {"messages": [AIMessage(say(given["vote"]))]})
    builder.add_conditional_edges(
        START, lambda state: [Send("voter", {"q": n}) for n in "12"], ["voter"]
    )
    builder.add_node("gather", lambda state: {})
    builder.add_edge("voter", "gather")
    builder.add_conditional_edges(
        "gather", lambda state: [Send("judge", {"vote": v}) for v in state["votes"]], ["judge"]
    )
    got = check(builder.compile(), perturbed=False)
    assert got == [("voter", ()), ("voter", ()), ("judge", (0,)), ("judge", (1,))]


def test_a_command_sends_what_its_node_made():
    def plan(state) -> Command:
        text = say(state["q"])
        return Command(goto=[Send("work", {"part": f"{text} {n}"}) for n in "xy"])

    builder = StateGraph(State)
    builder.add_node("plan", plan, destinations=("work",))
    builder.add_node("work", lambda given: {"votes": [say(given["part"])]})
    builder.add_edge(START, "plan")
    got = check(builder.compile(), perturbed=False)
    assert got == [("plan", ()), ("work", (0,)), ("work", (0,))]


def test_a_state_that_is_sent_whole_is_plain_and_holds_all():
    kinds = []

    def work(state):
        kinds.append(type(state["inner"]))
        return {"c": say(state["inner"])}

    builder = StateGraph(State)
    builder.add_node("one", asks("a", "q"))
    builder.add_node("work", work)
    builder.add_edge(START, "one")
    builder.add_conditional_edges("one", lambda state: [Send("work", {"inner": state})], ["work"])
    graph = builder.compile(checkpointer=InMemorySaver())
    assert check(graph, perturbed=False) == [("one", ()), ("work", (0,))]
    assert set(kinds) == {dict}


def test_a_state_kept_in_a_channel_is_plain():
    class Keeps(TypedDict, total=False):
        q: str
        a: str
        kept: Any

    def keep(state):
        return {"kept": {"state": state, "list": [state]}}

    graph = chain(("one", asks("a", "q")), ("keep", keep), state=Keeps)
    (episode,) = run_episodes(graph, [{"q": "1"}], engine=FakeEngine("x"))
    kept = episode.state["kept"]
    assert type(kept["state"]) is dict
    assert type(kept["list"][0]) is dict
    assert kept["state"] == {"q": "1", "a": "x"}


def test_a_model_that_is_returned_whole_is_of_its_own_class():
    kinds = []

    def two(state: Model):
        state.b = say(state.a)
        return state

    def three(state: Model):
        kinds.append(type(state.model_copy()))
        return {"c": say(state.b)}

    def one(state: Model):
        return {"a": say(state.q)}

    graph = chain(("one", one), ("two", two), ("three", three), state=Model)
    assert check(graph) == [("one", ()), ("two", (0,)), ("three", (1,))]
    assert set(kinds) == {Model}


def test_nothing_is_left_of_the_views_after_a_run():
    from langgraph.pregel import _retry, _runner

    from marft_graph.rollout.views import _typed

    graph = chain(("one", lambda state: {"a": say(state.q)}), state=Model)
    play(graph)
    assert not _typed
    assert _runner.run_with_retry is _retry.run_with_retry
    assert _runner.arun_with_retry is _retry.arun_with_retry


def test_a_router_that_asks_a_model_depends_on_what_it_reads():
    builder = StateGraph(State)
    builder.add_node("one", asks("a", "q"))
    builder.add_node("two", asks("b", "q"))
    builder.add_node("three", asks("c", "b"))

    def route(state):
        return "three" if say(state["a"]) else END

    for a, b in itertools.pairwise([START, "one", "two"]):
        builder.add_edge(a, b)
    builder.add_conditional_edges("two", route, ["three", END])
    episode = play(builder.compile())
    got = [(call.node, call.parents) for call in episode.calls]
    assert got == [("one", ()), ("two", ()), ("two", (0, 1)), ("three", (1,))]


def test_a_history_that_is_written_on_keeps_all_who_spoke():
    def speaks(state):
        text = say(state["q"])
        return {"a": f"{state.get('a', '')} {text}"}

    def replies(state):
        history = state["a"]
        return {"a": history + say(history)}

    graph = chain(("one", speaks), ("two", speaks), ("three", replies), ("four", asks("b", "a")))
    assert check(graph) == [("one", ()), ("two", ()), ("three", (0, 1)), ("four", (0, 1, 2))]


def test_an_answer_that_repeats_what_it_was_asked_is_the_model_s_own():
    def script(agent, messages):
        return {"one": "the plan", "two": "the plan it is"}.get(agent, "done")

    graph = chain(
        ("one", lambda state: {"a": say(state["q"])}),
        ("two", lambda state: {"b": model.invoke(state["a"]).text}),
        ("three", lambda state: {"c": say(state["b"])}),
    )
    (episode,) = run_episodes(graph, [{"q": "1"}], engine=FakeEngine(script))
    assert [call.parents for call in episode.calls] == [(), (0,), (1,)]
    assert compile_graph(graph).dependency("three", "one") == "never"


def test_of_a_copied_state_counts_what_the_prompt_shows():
    def two(state):
        copied = {**state, "q": "else"}
        return {"c": say(f"{copied['b']}")}

    graph = chain(("one", asks("a", "q")), ("also", asks("b", "q")), ("two", two))
    assert check(graph) == [("one", ()), ("also", ()), ("two", (1,))]


def test_an_item_of_what_an_outer_graph_wrote_is_sent_with_its_own_writer():
    def fan(state):
        return [Send("work", {"part": item}) for item in state["votes"]]

    builder = StateGraph(State)
    builder.add_node("plan", lambda state: {"c": say(state["q"])})
    builder.add_node("work", lambda given: {"votes": [say(given["part"])]})
    builder.add_edge(START, "plan")
    builder.add_conditional_edges("plan", fan, ["work"])
    inner = builder.compile()

    outer = StateGraph(State)
    for name in ("one", "two"):
        outer.add_node(name, lambda state: {"votes": [say(state["q"])]})
        outer.add_edge(START, name)
        outer.add_edge(name, "inner")
    outer.add_node("inner", inner)
    got = check(outer.compile(), perturbed=False)
    assert sorted(got)[:3] == [("inner/plan", ()), ("inner/work", (0,)), ("inner/work", (1,))]


def test_of_two_answers_each_is_its_own_call_s():
    def two(state):
        first, second = say(state["q"]), say("else")
        return {"a": first, "b": second}

    graph = chain(("two", two), ("first", asks("c", "a")), ("second", asks("d", "b")))
    got = [(call.node, call.parents) for call in play(graph).calls]
    assert got == [("two", ()), ("two", (0,)), ("first", (0,)), ("second", (1,))]
