"""Parents, against graphs small enough to work out by hand.

Every graph is run for real; each call's node names its parents' nodes in the expectation.
"""

import asyncio
import operator
from typing import Annotated

from langchain_core.language_models.fake_chat_models import (
    FakeListChatModel,
    GenericFakeChatModel,
)
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy, Send
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.rollout.runner import run_episodes

model = FakeListChatModel(responses=["the app's own model"])


def say(text):
    return model.invoke(text).content


def run(graph, value=None, script="x", delay=0.0, **settings):
    engine = FakeEngine(script, delay=delay)
    try:
        (episode,) = run_episodes(graph, [value or {"q": "1"}], engine=engine, **settings)
    finally:
        engine.close()
    assert episode.status == "ok", episode.error
    return episode


def parents(episode):
    return [(call.node, call.parents) for call in episode.calls]


class State(TypedDict, total=False):
    q: str
    a: str
    b: str
    c: str
    d: str
    votes: Annotated[list[str], operator.add]


def node(name, *reads, channel=None):
    """A node that calls its model with `reads` of the state and declares to read nothing else."""
    schema = TypedDict(f"Reads_{name}", {read: State.__annotations__[read] for read in reads})

    def body(state):
        return {channel or name: say(str([state.get(read) for read in reads]))}

    return name, body, schema


def build(nodes, edges):
    builder = StateGraph(State)
    for name, body, schema in nodes:
        builder.add_node(name, body, input_schema=schema)
    for start, end in edges:
        builder.add_edge(start, end)
    return builder.compile()


def test_a_chain_depends_on_the_call_before():
    graph = build(
        [node("a", "q"), node("b", "a"), node("c", "b")],
        [(START, "a"), ("a", "b"), ("b", "c"), ("c", END)],
    )
    assert parents(run(graph)) == [("a", ()), ("b", (0,)), ("c", (1,))]


def test_the_sink_of_a_diamond_depends_on_both_sides_and_not_on_its_source():
    graph = build(
        [node("a", "q"), node("b", "a"), node("c", "a"), node("d", "b", "c")],
        [(START, "a"), ("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", END)],
    )
    assert parents(run(graph)) == [("a", ()), ("b", (0,)), ("c", (0,)), ("d", (1, 2))]


def test_a_node_that_is_given_the_whole_state_depends_on_all_that_it_holds():
    builder = StateGraph(State)
    builder.add_node("a", lambda state: {"a": say(f"{state}")})
    builder.add_node("b", lambda state: {"b": say(f"{state}")})
    builder.add_node("c", lambda state: {"c": say(f"{state}")})
    for start, end in [(START, "a"), ("a", "b"), ("b", "c"), ("c", END)]:
        builder.add_edge(start, end)
    assert parents(run(builder.compile())) == [("a", ()), ("b", (0,)), ("c", (0, 1))]


def test_three_voters_with_one_prompt_give_three_calls_and_the_aggregator_has_them_as_parents():
    builder = StateGraph(State)
    builder.add_node("voter", lambda state: {"votes": [say("the same question")]})
    builder.add_node("aggregator", lambda state: {"a": say("/".join(state["votes"]))})
    builder.add_conditional_edges(
        START, lambda state: [Send("voter", {"q": state["q"]}) for _ in range(3)], ["voter"]
    )
    builder.add_edge("voter", "aggregator")
    builder.add_edge("aggregator", END)
    episode = run(builder.compile())
    assert parents(episode) == [
        ("voter", ()),
        ("voter", ()),
        ("voter", ()),
        ("aggregator", (0, 1, 2)),
    ]
    assert len({call.seed for call in episode.calls}) == 4
    assert len({call.prompt_ids for call in episode.calls[:3]}) == 1


def loop_branch(name):
    schema = TypedDict(f"Only_{name}", {name: Annotated[list[str], operator.add]})

    def body(state):
        return {name: [say("".join(state[name]))]}

    return name, body, schema


class Branches(TypedDict, total=False):
    q: str
    left: Annotated[list[str], operator.add]
    right: Annotated[list[str], operator.add]


def test_two_interleaved_branches_of_four_turns_share_no_parent():
    builder = StateGraph(Branches)
    for name in ("left", "right"):
        name, body, schema = loop_branch(name)
        builder.add_node(name, body, input_schema=schema)
        builder.add_edge(START, name)
        builder.add_conditional_edges(
            name, lambda state, name=name: name if len(state[name]) < 4 else END, [name, END]
        )
    episode = run(builder.compile())
    # a reducer channel holds all its writers: turn n depends on the turns before it
    by_branch = {"left": [], "right": []}
    for call in episode.calls:
        assert call.parents == tuple(by_branch[call.node])
        by_branch[call.node].append(call.index)
    assert [len(turns) for turns in by_branch.values()] == [4, 4]


def test_two_branches_of_four_plain_nodes_share_no_parent():
    class Eight(TypedDict, total=False):
        q: str
        l1: str
        l2: str
        l3: str
        l4: str
        r1: str
        r2: str
        r3: str
        r4: str

    builder = StateGraph(Eight)
    for side in "lr":
        before, key = START, "q"
        for turn in range(1, 5):
            name = f"{side}{turn}"
            schema = TypedDict(f"Reads_{name}", {key: str})
            builder.add_node(
                f"node_{name}",
                lambda state, name=name, key=key: {name: say(state[key])},
                input_schema=schema,
            )
            builder.add_edge(before, f"node_{name}")
            before, key = f"node_{name}", name
    episode = run(builder.compile())
    names = [call.node for call in episode.calls]
    got = {call.node: [names[parent] for parent in call.parents] for call in episode.calls}
    assert got == {
        **{f"node_{side}1": [] for side in "lr"},
        **{f"node_{side}{n}": [f"node_{side}{n - 1}"] for side in "lr" for n in (2, 3, 4)},
    }


def test_a_plain_channel_in_a_loop_is_replaced():
    builder = StateGraph(State)
    turns = iter(range(10))
    builder.add_node(
        "writer",
        lambda state: {"a": say(state.get("b", ""))},
        input_schema=TypedDict("W", {"b": str}),
    )
    builder.add_node(
        "critic", lambda state: {"b": say(state["a"])}, input_schema=TypedDict("C", {"a": str})
    )
    builder.add_edge(START, "writer")
    builder.add_edge("writer", "critic")
    builder.add_conditional_edges("critic", lambda state: "writer" if next(turns) < 2 else END)
    chain = [("writer", ()), ("critic", (0,)), ("writer", (1,))]
    chain += [("critic", (2,)), ("writer", (3,)), ("critic", (4,))]
    assert parents(run(builder.compile())) == chain


def test_a_node_without_a_model_passes_on_what_it_read():
    def tool(state):
        return {"b": state["a"].upper()}

    graph = build(
        [node("a", "q"), ("tool", tool, TypedDict("T", {"a": str})), node("c", "b")],
        [(START, "a"), ("a", "tool"), ("tool", "c"), ("c", END)],
    )
    assert parents(run(graph)) == [("a", ()), ("c", (0,))]


def test_an_untrained_node_passes_on_what_it_read():
    graph = build(
        [node("a", "q"), node("b", "a"), node("c", "b")],
        [(START, "a"), ("a", "b"), ("b", "c"), ("c", END)],
    )
    episode = run(graph, nodes=["a", "c"])
    assert parents(episode) == [("a", ()), ("c", (0,))]
    assert episode.state["b"] == "the app's own model"


class Inner(TypedDict, total=False):
    a: str
    b: str
    c: str


def inner_graph():
    builder = StateGraph(Inner)
    builder.add_node(
        "one", lambda state: {"b": say(state["a"])}, input_schema=TypedDict("One", {"a": str})
    )
    builder.add_node(
        "two", lambda state: {"c": say(state["a"])}, input_schema=TypedDict("Two", {"a": str})
    )
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    return builder.compile()


def test_a_node_that_is_a_graph_hands_its_channels_over_by_name():
    builder = StateGraph(State)
    for name, body, schema in [node("a_", "q", channel="a"), node("d_", "c", channel="d")]:
        builder.add_node(name, body, input_schema=schema)
    builder.add_node("team", inner_graph())
    for start, end in [(START, "a_"), ("a_", "team"), ("team", "d_")]:
        builder.add_edge(start, end)
    # `c` was written by team/two alone
    expected = [("a_", ()), ("team/one", (0,)), ("team/two", (0,)), ("d_", (2,))]
    assert parents(run(builder.compile())) == expected


def test_a_graph_run_inside_a_node_depends_on_the_node_s_input_and_earlier_calls():
    team = inner_graph()

    def lead(state):
        plan = say("plan")
        result = team.invoke({"a": plan})
        return {"d": result["c"] + "!"}

    builder = StateGraph(State)
    builder.add_node("lead", lead)
    name, body, schema = node("last", "d", channel="b")
    builder.add_node(name, body, input_schema=schema)
    builder.add_edge(START, "lead")
    builder.add_edge("lead", "last")
    # the node may have used anything that the inner graph gave back
    expected = [("lead", ()), ("lead/one", (0,)), ("lead/two", (0,)), ("last", (1, 2))]
    assert parents(run(builder.compile())) == expected


def test_parallel_runs_of_one_subgraph_keep_apart_and_differ_in_seed():
    class One(TypedDict, total=False):
        draft_text: str
        votes: Annotated[list[str], operator.add]

    inner = StateGraph(One)
    inner.add_node("draft", lambda state: {"draft_text": say("same")})
    inner.add_node(
        "vote",
        lambda state: {"votes": [say(state["draft_text"])]},
        input_schema=TypedDict("Vote", {"draft_text": str}),
    )
    inner.add_edge(START, "draft")
    inner.add_edge("draft", "vote")
    builder = StateGraph(State)
    builder.add_node("voter", inner.compile())
    builder.add_conditional_edges(
        START, lambda state: [Send("voter", {"q": "?", "votes": []}) for _ in range(3)], ["voter"]
    )
    episode = run(builder.compile())
    assert len({call.seed for call in episode.calls}) == 6
    drafts = [call.index for call in episode.calls if call.node == "voter/draft"]
    votes = [call.parents for call in episode.calls if call.node == "voter/vote"]
    assert sorted(votes) == [(draft,) for draft in drafts]


def test_later_calls_of_a_node_depend_on_its_earlier_ones():
    def body(state):
        first = say("draft " + state["a"])
        second = say("review " + first)
        return {"b": second}

    graph = build(
        [node("a", "q"), ("b", body, TypedDict("B", {"a": str})), node("c", "b")],
        [(START, "a"), ("a", "b"), ("b", "c")],
    )
    assert parents(run(graph)) == [("a", ()), ("b", (0,)), ("b", (0, 1)), ("c", (2,))]


def test_calls_that_a_node_makes_at_once_are_siblings():
    async def gathered(state):
        answers = await asyncio.gather(*(model.ainvoke(f"part {n}") for n in range(3)))
        summary = await model.ainvoke("".join(answer.content for answer in answers))
        return {"a": summary.content}

    graph = build([("a", gathered, State)], [(START, "a")])
    assert parents(run(graph)) == [("a", ()), ("a", ()), ("a", ()), ("a", (0, 1, 2))]


def test_a_batch_of_calls_are_siblings():
    threaded = GenericFakeChatModel(messages=iter([]))  # FakeListChatModel's batch is sequential

    def batched(state):
        return {"a": str(len(threaded.batch(["x", "y", "z"])))}

    graph = build([("a", batched, State)], [(START, "a")])
    assert parents(run(graph, delay=0.1)) == [("a", ())] * 3


def test_the_calls_of_a_failed_attempt_are_no_part_of_the_episode():
    attempts = []

    def flaky(state):
        attempts.append(say(f"attempt {len(attempts)}"))
        if len(attempts) == 1:
            raise ConnectionError("the tool was away")
        return {"a": attempts[-1]}

    builder = StateGraph(State)
    retry = RetryPolicy(max_attempts=2, initial_interval=0.001)
    builder.add_node("flaky", flaky, retry_policy=retry)
    builder.add_node("next", lambda state: {"b": say(state["a"])})
    builder.add_edge(START, "flaky")
    builder.add_edge("flaky", "next")
    episode = run(builder.compile())
    assert len(attempts) == 2
    assert parents(episode) == [("flaky", ()), ("next", (0,))]
    assert "attempt 1" in episode.calls[0].messages[0]["content"]


def test_the_calls_inside_a_failed_attempt_s_subgraph_are_no_part_of_the_episode():
    attempts = []
    team = inner_graph()

    def flaky(state):
        attempts.append(team.invoke({"a": "go"}))
        if len(attempts) == 1:
            raise ConnectionError("the tool was away")
        return {"d": "done"}

    builder = StateGraph(State)
    retry = RetryPolicy(max_attempts=2, initial_interval=0.001)
    builder.add_node("flaky", flaky, retry_policy=retry)
    builder.add_edge(START, "flaky")
    assert parents(run(builder.compile())) == [("flaky/one", ()), ("flaky/two", ())]


def test_send_depends_on_what_its_sender_read():
    builder = StateGraph(State)
    builder.add_node("planner", lambda state: {"a": say("plan")})
    builder.add_node("worker", lambda task: {"votes": [say(task["part"])]})
    builder.add_node("joiner", lambda state: {"b": say("/".join(state["votes"]) + state["a"])})
    builder.add_edge(START, "planner")
    builder.add_conditional_edges(
        "planner",
        lambda state: [Send("worker", {"part": state["a"] + n}) for n in "xy"],
        ["worker"],
    )
    builder.add_edge("worker", "joiner")
    expected = [("planner", ()), ("worker", (0,)), ("worker", (0,)), ("joiner", (0, 1, 2))]
    assert parents(run(builder.compile())) == expected


def test_a_command_s_update_counts_as_the_node_s_write():
    def router(state) -> Command:
        return Command(goto="b", update={"a": say("where to?")})

    builder = StateGraph(State)
    builder.add_node("router", router)
    name, body, schema = node("b", "a")
    builder.add_node(name, body, input_schema=schema)
    builder.add_edge(START, "router")
    assert parents(run(builder.compile())) == [("router", ()), ("b", (0,))]


def test_the_order_of_calls_does_not_depend_on_which_thread_was_first():
    import random
    import time

    def slow(name):
        def body(state):
            time.sleep(random.random() / 100)
            return {name: say(name)}

        return body

    builder = StateGraph(State)
    for name in "abcd":
        builder.add_node(f"node_{name}", slow(name))
        builder.add_edge(START, f"node_{name}")
    graph = builder.compile()
    seen = {tuple((c.node, c.seed) for c in run(graph).calls) for _ in range(5)}
    assert len(seen) == 1
