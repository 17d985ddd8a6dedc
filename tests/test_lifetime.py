"""What an app and a reward keep outlives each iteration: a trainer, a comparison, a bound app."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from marft_graph import Trainer, bind
from marft_graph.comparison import compare
from tests.training import EXAMPLES, config, reward


class State(TypedDict, total=False):
    question: str
    answer: str


def app_with_a_lock() -> Any:
    model = FakeListChatModel(responses=["own"])
    lock = asyncio.Lock()

    async def writer(state: State) -> Any:
        async with lock:
            await asyncio.sleep(0)
            return {"answer": (await model.ainvoke(state["question"])).text}

    return StateGraph(State).add_node("writer", writer).add_edge(START, "writer").compile()


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_judge_with_a_semaphore_serves_all_iterations_and_a_comparison(
    make: Callable[..., Trainer], tiny_model: Path, staleness: int
) -> None:
    places = asyncio.Semaphore(1)
    loops = set()

    async def judge(example: Any, state: Any) -> float:
        loops.add(asyncio.get_running_loop())
        async with places:
            await asyncio.sleep(0)
        return reward(example, state)

    settings = config(tiny_model, iterations=3, staleness=staleness)
    graph = app_with_a_lock()
    with make(graph, reward=judge, config=settings) as trainer:
        result = trainer.train(progress=False)
    assert result.iterations == 3
    policies = {"before": "base", "after": str(result.export), "app": "own"}
    compare(graph, policies, EXAMPLES[:3], reward=judge, config=settings)
    assert len(loops) == 1


def test_a_hung_synchronous_reward_is_given_up_in_training_and_in_a_comparison(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    released = threading.Event()

    def hangs_once_in_four(example: Any, state: Any) -> float:
        if example["answer"] in "048":
            released.wait(60)
        return reward(example, state)

    settings = config(
        tiny_model,
        reward_timeout=0.3,
        reward_errors="drop",
        max_failed_share=0.9,
        staleness=1,
    )
    try:
        with make(reward=hangs_once_in_four, config=settings) as trainer:
            assert trainer.train(progress=False).iterations == 2
        found = compare(
            trainer.graph,
            {"base": "base"},
            EXAMPLES[:4],
            reward=hangs_once_in_four,
            config=settings,
        )
    finally:
        released.set()
    assert found.policies[0].evaluation.episodes_failed == 1


def test_a_bound_app_answers_in_several_threads_and_event_loops(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    model = FakeListChatModel(responses=["own"])

    async def writer(state: State) -> Any:
        return {"answer": (await model.ainvoke(state["question"])).text}

    def sync_writer(state: State) -> Any:
        return {"answer": model.invoke(state["question"]).text}

    builder = StateGraph(State).add_edge(START, "writer")
    graph = builder.add_node("writer", sync_writer).compile()
    with make(graph, config=config(tiny_model, iterations=1, eval_every=0)) as trainer:
        export = trainer.export(trainer.run_dir / "export")
    bound = bind(graph, export, device="cpu", temperature=0.0)
    asynchronous = StateGraph(State).add_node("writer", writer).add_edge(START, "writer").compile()
    async_bound = bind(asynchronous, export, device="cpu", temperature=0.0)
    question = {"question": "qq"}
    with ThreadPoolExecutor(3) as pool:
        synchronous = [*pool.map(lambda _: bound.invoke(question), range(3))]
        in_loops = [*pool.map(lambda _: asyncio.run(async_bound.ainvoke(question)), range(3))]
    answers = {state["answer"] for state in (*synchronous, *in_loops)}
    assert len(answers) == 1
    assert answers != {"own"}
