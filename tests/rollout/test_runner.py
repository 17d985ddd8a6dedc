"""Many episodes at once: order, seeds, failures, deadlines, rewards."""

import asyncio
import dataclasses
import operator
import threading
import time
from typing import Annotated

import pandas as pd
import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import interrupt
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.episode import Reward
from marft_graph.errors import (
    ConfigError,
    DatasetError,
    EngineError,
    GraphError,
    RewardError,
    UnknownNodeError,
)
from marft_graph.rollout.cancellation import Cancellation
from marft_graph.rollout.runner import run_episodes

model = FakeListChatModel(responses=["own"])


class State(TypedDict, total=False):
    q: str
    a: str
    b: str


def duo(first=None, second=None, **settings):
    builder = StateGraph(State)
    builder.add_node("reasoner", first or (lambda state: {"a": model.invoke(state["q"]).text}))
    builder.add_node("actor", second or (lambda state: {"b": model.invoke(state["a"]).text}))
    builder.add_edge(START, "reasoner")
    builder.add_edge("reasoner", "actor")
    return builder.compile(**settings)


@pytest.fixture
def engine():
    made = FakeEngine(lambda agent, messages: f"{agent}({messages[-1].text})")
    yield made
    made.close()


def examples(count):
    return [{"q": str(number), "answer": number} for number in range(count)]


def test_episodes_come_example_by_example_and_hold_what_was_said(engine):
    episodes = run_episodes(duo(), examples(3), engine=engine, group_size=2)
    assert [episode.example["answer"] for episode in episodes] == [0, 0, 1, 1, 2, 2]
    assert [episode.example_index for episode in episodes] == [0, 0, 1, 1, 2, 2]
    assert len({episode.seed for episode in episodes}) == 6
    call = episodes[2].calls[1]
    assert bytes(call.completion_ids[:-1]) == b"actor(reasoner(1))"
    assert call.messages == (
        {"role": "user", "content": "reasoner(1)"},
        {"role": "assistant", "content": "actor(reasoner(1))"},
    )
    assert (call.agent, call.node, call.index, call.parents) == ("actor", "actor", 1, (0,))
    assert len(call.logprobs) == len(call.completion_ids)
    assert episodes[2].state == {"q": "1", "a": "reasoner(1)", "b": "actor(reasoner(1))"}


def test_the_same_seed_asks_the_engine_the_same(engine):
    def asked(seed):
        before = len(engine.requests)
        run_episodes(duo(), examples(20), engine=engine, group_size=3, seed=seed)
        return [(r.agent, r.prompt_ids, r.seed, r.order) for r in engine.requests[before:]]

    first, again, other = asked(1), asked(1), asked(2)
    assert first == again  # in the same order, hence in the same batches
    assert len(first) == 120
    assert {seed for _, _, seed, _ in first}.isdisjoint({seed for _, _, seed, _ in other})


def test_async_and_sync_nodes_mix(engine):
    async def actor(state):
        return {"b": (await model.ainvoke(state["a"])).text}

    episodes = run_episodes(duo(second=actor), examples(30), engine=engine, concurrency=7)
    assert all(episode.ok and len(episode.calls) == 2 for episode in episodes)


def test_no_more_episodes_run_at_once_than_asked(engine):
    running, peak = [], []

    async def node(state):
        running.append(1)
        peak.append(len(running))
        await model.ainvoke("x")
        running.pop()
        return {"a": "x"}

    run_episodes(duo(first=node), examples(20), engine=engine, concurrency=4)
    assert max(peak) == 4


def test_a_node_that_raises_fails_its_episode_alone(engine):
    def actor(state):
        if "1" in state["a"]:
            raise ValueError("no parser for this")
        return {"b": model.invoke(state["a"]).text}

    episodes = run_episodes(duo(second=actor), examples(3), engine=engine, reward=lambda e, s: 1.0)
    assert [episode.status for episode in episodes] == ["ok", "failed: ValueError in actor", "ok"]
    failed = episodes[1]
    assert failed.error == "ValueError in node 'actor': no parser for this"
    assert failed.state is None
    assert failed.outcome_reward == 0.0
    assert [call.node for call in failed.calls] == ["reasoner"]


@pytest.mark.parametrize("kind", ["sync tool", "async tool", "engine", "stubborn"])
def test_an_episode_past_its_deadline_fails_and_leaves_nothing_waiting(kind):
    released = threading.Event()

    async def forever(state):
        await asyncio.sleep(60)

    async def stubborn(state):
        while not released.is_set():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(0.01)
                raise

    bodies = {
        "sync tool": lambda state: released.wait(60),
        "async tool": forever,
        "stubborn": stubborn,
        "engine": None,
    }
    slow = FakeEngine("x", delay=60 if kind == "engine" else 0)
    started = time.monotonic()
    (episode,) = run_episodes(
        duo(second=bodies[kind]), examples(1), engine=slow, episode_timeout=0.3
    )
    released.set()
    slow.close()
    assert episode.status == "failed: timeout"
    assert "0.3 seconds" in episode.error
    assert time.monotonic() - started < 5


def test_a_prompt_longer_than_the_context_names_node_and_lengths():
    engine = FakeEngine("x", context_length=20)
    graph = duo(first=lambda state: {"a": model.invoke("much too long " * 10).text})
    (episode,) = run_episodes(graph, examples(1), engine=engine)
    engine.close()
    assert episode.status == "failed: PromptTooLongError in reasoner"
    assert "node 'reasoner' has a prompt of 152 tokens" in episode.error
    assert "20 tokens" in episode.error


def test_a_failed_engine_fails_the_episode_even_where_the_app_catches_everything():
    def reasoner(state):
        try:
            return {"a": model.invoke("hi").text}
        except Exception:  # noqa: BLE001 - as careless apps do
            return {"a": "sorry"}

    engine = FakeEngine(lambda agent, messages: EngineError("the engine died"))
    (episode,) = run_episodes(duo(first=reasoner), examples(1), engine=engine)
    engine.close()
    assert episode.status.startswith("failed: EngineError")


def test_an_app_that_waits_for_a_person_fails_with_that_reason(engine):
    def actor(state):
        return {"b": interrupt("ok?")}

    graph = duo(second=actor, checkpointer=InMemorySaver())
    (episode,) = run_episodes(graph, examples(1), engine=engine)
    assert episode.status == "failed: interrupt"


def test_the_app_s_own_checkpointer_sees_nothing_of_a_rollout(engine):
    saver = InMemorySaver()
    episodes = run_episodes(duo(checkpointer=saver), examples(2), engine=engine)
    assert all(episode.ok for episode in episodes)
    assert list(saver.list(None)) == []


# Inputs


def test_an_empty_data_set_is_refused(engine):
    with pytest.raises(DatasetError, match="at least one example"):
        run_episodes(duo(), [], engine=engine)


def test_examples_without_the_graph_s_keys_are_refused_with_a_close_match(engine):
    with pytest.raises(DatasetError) as caught:
        run_episodes(duo_asking_for_question(), [{"questions": "1+1"}], engine=engine)
    message = str(caught.value)
    assert "'questions'" in message
    assert "'question'" in message
    assert "looks like" in message
    assert "inputs=" in message


def duo_asking_for_question():
    builder = StateGraph(
        TypedDict("Whole", {"question": str, "answer": str}),
        input_schema=TypedDict("Given", {"question": str}),
    )
    builder.add_node("actor", lambda state: {"answer": model.invoke(state["question"]).text})
    builder.add_edge(START, "actor")
    return builder.compile()


@pytest.mark.parametrize("bad", ["text", 3, None, ["q"]])
def test_an_example_among_others_that_is_no_mapping_is_refused(bad, engine):
    with pytest.raises(DatasetError, match=f"an example is .*{type(bad).__name__}; each must be"):
        run_episodes(duo(), [{"q": "1"}, bad], engine=engine)


def test_keys_that_are_no_text_are_refused_like_others(engine):
    with pytest.raises(DatasetError, match="an example has the keys 1; the graph's input has"):
        run_episodes(duo(), [{1: "x"}], engine=engine)


def test_what_langgraph_does_not_demand_is_not_demanded(engine):
    builder = StateGraph(
        TypedDict("Whole", {"q": str, "context": str, "a": str}),
        input_schema=TypedDict("Given", {"q": str, "context": str}),
    )
    builder.add_node("actor", lambda state: {"a": "x"})
    builder.add_edge(START, "actor")
    (episode,) = run_episodes(builder.compile(), [{"q": "1"}], engine=engine)
    assert episode.state == {"q": "1", "a": "x"}


def test_a_table_has_its_rows_as_examples(engine):
    rows = [{"q": "a"}, {"q": "b"}]
    episodes = run_episodes(duo(), pd.DataFrame(rows), engine=engine)
    assert [episode.example for episode in episodes] == rows


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("concurrency", 0), ("reward_concurrency", 0), ("group_size", 0), ("max_new_tokens", 0)),
        *(("episode_timeout", 0), ("call_timeout", -1), ("reward_timeout", float("nan"))),
        *(("temperature", -0.5), ("temperature", float("nan")), ("reward_errors", "skip")),
    ],
)
def test_a_limit_that_is_none_is_refused_before_anything_runs(engine, name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*{value}.*it must be"):
        run_episodes(duo(), examples(1), engine=engine, **{name: value})


def test_inputs_may_be_made_from_an_example(engine):
    (episode,) = run_episodes(
        duo(), [{"text": "seven"}], engine=engine, inputs=lambda example: {"q": example["text"]}
    )
    assert episode.state["a"] == "reasoner(seven)"


def test_inputs_that_raise_name_the_example(engine):
    with pytest.raises(DatasetError, match=r"KeyError.*'text': 'seven'"):
        run_episodes(duo(), [{"text": "seven"}], engine=engine, inputs=lambda e: e["missing"])


def test_a_builder_that_does_not_compile_is_refused(engine):
    with pytest.raises(GraphError, match="must have an entrypoint"):
        run_episodes(StateGraph(State), examples(1), engine=engine)


def test_an_unknown_node_is_refused(engine):
    pytest.importorskip("marft_graph.graph.flex_mg")
    with pytest.raises(UnknownNodeError, match="reasoner"):
        run_episodes(duo(), examples(1), engine=engine, nodes=["reasonr"])


# Rewards


def test_an_outcome_is_the_team_s(engine):
    async def reward(example, state):
        await asyncio.sleep(0)
        return example["answer"] + 0.5

    episodes = run_episodes(duo(), examples(2), engine=engine, reward=reward)
    assert [episode.outcome_reward for episode in episodes] == [0.5, 1.5]
    assert all(call.reward == 0.0 for episode in episodes for call in episode.calls)


def test_a_node_s_own_reward_goes_to_its_last_call(engine):
    class Turns(TypedDict, total=False):
        q: str
        turns: Annotated[list[str], operator.add]

    builder = StateGraph(Turns)
    builder.add_node("writer", lambda state: {"turns": [model.invoke(state["q"]).text]})
    builder.add_edge(START, "writer")
    builder.add_conditional_edges(
        "writer", lambda state: "writer" if len(state["turns"]) < 3 else "__end__"
    )
    (episode,) = run_episodes(
        builder.compile(),
        examples(1),
        engine=engine,
        reward=lambda example, state: Reward(outcome=2.0, nodes={"writer": 0.25}),
    )
    assert [call.reward for call in episode.calls] == [0.0, 0.0, 0.25]
    assert episode.outcome_reward == 2.0
    assert episode.node_rewards == {"writer": 0.25}
    assert episode.total_reward == 2.25


def test_a_reward_for_an_unknown_node_names_the_nodes(engine):
    with pytest.raises(RewardError, match=r"'actr'.*'actor', 'reasoner'"):
        run_episodes(duo(), examples(1), engine=engine, reward=lambda e, s: {"actr": 1.0})


def test_a_reward_that_raises_stops_the_run_with_the_example(engine):
    def reward(example, state):
        return 1 / example["answer"]

    with pytest.raises(RewardError) as caught:
        run_episodes(duo(), examples(3), engine=engine, reward=reward)
    assert "ZeroDivisionError: division by zero" in str(caught.value)
    assert "'answer': 0" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "bad",
    [
        *(None, "1.0", b"1", [], [1.0], object(), 1j, 10**400, Reward),
        *(float("nan"), float("inf"), -float("inf")),
        *({"actor": None}, {"actor": float("nan")}, {"actor": "1"}),
    ],
)
def test_a_reward_that_is_no_number_is_refused(bad, engine):
    with pytest.raises(RewardError, match="finite number"):
        run_episodes(duo(), examples(1), engine=engine, reward=lambda e, s: bad)


@pytest.mark.parametrize(
    "bad",
    [
        *({"outcome": None}, {"outcome": "1"}, {"outcome": 10**400}, {"parts": {"a": "b"}}),
        *({"nodes": {"actor": float("inf")}}, {"nodes": None}, {"nodes": [1]}, {"parts": 3}),
    ],
)
def test_a_reward_object_that_holds_no_numbers_stops_the_run_with_the_example(bad, engine):
    with pytest.raises(RewardError, match=r"the reward function raised .* on example {'q': '0'"):
        run_episodes(duo(), examples(1), engine=engine, reward=lambda e, s: Reward(**bad))


def test_a_reward_that_hangs_stops_the_run(engine):
    released = threading.Event()
    with pytest.raises(RewardError, match=r"longer than 0\.1 seconds"):
        run_episodes(
            duo(),
            examples(1),
            engine=engine,
            reward=lambda e, s: released.wait(60),
            reward_timeout=0.1,
        )
    released.set()


@pytest.mark.parametrize("is_late", [False, True], ids=["before", "meanwhile"])
def test_another_thread_may_cancel_a_rollout(engine, is_late):
    cancellation = Cancellation()
    begun = threading.Event()

    async def hangs(state):
        begun.set()
        await asyncio.sleep(60)

    def cancel():
        assert not is_late or begun.wait(30)
        cancellation.ask()

    thread = threading.Thread(target=cancel)
    thread.start()
    if not is_late:
        thread.join()
    started = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        run_episodes(duo(second=hangs), [{"q": "1"}], engine=engine, cancellation=cancellation)
    thread.join()
    assert time.monotonic() - started < 30
    assert begun.is_set() is is_late


def test_each_episode_is_reported_as_it_ends(engine):
    seen = []
    run_episodes(duo(), examples(3), engine=engine, on_episode=seen.append)
    assert sorted(episode.example_index for episode in seen) == [0, 1, 2]


@pytest.mark.parametrize("name", ["OutputParserException", "ValueError"])
def test_an_exception_that_is_the_policy_s_own_fault_earns_what_was_set(engine, name):
    def actor(state):
        raise OutputParserException("no JSON") if "1" in state["a"] else OSError("disk")

    asked = []
    episodes = run_episodes(
        duo(second=actor),
        examples(3),
        engine=engine,
        reward=lambda example, state: asked.append(example) or 1.0,
        fault_rewards={name: -0.5},
    )
    failed = "failed: OSError in actor"
    assert [e.status for e in episodes] == [failed, "ok", failed]
    assert episodes[1].total_reward == -0.5
    assert "no JSON" in episodes[1].error
    assert [call.node for call in episodes[1].calls] == ["reasoner"]
    assert asked == []  # there is no final state that a reward function could look at


def test_a_reward_that_fails_may_drop_its_episode_instead_of_stopping_the_run(engine):
    def reward(example, state):
        return {"0": 1.0, "1": None, "2": 1 / 0 if example["q"] == "2" else 0}[example["q"]]

    episodes = run_episodes(duo(), examples(3), engine=engine, reward=reward, reward_errors="drop")
    assert [e.status for e in episodes] == [
        "ok",
        "failed: RewardError",
        "failed: RewardError: ZeroDivisionError",
    ]
    assert "'q': '1'" in episodes[1].error
    assert [e.total_reward for e in episodes] == [1.0, 0.0, 0.0]
    assert [e.state is None for e in episodes] == [False, True, True]


def test_an_empty_answer_is_an_answer_but_no_token_at_all_is_a_failure():
    engine = FakeEngine("")
    (episode,) = run_episodes(duo(), examples(1), engine=engine)
    assert episode.ok
    assert [call.completion_ids for call in episode.calls] == [(256,), (256,)]
    engine.close()

    class Silent(FakeEngine):
        def _completion(self, answer, request):
            return dataclasses.replace(super()._completion(answer, request), ids=(), logprobs=())

    engine = Silent("")
    (episode,) = run_episodes(duo(), examples(1), engine=engine)
    engine.close()
    assert episode.status == "failed: EngineError in reasoner"
    assert "node 'reasoner' with no token at all" in episode.error
