"""Interrupts: failed without a reviewer, trained through with one."""

import asyncio
import itertools
import operator
import time
from typing import Annotated

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.errors import ConfigError, ReviewerError
from marft_graph.rollout.runner import run_episodes

model = FakeListChatModel(responses=["own"])


class State(TypedDict, total=False):
    q: str
    log: Annotated[list, operator.add]


def draft(state):
    return {"log": [model.invoke(f"draft {state['q']}").text]}


def approve(state):
    return {"log": [interrupt({"draft": state["log"][-1]})]}


def send(state):
    return {"log": [model.invoke(f"send {state['log']}").text]}


def chain(*nodes, **settings):
    builder = StateGraph(State)
    for name, node in nodes:
        builder.add_node(name, node)
    builder.add_edge(START, nodes[0][0])
    for (before, _), (after, _) in itertools.pairwise(nodes):
        builder.add_edge(before, after)
    return builder.compile(**settings)


@pytest.fixture
def engine():
    made = FakeEngine(lambda agent, messages: f"<{agent}>")
    yield made
    made.close()


def run(graph, engine, reviewer=None, **settings):
    (episode,) = run_episodes(
        graph, [{"q": "q", "gold": "yes"}], engine=engine, on_interrupt=reviewer, **settings
    )
    return episode


STEPS = (("draft", draft), ("approve", approve), ("send", send))


@pytest.mark.parametrize(
    "settings",
    [
        {"interrupt_before": ["send"]},
        {"interrupt_after": ["draft"]},
        {"interrupt_before": "*"},
        {"interrupt_before": ["send"], "checkpointer": InMemorySaver()},
    ],
)
def test_a_graph_that_is_compiled_to_stop_fails_without_a_reviewer_and_goes_on_with_one(
    settings, engine
):
    graph = chain(("draft", draft), ("send", send), **settings)
    stopped = run(graph, engine, reward=lambda example, state: 1.0)
    assert (stopped.status, stopped.total_reward) == ("failed: interrupt", 0.0)
    assert "interrupt_before or interrupt_after" in stopped.error
    episode = run(graph, engine, lambda example, state, interrupt: pytest.fail("nobody asks"))
    assert [(call.node, call.parents) for call in episode.calls] == [("draft", ()), ("send", (0,))]


def test_a_graph_inside_that_is_compiled_to_stop_counts_too(engine):
    inner = chain(("draft", draft), ("send", send), interrupt_before=["send"])
    graph = chain(("team", inner))
    assert run(graph, engine).status == "failed: interrupt"
    episode = run(graph, engine, lambda example, state, interrupt: None)
    assert [call.node for call in episode.calls] == ["team/draft", "team/send"]
    assert episode.ok


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("saver", [None, InMemorySaver()])
def test_the_reviewer_answers_and_the_run_goes_on(saver, is_async, engine):
    asked = []

    def reviewer(example, state, interrupt):
        asked.append((example["gold"], state["log"], interrupt.value))
        example["gold"] = "changed"
        return "fine"

    async def asynchronous(example, state, interrupt):
        await asyncio.sleep(0)
        return reviewer(example, state, interrupt)

    graph = chain(*STEPS, checkpointer=saver)
    episode = run(graph, engine, asynchronous if is_async else reviewer)
    assert episode.ok
    assert episode.state["log"] == ["<draft>", "fine", "<send>"]
    assert "__interrupt__" not in episode.state
    assert [(call.node, call.parents) for call in episode.calls] == [("draft", ()), ("send", (0,))]
    assert asked == [("yes", ["<draft>"], {"draft": "<draft>"})]
    assert episode.example["gold"] == "yes"


def test_without_a_reviewer_the_message_says_what_to_do(engine):
    episode = run(chain(*STEPS, checkpointer=InMemorySaver()), engine)
    assert episode.status == "failed: interrupt"
    assert "{'draft': '<draft>'}" in episode.error
    assert "on_interrupt=" in episode.error


def test_calls_before_the_interrupt_of_their_node_count_once(engine):
    def both(state):
        text = model.invoke("first").text
        return {"log": [text, interrupt("ok?"), model.invoke(f"then {text}").text]}

    episode = run(chain(("both", both), ("send", send)), engine, lambda *_: "yes")
    said = [(call.node, call.messages[0]["content"], call.parents) for call in episode.calls]
    assert [node for node, _, _ in said] == ["both", "both", "send"]
    assert said[1] == ("both", "then <both>", (0,))
    assert 1 in said[2][2]
    assert [why for _, why in episode.set_aside] == ["retried"]


def test_what_a_graph_inside_has_finished_counts_though_its_node_begins_again(engine):
    inner = chain(*STEPS)
    episode = run(chain(("team", inner), ("last", send)), engine, lambda *_: "yes")
    nodes = [(call.node, call.parents) for call in episode.calls]
    assert nodes[:2] == [("team/draft", ()), ("team/send", (0,))]
    assert nodes[2][0] == "last"
    assert episode.set_aside == ()


def test_a_graph_that_code_runs_counts_likewise(engine):
    inner = chain(*STEPS)

    def team(state):
        return {"log": inner.invoke({"q": state["q"], "log": []})["log"]}

    episode = run(chain(("team", team)), engine, lambda *_: "yes")
    assert [call.node.rpartition("/")[2] for call in episode.calls] == ["draft", "send"]
    assert episode.state["log"][1] == "yes"


def test_several_interrupts_at_once_get_their_own_answers(engine):
    builder = StateGraph(State)
    for name in ("a", "b"):
        builder.add_node(name, lambda state, name=name: {"log": [name + interrupt(name)]})
        builder.add_edge(START, name)
    builder.add_node("talker", draft).add_edge(START, "talker")
    builder.add_node("send", send).add_edge(["a", "b", "talker"], "send")
    episode = run(builder.compile(), engine, lambda e, s, interrupt: interrupt.value.upper())
    assert sorted(episode.state["log"]) == ["<send>", "<talker>", "aA", "bB"]
    assert [(c.node, c.parents) for c in episode.calls] == [("talker", ()), ("send", (0,))]


def test_two_interrupts_in_one_node_are_asked_in_turn(engine):
    def node(state):
        first = interrupt("first")
        return {"log": [first, interrupt(f"second after {first}")]}

    episode = run(chain(("node", node)), engine, lambda e, s, i: f"<{i.value}>")
    assert episode.state["log"] == ["<first>", "<second after <first>>"]


def loop(limit=None):
    def route(state):
        return END if state["log"][-1] == "yes" else "draft"

    builder = StateGraph(State).add_node("draft", draft).add_node("approve", approve)
    builder.add_edge(START, "draft").add_edge("draft", "approve")
    builder.add_conditional_edges("approve", route)
    return builder.compile()


def test_a_loop_asks_until_the_reviewer_is_content(engine):
    answers = iter(["no", "no", "yes"])
    episode = run(loop(), engine, lambda *_: next(answers))
    assert [call.node for call in episode.calls] == ["draft"] * 3
    assert episode.ok


def test_a_loop_that_never_ends_is_ended(engine):
    episode = run(loop(), engine, lambda *_: "no", recursion_limit=5)
    assert episode.status == "failed: interrupt"
    assert "interrupted again after 5 answers" in episode.error


async def cancelled(example, state, asked):
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("reviewer", "name"),
    [(lambda *asked: next(iter(())), "StopIteration"), (cancelled, "CancelledError")],
)
def test_what_asyncio_takes_for_an_end_is_a_reviewer_that_raised(engine, reviewer, name):
    graph = chain(("draft", draft), ("approve", approve), checkpointer=InMemorySaver())
    with pytest.raises(ReviewerError, match=f"on_interrupt raised .*{name}"):
        run(graph, engine, reviewer, reward_timeout=10)


def test_a_reviewer_that_raises_or_hangs_stops_the_rollout(engine):
    def broken(example, state, interrupt):
        raise KeyError("gold")

    with pytest.raises(ReviewerError, match=r"on_interrupt raised KeyError: 'gold', asked .*'q'"):
        run(chain(*STEPS), engine, broken)
    with pytest.raises(ReviewerError, match=r"longer than 0\.1 seconds \(reward_timeout\)"):
        run(chain(*STEPS), engine, lambda *_: time.sleep(1), reward_timeout=0.1)
    with pytest.raises(ConfigError, match="on_interrupt is 'yes'"):
        run(chain(*STEPS), engine, "yes")


def test_a_reviewer_may_ask_a_model_of_its_own(engine):
    episode = run(chain(*STEPS), engine, lambda *_: model.invoke("judge").text)
    assert episode.state["log"] == ["<draft>", "own", "<send>"]


def test_a_tool_that_asks_a_person(engine):
    agents = pytest.importorskip("langchain.agents")
    middleware = pytest.importorskip("langchain.agents.middleware")
    from langchain_core.messages import AIMessage

    def send_mail(to: str) -> str:
        """Send a mail."""
        return f"sent to {to}"

    script = FakeEngine(
        lambda agent, messages: (
            "done"
            if messages[-1].type == "tool"
            else AIMessage("", tool_calls=[{"name": "send_mail", "args": {"to": "x"}, "id": "1"}])
        )
    )

    class Model(FakeListChatModel):
        def bind_tools(self, tools, **kwargs):
            return self.bind(tools=tools)

    agent = agents.create_agent(
        Model(responses=["own"]),
        [send_mail],
        middleware=[middleware.HumanInTheLoopMiddleware(interrupt_on={"send_mail": True})],
    )
    (episode,) = run_episodes(
        agent,
        [{"messages": [("user", "hi")]}],
        engine=script,
        on_interrupt=lambda e, s, i: {"decisions": [{"type": "approve"}]},
    )
    script.close()
    assert episode.ok, episode.error
    assert [message.type for message in episode.state["messages"]] == ["human", "ai", "tool", "ai"]
    assert len(episode.calls) == 2
