"""What an episode leaves running asks no model after its end; nor do processes that it starts."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import pytest
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.graph import START, StateGraph

from marft_graph import run_episodes
from marft_graph.engine.fake import FakeEngine
from marft_graph.errors import UndecidedCallError
from marft_graph.rollout.process_loop import process_loop


class Paid(FakeListChatModel):
    """The app's own model, which counts what it is asked."""

    responses: list[str] = ["own"]  # noqa: RUF012 - a field of a pydantic model
    asked: ClassVar[list[str]] = []

    def _call(self, *args: Any, **kwargs: Any) -> str:
        self.asked.append("own")
        return "own"


paid = Paid()
pool = ThreadPoolExecutor(1)


class State(TypedDict, total=False):
    question: str
    answer: str


class Background:
    """Asks a model once it may, and says what came of it."""

    def __init__(self) -> None:
        self.may_ask, self.is_over = threading.Event(), threading.Event()
        self.outcome: Any = None

    def work(self) -> None:
        self.may_ask.wait(10)
        try:
            self.outcome = paid.invoke("sum up").text
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.outcome = type(error).__name__
        self.is_over.set()

    async def awork(self) -> None:
        while not self.may_ask.is_set():
            await asyncio.sleep(0.01)
        try:
            self.outcome = (await paid.ainvoke("sum up")).text
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.outcome = type(error).__name__
        self.is_over.set()


def in_a_thread(background: Background) -> Callable[[State], Any]:
    def node(state: State) -> Any:
        threading.Thread(target=background.work).start()
        return {"answer": paid.invoke("now").text}

    return node


def in_a_pool(background: Background) -> Callable[[State], Any]:
    def node(state: State) -> Any:
        pool.submit(background.work)
        return {"answer": paid.invoke("now").text}

    return node


def hanging(background: Background) -> Callable[[State], Any]:
    def node(state: State) -> Any:
        background.work()
        return {"answer": "late"}

    return node


kept: list[Any] = []


def in_a_task(background: Background) -> Callable[[State], Any]:
    async def node(state: State) -> Any:
        kept.append(asyncio.ensure_future(background.awork()))
        return {"answer": (await paid.ainvoke("now")).text}

    return node


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    Paid.asked.clear()
    fake = FakeEngine("x")
    yield fake
    fake.close()
    kept.clear()


@pytest.mark.usefixtures("untouched_langchain")
@pytest.mark.parametrize("leaves", [in_a_thread, in_a_pool, hanging, in_a_task])
def test_what_an_episode_leaves_running_is_not_answered_by_the_own_model(
    leaves: Callable[[Background], Any], engine: FakeEngine
) -> None:
    original = BaseChatModel.__dict__["_generate_with_cache"]
    background = Background()
    graph = StateGraph(State).add_node("node", leaves(background)).add_edge(START, "node").compile()
    with process_loop():  # as a Trainer does, for as long as it lives
        timeout = 0.3 if leaves is hanging else 30.0
        run_episodes(graph, [{"question": "q"}], engine=engine, episode_timeout=timeout)
        background.may_ask.set()
        assert background.is_over.wait(10)
    assert background.outcome == "EpisodeTimeoutError"
    assert Paid.asked == []
    assert paid.invoke("the user").text == "own"
    kept.clear()
    for _ in range(100):  # until the thread has let go of its context
        gc.collect()
        if BaseChatModel.__dict__["_generate_with_cache"] is original:
            break
        threading.Event().wait(0.02)
    assert BaseChatModel.__dict__["_generate_with_cache"] is original


def ask_in_a_process(question: str) -> str:
    return paid.invoke(question).text


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(
    "MARFT_TEST_CHILD" not in os.environ,
    reason="a process of other tests has threads that no fork survives",
)
def test_a_call_in_a_process_that_a_node_has_forked_is_refused_at_once(engine: FakeEngine) -> None:
    def node(state: State) -> Any:
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as processes:
            return {"answer": processes.submit(ask_in_a_process, state["question"]).result()}

    graph = StateGraph(State).add_node("node", node).add_edge(START, "node").compile()
    with pytest.raises(UndecidedCallError, match=r"'node' asks its model in a process .* threads"):
        run_episodes(graph, [{"question": "q"}], engine=engine)


def test_a_call_in_a_forked_process_is_refused_at_once_seen_in_a_process_of_its_own() -> None:
    name = "test_a_call_in_a_process_that_a_node_has_forked_is_refused_at_once"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n0",
            f"{__file__}::{name}",
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "MARFT_TEST_CHILD": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
