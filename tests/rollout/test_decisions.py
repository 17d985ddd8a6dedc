"""No call goes to the app's own model unless somebody decided so."""

from __future__ import annotations

import gc
import importlib
import inspect
import socket
import threading
import time
from collections.abc import Iterator
from queue import Queue
from typing import Any, TypedDict

import pytest
from langchain_core.language_models.fake import FakeListLLM
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

from marft_graph import compile_graph, run_episodes
from marft_graph.engine.fake import FakeEngine
from marft_graph.errors import UndecidedCallError
from marft_graph.rollout import dry_run

openai = ChatOpenAI(model="gpt-4o", api_key="none", base_url="http://127.0.0.1:9", max_retries=0)
free = FakeListChatModel(responses=["own"])
plain = FakeListLLM(responses=["own"])
Questions: Any = [{"question": "q"}]


class Own(FakeListChatModel):
    """A class that overrides the methods that ask, as some providers' do."""

    responses: list[str] = ["own"]  # noqa: RUF012 - a field of a pydantic model

    def _generate_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("past the base class"))])

    async def _agenerate_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        return self._generate_with_cache()


class Polite(FakeListChatModel):
    """A class that adds to what it is asked."""

    responses: list[str] = ["own"]  # noqa: RUF012 - a field of a pydantic model

    def invoke(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        return super().invoke(f"Please: {input}", *args, **kwargs)


overriding = Own()
polite = Polite()


class State(TypedDict, total=False):
    question: str
    plan: str
    answer: str


def unread(name: str) -> Any:
    """A model of this module, in a way that no reading of code finds."""
    return getattr(importlib.import_module(".".join(("tests", "rollout", "test_decisions"))), name)


def shown(state: State) -> Any:
    return {"plan": openai.invoke(state["question"]).text}


def missed(state: State) -> Any:
    return {"answer": unread("openai").invoke(state["plan"]).text}


async def missed_too(state: State) -> Any:
    return {"answer": (await unread("openai").ainvoke(state["plan"])).text}


async def missed_in_batches(state: State) -> Any:
    return {"answer": (await unread("openai").abatch([state["plan"]]))[0].text}


async def missed_in_a_stream(state: State) -> Any:
    return {"answer": "".join([c.text async for c in unread("openai").astream(state["plan"])])}


def missed_in_a_chain(state: State) -> Any:
    chain = RunnableLambda(lambda plan: plan) | unread("openai")
    return {"answer": chain.invoke(state["plan"]).text}


def frugal(state: State) -> Any:
    return {"answer": unread("free").invoke(state["plan"]).text}


def completing(state: State) -> Any:
    return {"answer": unread("plain").invoke(state["plan"])}


def app(last: Any) -> Any:
    graph = StateGraph(State).add_node("shown", shown).add_node("last", last)
    return graph.add_edge(START, "shown").add_edge("shown", "last").compile()


def overridden(state: State) -> Any:
    return {"answer": unread("overriding").invoke(state["plan"]).text}


async def overridden_too(state: State) -> Any:
    return {"answer": (await unread("overriding").ainvoke(state["plan"])).text}


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    fake = FakeEngine("x")
    yield fake
    fake.close()


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses that anything tries to connect to; nothing gets out."""
    tried: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("a socket guard is in place")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    return tried


@pytest.mark.parametrize(
    "node", [missed, missed_too, missed_in_batches, missed_in_a_stream, missed_in_a_chain]
)
def test_a_missed_node_stops_the_run_before_the_first_byte(
    node: Any, engine: FakeEngine, connections: list[Any]
) -> None:
    with pytest.raises(UndecidedCallError) as raised:
        run_episodes(app(node), Questions, engine=engine, nodes=["shown"])
    message, line = str(raised.value), inspect.getsourcelines(node)[1]
    assert connections == []
    assert "node 'last' asks its own model (ChatOpenAI)" in message
    assert f"{node.__name__} in {__file__}, line {line}" in message
    assert any(f"the call is in {__file__}, line {line + n}." in message for n in (1, 2)), message
    assert "name 'last' in `nodes`" in message
    assert "new_nodes to 'freeze'" in message
    assert raised.value.agent == "last"


def test_what_an_app_catches_stops_the_run_all_the_same(engine: FakeEngine) -> None:
    def forgiving(state: State) -> Any:
        try:
            return missed(state)
        except Exception:  # noqa: BLE001 - as apps do
            return {"answer": "sorry"}

    with pytest.raises(UndecidedCallError, match="last"):
        run_episodes(app(forgiving), Questions, engine=engine, nodes=["shown"])


def test_agents_that_the_code_shows_are_frozen_where_others_are_named(engine: FakeEngine) -> None:
    def seen(state: State) -> Any:
        return {"answer": free.invoke(state["plan"]).text}

    graph = app(seen)
    assert compile_graph(graph).agents == ("shown", "last")
    (episode,) = run_episodes(graph, Questions, engine=engine, nodes=["shown"])
    assert episode.state["answer"] == "own"
    assert [node for node, _ in episode.set_aside] == ["last"]


def test_a_node_is_frozen_where_it_is_named_so(engine: FakeEngine) -> None:
    (episode,) = run_episodes(
        app(frugal), Questions, engine=engine, nodes=["shown"], frozen=["last"]
    )
    assert episode.state["answer"] == "own"
    assert [(node, why.value) for node, why in episode.set_aside] == [("last", "own_model")]


def test_new_nodes_are_frozen_and_told_of_once(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    episodes = run_episodes(
        app(frugal), Questions * 3, engine=engine, nodes=["shown"], new_nodes="freeze"
    )
    assert [episode.state["answer"] for episode in episodes] == ["own"] * 3
    assert [why.value for e in episodes for _, why in e.set_aside] == ["undecided"] * 3
    assert len([r for r in caplog.records if "node 'last'" in r.message]) == 1


def test_new_nodes_are_trained(engine: FakeEngine) -> None:
    (episode,) = run_episodes(
        app(missed), Questions, engine=engine, nodes=["shown"], new_nodes="train"
    )
    assert [call.agent for call in episode.calls] == ["shown", "last"]


def test_a_plain_language_model_is_refused_or_frozen(engine: FakeEngine) -> None:
    with pytest.raises(UndecidedCallError, match=r"plain language model.*use its chat model"):
        run_episodes(app(completing), Questions, engine=engine)
    (episode,) = run_episodes(app(completing), Questions, engine=engine, new_nodes="freeze")
    assert episode.state["answer"] == "own"


def test_a_worker_started_before_the_run_asks_nobody(engine: FakeEngine) -> None:
    questions: Queue[Any] = Queue()
    answers: Queue[Any] = Queue()

    def work() -> None:
        for _ in range(2):
            try:
                answers.put(free.invoke(questions.get()).text)
            except Exception as error:  # noqa: BLE001 - handed to who asked
                answers.put(error)

    thread = threading.Thread(target=work)
    thread.start()

    def node(state: State) -> Any:
        questions.put("q")
        found = answers.get()
        if isinstance(found, Exception):
            raise found
        return {"answer": found}

    with pytest.raises(UndecidedCallError, match="started before any episode"):
        run_episodes(app(node), Questions, engine=engine)
    questions.put("q")
    assert answers.get() == "own"  # outside of runs it is left alone
    thread.join()


def test_judges_ask_their_own_models(engine: FakeEngine) -> None:
    def in_a_thread(state: Any) -> str:
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(free.invoke("rate").text))
        thread.start()
        thread.join()
        return found[0]

    async def judge(example: Any, state: Any) -> float:
        texts = [free.invoke("rate").text, (await free.ainvoke("rate")).text, in_a_thread(state)]
        return float(texts == ["own"] * 3)

    def plain_judge(example: Any, state: Any) -> float:
        return float(free.invoke("rate").text == "own") + float(in_a_thread(state) == "own")

    seen: list[str] = []
    reward: Any = [judge, plain_judge]
    (episode,) = run_episodes(
        app(lambda state: {"answer": "a"}),
        Questions,
        engine=engine,
        reward=reward,
        on_episode=lambda episode: seen.append(free.invoke("log").text),
    )
    assert episode.outcome_reward == 3.0
    assert seen == ["own"]


def test_a_dry_run_refuses_what_it_cannot_answer_from_a_script(connections: list[Any]) -> None:
    flex_mg = compile_graph(app(completing), Questions)
    assert flex_mg.agents == ("shown",)
    assert "plain language model" in flex_mg.notes[0]
    assert connections == []


@pytest.mark.usefixtures("untouched_langchain")
@pytest.mark.parametrize("node", [overridden, overridden_too])
def test_a_class_with_methods_of_its_own_is_met(node: Any, engine: FakeEngine) -> None:
    before = Own._generate_with_cache
    (episode,) = run_episodes(app(node), Questions, engine=engine)
    assert episode.state["answer"] == "x"
    with pytest.raises(UndecidedCallError, match="node 'last'"):
        run_episodes(app(node), Questions, engine=engine, nodes=["shown"])
    (episode,) = run_episodes(
        app(node), Questions, engine=engine, nodes=["shown"], new_nodes="freeze"
    )
    assert episode.state["answer"] == "past the base class"
    assert len(episode.set_aside) == 1
    deadline = time.monotonic() + 20  # the refused rollout's error has held its run until now
    while Own._generate_with_cache is not before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert Own._generate_with_cache is before


def test_a_class_that_changes_what_it_is_asked_is_answered_so(engine: FakeEngine) -> None:
    def node(state: State) -> Any:
        return {"answer": polite.invoke("sing").text}

    (episode,) = run_episodes(app(node), Questions, engine=engine)
    assert episode.calls[-1].messages[0]["content"] == "Please: sing"
    assert episode.state["answer"] == "x"


def test_functions_of_the_example_ask_their_own_models(engine: FakeEngine) -> None:
    seen: list[Any] = []

    def graph_input(example: Any) -> Any:
        return {"question": free.invoke(example["question"]).text}

    run_episodes(
        app(lambda state: seen.append(state["question"])),
        Questions,
        engine=engine,
        inputs=graph_input,
    )
    assert seen == ["own"]


def test_a_dry_run_that_blocks_is_given_up_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dry_run, "_SECONDS", 0.3)

    async def blocks(state: State) -> Any:
        time.sleep(1.5)
        return {}

    flex_mg = compile_graph(app(blocks), Questions)
    assert "shown" in flex_mg.agents
    assert any("episode_timeout" in note or "timeout" in note for note in flex_mg.notes)
