"""A bound app is answered by its adapters wherever it is called, and says who else answers."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.tools import tool
from langgraph.graph import START, StateGraph

from marft_graph import Trainer, bind, run_episodes
from marft_graph.engine.fake import FakeEngine
from tests.training import config

own = FakeListChatModel(responses=["own"])
Question: Any = {"question": "q"}


class State(TypedDict, total=False):
    question: str
    plan: str
    answer: str


def planner(state: State) -> Any:
    return {"plan": own.invoke(state["question"]).text}


def actor(state: State) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return {"answer": pool.submit(own.invoke, state["question"]).result().text}


def team(**nodes: Any) -> Any:
    builder: Any = StateGraph(State)
    before = START
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    return builder.compile()


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a planner and an actor."""
    run = tmp_path_factory.mktemp("bound")
    with Trainer(
        team(planner=planner, actor=actor),
        train_dataset=[Question] * 4,
        reward=lambda example, state: len(state["answer"]) % 3,
        config=config(tiny_model, iterations=0, eval_every=0),
        run_dir=run / "run",
    ) as trainer:
        return trainer.export(run / "export")


@pytest.fixture(scope="module")
def bound(folder: Path) -> Any:
    return bind(team(planner=planner, actor=actor), folder)


@pytest.fixture(scope="module")
def expected(bound: Any) -> str:
    answer: str = bound.invoke(Question)["answer"]
    assert answer != "own"
    return answer


def test_in_a_node_of_another_graph(bound: Any, expected: str) -> None:
    def outer(state: State) -> Any:
        return {"answer": bound.invoke({"question": state["question"]})["answer"]}

    async def later(state: State) -> Any:
        return {"answer": (await bound.ainvoke({"question": state["question"]}))["answer"]}

    def streaming(state: State) -> Any:
        return {"answer": list(bound.stream(Question, stream_mode="values"))[-1]["answer"]}

    assert team(o=outer).invoke(Question)["answer"] == expected
    assert asyncio.run(team(o=later).ainvoke(Question))["answer"] == expected
    assert team(o=streaming).invoke(Question)["answer"] == expected


def test_as_a_subgraph_and_in_a_tool(bound: Any, expected: str) -> None:
    assert team(sub=bound.compiled).invoke(Question)["answer"] == expected
    deeper = team(outer=team(sub=bound.compiled))
    assert deeper.invoke(Question)["answer"] == expected

    @tool
    def ask_team(question: str) -> str:
        """Ask the team."""
        return str(bound.invoke({"question": question})["answer"])

    node = lambda state: {"answer": ask_team.invoke({"question": "q"})}  # noqa: E731
    assert team(tools=node).invoke(Question)["answer"] == expected


def test_a_bound_app_in_a_bound_app(bound: Any, expected: str, folder: Path) -> None:
    def asks_the_other(state: State) -> Any:
        return {"answer": bound.invoke({"question": "q"})["answer"] + state["plan"]}

    outer = bind(team(planner=planner, actor=asks_the_other), folder)
    found = outer.invoke(Question)
    assert found["answer"].startswith(expected)
    assert found["plan"] != "own"


def test_inside_an_episode_its_adapters_answer_before_the_engine(bound: Any, expected: str) -> None:
    def outer(state: State) -> Any:
        return {"plan": bound.invoke({"question": state["question"]})["answer"]}

    engine = FakeEngine("x")
    (episode,) = run_episodes(team(o=outer, actor=actor), [Question], engine=engine)
    engine.close()
    assert episode.state["plan"] == expected
    assert [call.node for call in episode.calls] == ["actor"]


def extra(state: State) -> Any:
    return {"answer": state["answer"] + own.invoke("again").text}


def test_a_node_without_an_adapter_is_warned_of_once(
    folder: Path, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = bind(team(planner=planner, actor=actor, extra=extra), folder)
    assert [app.invoke(Question)["answer"] for _ in range(2)] == [f"{expected}own"] * 2
    (told,) = [record.getMessage() for record in caplog.records if "extra" in record.getMessage()]
    line = extra.__code__.co_firstlineno
    assert f"extra in {__file__}, line {line}; the call is in {__file__}, line {line + 1}" in told
    assert "train again" in told
    assert "new_nodes 'freeze'" in told


def test_who_was_frozen_in_training_is_not_warned_of(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = team(planner=planner, actor=actor)
    with Trainer(
        app,
        train_dataset=[Question] * 4,
        reward=lambda example, state: 0.0,
        config=config(tiny_model, iterations=0, eval_every=0, nodes=("planner",)),
        run_dir=tmp_path / "run",
    ) as trainer:
        export = trainer.export(tmp_path / "export")
    caplog.clear()
    assert bind(app, export).invoke(Question)["answer"] == "own"
    assert caplog.records == []


def test_other_threads_of_the_process_are_left_alone(bound: Any) -> None:
    begun, done = threading.Event(), threading.Event()
    found: list[str] = []

    def unrelated() -> None:
        begun.wait(10)
        found.append(own.invoke("hi").text)
        done.set()

    thread = threading.Thread(target=unrelated)
    thread.start()

    def waits(state: State) -> Any:
        begun.set()
        done.wait(10)
        return {}

    outer = StateGraph(State).add_node("sub", bound.compiled).add_node("waits", waits)
    outer.add_edge(START, "sub").add_edge(START, "waits").compile().invoke(Question)
    thread.join()
    assert found == ["own"]


def test_what_a_node_leaves_running_goes_on_after_the_run(folder: Path) -> None:
    may_go_on = threading.Event()
    found: list[str] = []

    def remember() -> None:
        may_go_on.wait(10)
        found.append(own.invoke("sum up").text)

    threads: list[threading.Thread] = []

    def leaves(state: State) -> Any:
        threads.append(threading.Thread(target=remember))
        threads[0].start()
        return {"answer": "a"}

    bind(team(planner=planner, actor=leaves), folder).invoke(Question)
    may_go_on.set()
    threads[0].join()
    assert found == ["own"]
