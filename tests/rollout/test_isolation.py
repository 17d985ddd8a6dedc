"""What episodes do not share: examples, stores, checkpointers, caches of nodes and of answers."""

import operator
import threading
from typing import Annotated

import pytest
from langchain_core.caches import InMemoryCache as AnswerCache
from langchain_core.globals import get_llm_cache, set_llm_cache
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.pregel import Pregel
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import CachePolicy
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.errors import ConfigError, DatasetError
from marft_graph.rollout import isolation
from marft_graph.rollout.runner import run_episodes

model = FakeListChatModel(responses=["own"])


class State(TypedDict, total=False):
    q: str
    a: str
    notes: list


@pytest.fixture
def engine():
    made = FakeEngine({"writer": [f"d{number}" for number in range(99)]})
    yield made
    made.close()


def writer(state):
    return {"a": model.invoke(state["q"]).text}


def one(node=writer, *, name="writer", policy=None, **settings):
    builder = StateGraph(State).add_node(name, node, cache_policy=policy)
    return builder.add_edge(START, name).compile(**settings)


def answers(graph, engine, **settings):
    settings = {"group_size": 3, "concurrency": 1} | settings
    episodes = run_episodes(graph, [{"q": "q"}], engine=engine, **settings)
    assert [episode.status for episode in episodes] == ["ok"] * len(episodes)
    return [[call.messages[-1]["content"] for call in episode.calls] for episode in episodes]


# Caches


def test_a_node_cache_is_neither_read_nor_filled(engine):
    cache = InMemoryCache()
    graph = one(policy=CachePolicy(), cache=cache)
    assert answers(graph, engine) == [["d0"], ["d1"], ["d2"]]
    assert answers(graph, engine, group_size=1) == [["d3"]]
    assert graph.invoke({"q": "q"})["a"] == "own"
    assert graph.cache is cache


def test_a_filled_cache_answers_the_app_but_no_episode(engine):
    graph = one(policy=CachePolicy(), cache=InMemoryCache())
    graph.invoke({"q": "q"})
    assert answers(graph, engine, group_size=1) == [["d0"]]
    assert graph.invoke({"q": "q"})["a"] == "own"


def test_the_cache_of_a_graph_inside_is_not_used_either(engine):
    inner = one(policy=CachePolicy(), cache=InMemoryCache())
    builder = StateGraph(State).add_node("inner", inner).add_edge(START, "inner")
    called = one(lambda state: inner.invoke(state), name="outer")
    script = FakeEngine({"inner/writer": ["a", "b"], "outer/writer": ["a", "b"]})
    for graph in (builder.compile(cache=InMemoryCache()), called):
        assert answers(graph, script, group_size=2) in ([["a"], ["b"]], [["a"], ["a"]])
    script.close()
    assert inner.invoke({"q": "q"})["a"] == "own"


def test_the_cache_of_a_task_is_not_used(engine):
    asked = []

    @task(cache_policy=CachePolicy())
    def ask(q):
        asked.append(q)
        return model.invoke(q).text

    @entrypoint(cache=InMemoryCache())
    def app(given):
        return ask(given["q"]).result()

    script = FakeEngine("x")
    run_episodes(app, [{"q": "q"}], engine=script, group_size=3)
    script.close()
    assert asked == ["q"] * 3


def test_langchains_cache_gives_no_answers_and_takes_none():
    set_llm_cache(AnswerCache())
    try:
        model.invoke("q")
        before = dict(get_llm_cache()._cache)
        engine = FakeEngine("x")
        both = StateGraph(State).add_node("writer", writer).add_node("own", writer)
        both = both.add_edge(START, "writer").add_edge("writer", "own").compile()
        run_episodes(both, [{"q": "other"}], engine=engine, nodes=["writer"])
        run_episodes(one(), [{"q": "third"}], engine=None)
        engine.close()
        assert get_llm_cache()._cache == before
    finally:
        set_llm_cache(None)


@pytest.mark.parametrize("own", [True, False])
def test_a_model_with_a_cache_of_its_own_or_that_insists_on_one_is_asked_anew(own):
    set_llm_cache(AnswerCache())
    asked = []

    class Counting(FakeListChatModel):
        def _call(self, *args, **kwargs):
            asked.append(1)
            return "own"

    try:
        cache = AnswerCache()
        insisting = Counting(responses=["x"], cache=cache if own else True)
        node = one(lambda state: {"a": insisting.invoke("q").text})
        run_episodes(node, [{"q": "q"}], engine=None, group_size=3)
        assert len(asked) == 3
        assert get_llm_cache()._cache == cache._cache == {}
    finally:
        set_llm_cache(None)


# Stores


def remembering(state, *, store: BaseStore):
    known = sorted(item.key for item in store.search(("mem",)))
    answer = model.invoke(f"{state['q']} {known}").text
    store.put(("mem",), answer, {"text": answer})
    return {"a": answer}


def prompts(episodes):
    return [episode.calls[0].messages[0]["content"] for episode in episodes]


def test_every_episode_begins_with_its_own_copy_of_the_store(engine):
    store = InMemoryStore()
    store.put(("mem",), "old", {"text": "old"})
    graph = one(remembering, store=store)
    episodes = run_episodes(graph, [{"q": "q"}], engine=engine, group_size=3, concurrency=1)
    assert prompts(episodes) == ["q ['old']"] * 3
    assert [item.key for item in store.search(("mem",))] == ["old"]


def test_what_a_node_changes_in_place_stays_in_its_episode():
    store = InMemoryStore()
    store.put(("mem",), "list", {"items": []})

    def node(state, *, store: BaseStore):
        items = store.get(("mem",), "list").value["items"]
        items.append("x")
        return {"a": model.invoke(str(items)).text}

    engine = FakeEngine("y")
    episodes = run_episodes(
        one(node, store=store), [{"q": "q"}], engine=engine, group_size=2, concurrency=1
    )
    engine.close()
    assert prompts(episodes) == ["['x']"] * 2
    assert store.get(("mem",), "list").value == {"items": []}


@pytest.mark.parametrize("kind", ["contents", "function", "store"])
def test_contents_of_the_store_are_given_by_example(kind, engine):
    made = InMemoryStore()
    made.put(("mem",), "q", {"text": "x"})
    given = {
        "contents": {("mem",): {"q": {"text": "x"}}},
        "function": lambda example: {"mem": {example["q"]: {"text": "x"}}},
        "store": made,
    }[kind]
    for graph in (one(remembering, store=InMemoryStore()), one(remembering)):
        episodes = run_episodes(graph, [{"q": "q"}], engine=engine, group_size=2, store=given)
        assert prompts(episodes) == ["q ['q']"] * 2
    assert [item.key for item in made.search(("mem",))] == ["q"]


def test_a_store_that_is_not_in_memory_is_replaced_by_an_empty_one_and_said_once(engine, caplog):
    class Remote(BaseStore):
        def batch(self, ops):
            raise AssertionError("an episode asked the app's own store")

        async def abatch(self, ops):
            raise AssertionError("an episode asked the app's own store")

    graph = one(remembering, store=Remote())
    for _ in range(2):
        (episode,) = run_episodes(graph, [{"q": "q"}], engine=engine)
        assert prompts([episode]) == ["q []"]
    assert caplog.text.count("the app's store is a Remote") == 1


def test_contents_of_the_wrong_form_are_refused(engine):
    with pytest.raises(ConfigError, match=r"store is \['x'\]; it must be contents by namespace"):
        run_episodes(one(), [{"q": "q"}], engine=engine, store=["x"])


# Checkpointers


class Notes(TypedDict, total=False):
    q: str
    seen: Annotated[list, operator.add]


def test_two_episodes_share_no_thread_of_an_inner_checkpointer():
    saver = InMemorySaver()

    def note(state):
        return {"seen": [model.invoke(f"seen {len(state.get('seen', []))}").text]}

    builder = StateGraph(Notes).add_node("note", note).add_edge(START, "note")
    inner = builder.compile(checkpointer=saver)
    thread = {"configurable": {"thread_id": "fixed"}}

    def outer(state):
        inner.invoke({"q": "1"}, thread)
        return {"seen": inner.invoke({"q": "2"}, thread)["seen"]}

    graph = StateGraph(Notes).add_node("outer", outer).add_edge(START, "outer").compile()
    engine = FakeEngine("x")
    episodes = run_episodes(graph, [{"q": "q"}], engine=engine, group_size=3, concurrency=1)
    engine.close()
    said = [[call.messages[0]["content"] for call in e.calls] for e in episodes]
    assert said == [["seen 0", "seen 1"]] * 3  # within an episode the thread goes on
    assert saver.storage == {}


def test_the_apps_own_checkpointer_is_left_alone(engine):
    saver = InMemorySaver()
    answers(one(checkpointer=saver), engine)
    assert saver.storage == {}


# Examples


def test_nodes_and_rewards_change_nothing_but_their_own_copy():
    def node(state):
        state["notes"].append(model.invoke(str(state["notes"])).text)
        return {"notes": state["notes"]}

    data = [{"q": "q", "notes": [], "gold": 1.0}]
    engine = FakeEngine({"writer": ["a", "b", "c"]})
    episodes = run_episodes(
        one(node),
        data,
        engine=engine,
        group_size=3,
        concurrency=1,
        reward=[lambda example, state: example.pop("gold"), lambda e, state: e.pop("gold")],
    )
    engine.close()
    assert prompts(episodes) == ["[]"] * 3
    assert [episode.total_reward for episode in episodes] == [2.0] * 3
    assert data == [{"q": "q", "notes": [], "gold": 1.0}]


def test_what_inputs_returns_belongs_to_one_episode(engine):
    shared = []

    def node(state):
        state["notes"].append("x")
        return {"a": model.invoke(str(state["notes"])).text}

    episodes = run_episodes(
        one(node),
        [{"q": "q"}],
        engine=engine,
        group_size=2,
        concurrency=1,
        inputs=lambda example: {"notes": shared},
    )
    assert prompts(episodes) == ["['x']"] * 2
    assert shared == []


def test_an_example_that_cannot_be_copied_is_refused_with_its_key(engine):
    data = [{"q": "q", "lock": threading.Lock()}]
    with pytest.raises(DatasetError, match=r"'lock' of an example is .*cannot be copied .*inputs="):
        run_episodes(one(), data, engine=engine)


@pytest.mark.usefixtures("untouched_langchain")
def test_langgraph_is_as_it_was_after_a_rollout(engine):
    before = {name: Pregel.__dict__[name] for name in isolation.PATCHED_NAMES}
    answers(one(), engine)
    assert {name: Pregel.__dict__[name] for name in isolation.PATCHED_NAMES} == before
