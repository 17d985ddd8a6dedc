"""Rewards that nodes emit while they run reach the calls that earned them, and no other."""

import asyncio
import contextvars
import math
import operator
import threading
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, RetryPolicy, Send
from typing_extensions import TypedDict

from marft_graph import Reward, emit_reward
from marft_graph.engine.fake import FakeEngine
from marft_graph.errors import RewardError
from marft_graph.learn.advantages import dag_gae
from marft_graph.rollout.emit import Emitted, latest, shares
from marft_graph.rollout.runner import run_episodes
from marft_graph.run.trajectories import read_traces, write_traces

model = FakeListChatModel(responses=["own"])


class State(TypedDict, total=False):
    q: str
    a: str
    b: str
    log: Annotated[list[str], operator.add]


@pytest.fixture
def engine():
    made = FakeEngine(lambda agent, messages: f"{agent}({messages[-1].text})")
    yield made
    made.close()


def chain(*nodes, **settings):
    """A chain of (name, function), compiled."""
    builder = StateGraph(State)
    before = START
    for name, function in nodes:
        builder.add_node(name, function, **settings)
        builder.add_edge(before, name)
        before = name
    return builder.compile()


def ask(state):
    return {"a": model.invoke(state["q"]).text}


def play(graph, engine, count=1, **settings):
    examples = [{"q": str(number)} for number in range(count)]
    return run_episodes(graph, examples, engine=engine, **settings)


def rewards(episode):
    assert episode.ok, episode.error
    return [(call.node, call.reward) for call in episode.calls]


# Where a reward may be emitted


def test_a_sync_node_is_credited_for_what_it_emits(engine):
    def actor(state):
        answer = {"b": model.invoke(state["a"]).text}
        emit_reward(0.2)
        return answer

    (episode,) = play(chain(("reasoner", ask), ("actor", actor)), engine)
    assert rewards(episode) == [("reasoner", 0.0), ("actor", 0.2)]
    assert episode.outcome_reward == 0.0
    assert episode.total_reward == 0.2


def test_an_async_node_is_credited_for_what_it_emits(engine):
    async def actor(state):
        answer = {"b": (await model.ainvoke(state["a"])).text}
        await asyncio.sleep(0)
        emit_reward(-0.5)
        return answer

    (episode,) = play(chain(("reasoner", ask), ("actor", actor)), engine)
    assert rewards(episode) == [("reasoner", 0.0), ("actor", -0.5)]


def test_several_rewards_of_a_node_add_up_and_its_last_call_gets_them(engine):
    def actor(state):
        emit_reward(1)
        first = model.invoke("one").text
        emit_reward(0.25)
        return {"b": model.invoke(first).text}

    (episode,) = play(chain(("actor", actor)), engine)
    assert rewards(episode) == [("actor", 0.0), ("actor", 1.25)]


def test_calls_that_a_task_makes_side_by_side_share_its_reward(engine):
    async def actor(state):
        await model.ainvoke("before")
        both = await asyncio.gather(model.ainvoke("one"), model.ainvoke("two"))
        emit_reward(1.0)
        return {"b": both[0].text}

    (episode,) = play(chain(("actor", actor)), engine)
    assert [reward for _, reward in rewards(episode)] == [0.0, 0.5, 0.5]


def test_a_conditional_edge_speaks_for_the_node_it_leaves(engine):
    builder = StateGraph(State)
    builder.add_node("actor", ask)
    builder.add_edge(START, "actor")

    def route(state):
        emit_reward(0.75)
        return END

    builder.add_conditional_edges("actor", route)
    (episode,) = play(builder.compile(), engine)
    assert rewards(episode) == [("actor", 0.75)]


def test_a_subgraph_s_node_is_credited_and_not_its_neighbour(engine):
    def checked(state):
        answer = {"b": model.invoke(state["a"]).text}
        emit_reward(0.5)
        return answer

    inner = chain(("draft", ask), ("check", checked), ("polish", ask))
    (episode,) = play(chain(("team", inner), ("after", ask)), engine)
    assert rewards(episode) == [
        ("team/draft", 0.0),
        ("team/check", 0.5),
        ("team/polish", 0.0),
        ("after", 0.0),
    ]


def test_a_node_that_runs_a_graph_by_itself_speaks_for_the_graph_s_last_call(engine):
    def check(state):
        return {"a": model.invoke(state["a"]).text}

    inner = chain(("draft", ask), ("check", check))

    def team(state):
        answer = inner.invoke({"q": state["q"]})
        emit_reward(0.5)
        return {"b": answer["a"]}

    (episode,) = play(chain(("team", team), ("after", ask)), engine)
    assert [reward for _, reward in rewards(episode)] == [0.0, 0.5, 0.0]


def test_a_thread_with_the_node_s_context_is_found(engine):
    def actor(state):
        answer = ask(state)
        thread = threading.Thread(target=contextvars.copy_context().run, args=(emit_reward, 0.5))
        thread.start()
        thread.join()
        return answer

    (episode,) = play(chain(("actor", actor)), engine)
    assert rewards(episode) == [("actor", 0.5)]


# Tasks that call no model: the calls that fed them


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    emit_reward(0.1)
    return a + b


@tool
async def sub(a: int, b: int) -> int:
    """Subtract b from a."""
    emit_reward(0.3)
    return a - b


def react(answer):
    chat = ChatOpenAI(model="gpt-4o-mini", api_key="not-set").bind_tools([add, sub])
    builder = StateGraph(MessagesState)
    builder.add_node("agent", lambda state: {"messages": [chat.invoke(state["messages"])]})
    builder.add_node("tools", ToolNode([add, sub]))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    return builder.compile(), FakeEngine(answer)


def use_both_then_one(agent, messages):
    """Asks for both tools, then for one, then answers."""
    turn = sum(message.type == "ai" for message in messages)
    calls = [
        {"name": "add", "args": {"a": 1, "b": 2}, "id": f"add{turn}"},
        {"name": "sub", "args": {"a": 1, "b": 2}, "id": f"sub{turn}"},
    ]
    if turn == 2:
        return "done"
    return AIMessage(content="", tool_calls=calls if turn == 0 else calls[:1])


@pytest.mark.parametrize("kind", ["tool node", "agent"])
def test_what_a_tool_emits_goes_to_the_call_that_asked_for_it(kind):
    graph, engine = react(use_both_then_one)
    if kind == "agent":
        graph = create_agent(ChatOpenAI(model="gpt-4o-mini", api_key="not-set"), [add, sub])
    (episode,) = run_episodes(graph, [{"messages": [("user", "hi")]}], engine=engine)
    engine.close()
    assert [reward for _, reward in rewards(episode)] == [pytest.approx(0.4), 0.1, 0.0]


def test_a_judge_without_a_model_rewards_the_branches_evenly_and_only_the_latest(engine):
    builder = StateGraph(State)

    def said(state):
        return {"log": [model.invoke(state["q"]).text]}

    def judge(state):
        emit_reward(1.0)
        return {}

    for name in ("first", "left", "right"):
        builder.add_node(name, said)
    builder.add_node("judge", judge)
    builder.add_node("last", lambda state: {"b": model.invoke(state["log"][-1]).text})
    builder.add_edge(START, "first")
    builder.add_edge("first", "left")
    builder.add_edge("first", "right")
    builder.add_node("left2", lambda state: {"log": [model.invoke(str(state["log"])).text]})
    builder.add_edge("left", "left2")
    builder.add_edge(["left2", "right"], "judge")
    builder.add_edge("judge", "last")
    (episode,) = play(builder.compile(), engine)
    # left2 read the log, which right had also written: it alone is the latest.
    assert dict(rewards(episode)) == {"first": 0, "left": 0, "right": 0, "left2": 1.0, "last": 0}


def test_parallel_feeders_share_evenly(engine):
    builder = StateGraph(State)
    builder.add_node("voter", lambda state: {"log": [model.invoke(state["q"]).text]})
    builder.add_node("count", lambda state: emit_reward(1.0))
    builder.add_conditional_edges(START, lambda state: [Send("voter", state)] * 4, ["voter"])
    builder.add_edge("voter", "count")
    (episode,) = play(builder.compile(), engine)
    assert rewards(episode) == [("voter", 0.25)] * 4


def test_a_branch_gets_nothing_of_what_its_neighbour_s_environment_emits(engine):
    builder = StateGraph(TypedDict("Two", {"q": str, "a": str, "b": str}))
    builder.add_node("left", lambda state: {"a": model.invoke(state["q"]).text})
    builder.add_node("right", lambda state: {"b": model.invoke(state["q"]).text})

    class Given(TypedDict):
        a: str

    def environment(state: Given):
        emit_reward(1.0)

    builder.add_node("environment", environment)
    builder.add_edge(START, "left")
    builder.add_edge(START, "right")
    builder.add_edge("left", "environment")
    (episode,) = play(builder.compile(), engine)
    assert dict(rewards(episode)) == {"left": 1.0, "right": 0.0}


def test_what_no_call_can_have_caused_is_the_team_s(engine):
    def environment(state):
        emit_reward(0.5)
        return {"log": ["start"]}

    graph = chain(("environment", environment), ("actor", ask))
    (episode,) = play(graph, engine, reward=lambda example, state: 1.0)
    assert rewards(episode) == [("actor", 0.0)]
    assert episode.outcome_reward == 1.5


# What does not count


def test_a_failed_attempt_s_rewards_do_not_count(engine):
    attempts = []

    def actor(state):
        answer = ask(state)
        attempts.append(1)
        emit_reward(1.0 if len(attempts) < 3 else 0.25)
        if len(attempts) < 3:
            raise ConnectionError("flaky")
        return answer

    retry = RetryPolicy(initial_interval=0.001, jitter=False, max_attempts=3)
    (episode,) = play(chain(("actor", actor), retry_policy=retry), engine)
    assert len(attempts) == 3
    assert rewards(episode) == [("actor", 0.25)]


def test_a_retried_environment_s_rewards_count_once(engine):
    attempts = []

    def environment(state):
        attempts.append(1)
        emit_reward(1.0)
        if len(attempts) == 1:
            raise ConnectionError("flaky")
        return {"log": ["done"]}

    retry = RetryPolicy(initial_interval=0.001, jitter=False)
    graph = chain(("actor", ask), ("environment", environment), retry_policy=retry)
    (episode,) = play(graph, engine)
    assert rewards(episode) == [("actor", 1.0)]


def test_a_failed_episode_has_no_rewards(engine):
    def actor(state):
        answer = ask(state)
        emit_reward(1.0)
        raise ValueError(answer)

    (episode,) = play(chain(("actor", actor)), engine)
    assert not episode.ok
    assert episode.total_reward == 0.0


def test_outside_a_run_it_does_nothing(engine):
    def actor(state):
        emit_reward(0.2)
        return {"a": "x"}

    emit_reward(0.2)
    assert chain(("actor", actor)).invoke({"q": "1"})["a"] == "x"


# Concurrency


def test_concurrent_episodes_never_mix(engine):
    def reasoner(state):
        answer = ask(state)
        emit_reward(float(state["q"]))
        return answer

    async def actor(state):
        answer = {"b": (await model.ainvoke(state["a"])).text}
        await asyncio.sleep(0.001 * (int(state["q"]) % 3))
        emit_reward(1000 + float(state["q"]))
        return answer

    graph = chain(("reasoner", reasoner), ("actor", actor))
    for episode in play(graph, engine, 40, group_size=2):
        number = float(episode.example["q"])
        assert rewards(episode) == [("reasoner", number), ("actor", 1000 + number)]


def test_parallel_tasks_of_one_node_keep_their_own_rewards(engine):
    def voter(state):
        answer = {"log": [model.invoke(state["q"]).text]}
        emit_reward(float(state["q"]))
        return answer

    builder = StateGraph(State)
    builder.add_node("voter", voter)
    builder.add_conditional_edges(
        START, lambda state: [Send("voter", {"q": str(i)}) for i in range(5)], ["voter"]
    )
    (episode,) = play(builder.compile(), engine)
    asked = [float(call.messages[0]["content"]) for call in episode.calls]
    assert sorted(asked) == [0, 1, 2, 3, 4]
    assert [call.reward for call in episode.calls] == asked


# Bad amounts


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "0.2", [1.0], 10**400])
def test_an_amount_that_is_no_number_stops_the_run_with_the_node(bad, engine):
    def actor(state):
        try:
            emit_reward(bad)
        except Exception:  # noqa: BLE001 - as careless apps do
            return ask(state)
        raise AssertionError("it was accepted")

    with pytest.raises(RewardError) as caught:
        play(chain(("actor", actor)), engine)
    message = str(caught.value)
    assert message.startswith("node 'actor' emitted ")
    assert "one finite number" in message
    assert "'q': '0'" in message


# Where the rewards end up


def test_it_adds_to_what_the_reward_function_gives_the_node(engine):
    def actor(state):
        answer = ask(state)
        emit_reward(0.5)
        return answer

    (episode,) = play(
        chain(("actor", actor)),
        engine,
        reward=lambda example, state: Reward(outcome=1.0, nodes={"actor": 0.25}),
    )
    assert rewards(episode) == [("actor", 0.75)]
    assert episode.node_rewards == {"actor": 0.25}
    assert episode.total_reward == 1.75


def test_it_reaches_the_traces_and_the_advantages(engine, tmp_path):
    def actor(state):
        answer = {"b": model.invoke(state["a"]).text}
        emit_reward(0.5)
        return answer

    (episode,) = play(chain(("reasoner", ask), ("actor", actor), ("after", ask)), engine)
    (read,) = read_traces(write_traces(tmp_path / "t.parquet", [episode], 1, "train"))
    assert [call.reward for call in read.calls] == [0.0, 0.5, 0.0]
    own = [call.reward for call in episode.calls]
    parents = [call.parents for call in episode.calls]
    advantages, _ = dag_gae(own, [0.0] * 3, parents, 0.0, gamma=1.0, lam=1.0)
    # Whoever came before the reward is praised for it; `after` read only the question.
    assert [float(value) for value in advantages] == [0.5, 0.5, 0.0]


# The rule itself


def ancestors(index, parents):
    found, open_ = set(), list(parents[index])
    while open_:
        parent = open_.pop()
        if parent not in found:
            found.add(parent)
            open_ += parents[parent]
    return found


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 8))
    parents = [draw(st.sets(st.integers(0, i - 1))) if i else set() for i in range(count)]
    chosen = draw(st.sets(st.integers(0, count - 1)))
    return [sorted(p) for p in parents], sorted(chosen)


@given(graphs())
def test_the_latest_calls_are_those_without_a_chosen_descendant(drawn):
    parents, chosen = drawn
    expected = [i for i in chosen if not any(i in ancestors(j, parents) for j in chosen)]
    assert latest(chosen, parents) == expected


@given(graphs(), st.lists(st.floats(-1e6, 1e6), max_size=5))
def test_the_total_is_what_was_emitted(drawn, amounts):
    parents, fed = drawn
    emitted = [Emitted("tool:1f", amount) for amount in amounts]
    given_out, rest = shares(
        emitted, [f"n:{i}" for i in range(len(parents))], parents, {"tool:1f": fed}
    )
    assert math.fsum([*given_out, rest]) == pytest.approx(math.fsum(amounts), abs=1e-6)


def test_a_command_from_a_tool_s_node_keeps_its_reward(engine):
    def hand_over(state):
        emit_reward(0.5)
        return Command(goto="after")

    builder = StateGraph(State)
    builder.add_node("actor", ask)
    builder.add_node("hand_over", hand_over, destinations=("after",))
    builder.add_node("after", ask)
    builder.add_edge(START, "actor")
    builder.add_edge("actor", "hand_over")
    (episode,) = play(builder.compile(), engine)
    assert rewards(episode) == [("actor", 0.5), ("after", 0.0)]
