"""When the gate opens: batches hold all the calls that can come before an answer."""

import threading
import time

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel, GenericFakeChatModel
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.rollout.quiescence import Quiescence
from marft_graph.rollout.runner import run_episodes

model = FakeListChatModel(responses=["own"])


class RoundsEngine(FakeEngine):
    """Remembers which requests were answered together."""

    def __init__(self):
        super().__init__("x")
        self.rounds = []

    def _due(self):
        due = super()._due()
        self.rounds.append(len(due))
        return due


def app(*bodies):
    builder = StateGraph(TypedDict("S", {"q": str, **{f"k{i}": str for i in range(len(bodies))}}))
    before = START
    for position, body in enumerate(bodies):
        name = f"node{position}"
        builder.add_node(name, lambda state, body=body, key=f"k{position}": {key: body(state)})
        builder.add_edge(before, name)
        before = name
    return builder.compile()


def rounds(graph, count=24, **settings):
    engine = RoundsEngine()
    episodes = run_episodes(graph, [{"q": "1"}] * count, engine=engine, **settings)
    engine.close()
    assert all(episode.ok for episode in episodes), episodes[0].error
    return engine.rounds


def ask(state):
    return model.invoke("hi").text


def ask_after_work(state):
    sum(n * n for n in range(20_000))  # user code keeps a processor busy before it calls
    return model.invoke("hi").text


def ask_in_a_batch(state):
    return str(GenericFakeChatModel(messages=iter([])).batch(["x", "y"]))


@pytest.mark.parametrize(("body", "calls"), [(ask, 24), (ask_after_work, 24)])
def test_all_synchronous_nodes_are_answered_in_one_round(body, calls):
    assert rounds(app(body, body)) == [calls, calls]


def test_threads_that_the_app_makes_itself_are_answered_in_few_rounds():
    # they can only be waited for by the clock, so a crowded machine may split a round
    answered = rounds(app(ask_in_a_batch, ask_in_a_batch), count=6)
    assert sum(answered) == 24
    assert len(answered) <= 8


def test_all_asynchronous_nodes_are_answered_in_one_round():
    async def body(state):
        return {"out": (await model.ainvoke("hi")).text}

    builder = StateGraph(TypedDict("S", {"q": str, "out": str}))
    builder.add_node("one", body)
    builder.add_node("two", body)
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    assert rounds(builder.compile(), count=100) == [100, 100]


def test_a_synchronous_call_on_the_event_loop_is_answered():
    async def body(state):
        return {"out": model.invoke("hi").text}

    builder = StateGraph(TypedDict("S", {"q": str, "out": str}))
    builder.add_node("one", body)
    builder.add_edge(START, "one")
    assert sum(rounds(builder.compile(), count=5)) == 5


def test_a_blocking_tool_delays_the_others_only_by_the_patience():
    slow_enough = threading.Event()
    waited = []

    def body(state):
        if state["q"] == "slow":
            slow_enough.wait(10)
            return "slow"
        started = time.monotonic()
        answer = "".join(model.invoke(f"{turn}").text for turn in range(10))
        waited.append(time.monotonic() - started)
        slow_enough.set()
        return answer

    engine = FakeEngine("x")
    episodes = run_episodes(app(body), [{"q": "slow"}, {"q": "fast"}], engine=engine)
    engine.close()
    assert all(episode.ok for episode in episodes)
    assert waited[0] < 5


def test_a_closed_gate_stands_open():
    quiescence = Quiescence(4)
    quiescence.close()
    quiescence.wait()


def test_workers_run_functions_and_hand_their_errors_back():
    quiescence = Quiescence(2)
    futures = [quiescence.workers.submit(divmod, 7, divisor) for divisor in (2, 0)]
    assert futures[0].result(5) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        futures[1].result(5)
    quiescence.close()
    with pytest.raises(RuntimeError):
        quiescence.workers.submit(divmod, 1, 1)


def test_workers_run_no_more_functions_at_once_than_their_limit():
    quiescence = Quiescence(3)
    running, peak, lock = [], [], threading.Lock()

    def work():
        with lock:
            running.append(1)
            peak.append(len(running))
        time.sleep(0.01)
        with lock:
            running.pop()

    futures = [quiescence.workers.submit(work) for _ in range(12)]
    for future in futures:
        future.result(5)
    quiescence.close()
    assert max(peak) == 3
