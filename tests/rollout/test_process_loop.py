"""One event loop for the process: what an app or a reward keeps works in every rollout."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from marft_graph.engine.fake import FakeEngine
from marft_graph.errors import EpisodeTimeoutError, RewardError
from marft_graph.graph.compile import compile_graph
from marft_graph.rollout.runner import run_episodes
from marft_graph.rollout.worker_threads import hung_threads

model = FakeListChatModel(responses=["own"])
EXAMPLES = [{"q": str(number)} for number in range(4)]


class State(TypedDict):
    q: str
    out: str


def app(body):
    builder = StateGraph(State)
    builder.add_node("node", body)
    builder.add_edge(START, "node")
    return builder.compile()


async def ask(state):
    return {"out": (await model.ainvoke("hi")).text}


def ask_in_a_thread(state):
    return {"out": model.invoke("hi").text}


def right(example, state):
    return 1.0


def returns(graph, reward=right, **settings):
    engine = FakeEngine("x")
    try:
        episodes = run_episodes(graph, EXAMPLES, engine=engine, reward=reward, **settings)
    finally:
        engine.close()
    return [episode.total_reward if episode.ok else episode.status for episode in episodes]


def test_a_semaphore_of_the_reward_works_in_every_rollout():
    places = asyncio.Semaphore(1)

    async def judge(example, state):
        async with places:
            await asyncio.sleep(0.001)
        return 1.0

    for _ in range(3):
        assert returns(app(ask), judge) == [1.0] * 4


def test_a_lock_of_the_app_works_in_the_dry_run_and_after_it():
    lock = asyncio.Lock()

    async def body(state):
        async with lock:
            await asyncio.sleep(0.001)
            return await ask(state)

    graph = app(body)
    assert not compile_graph(graph, EXAMPLES).notes
    assert returns(graph) == [1.0] * 4


def test_a_task_behind_a_queue_goes_on_between_rollouts():
    queue: asyncio.Queue = asyncio.Queue()
    workers = []

    async def body(state):
        if not workers:
            workers.append(asyncio.create_task(serve()))
        answer = asyncio.get_running_loop().create_future()
        await queue.put(answer)
        return {"out": await answer}

    async def serve():
        while True:
            (await queue.get()).set_result("served")

    graph = app(body)
    for _ in range(2):
        assert returns(graph) == [1.0] * 4
    assert len(workers) == 1
    workers[0].get_loop().call_soon_threadsafe(workers[0].cancel)


def test_a_connection_that_is_kept_alive_serves_the_next_rollout():
    server = socket.create_server(("127.0.0.1", 0))
    accepted = []

    def echo():
        connection, _ = server.accept()
        accepted.append(connection)
        while line := connection.recv(100):
            connection.sendall(line)

    threading.Thread(target=echo, daemon=True).start()
    kept = []

    async def judge(example, state):
        if not kept:
            kept.append(asyncio.ensure_future(asyncio.open_connection(*server.getsockname())))
            kept.extend([asyncio.Lock(), asyncio.get_running_loop()])
        reader, writer = await kept[0]
        async with kept[1]:
            writer.write(b"1.0\n")
            return float(await reader.readline())

    for _ in range(3):
        assert returns(app(ask), judge) == [1.0] * 4
    assert len(accepted) == 1
    _, writer = kept[0].result()
    kept[2].call_soon_threadsafe(writer.close)
    asyncio.run_coroutine_threadsafe(writer.wait_closed(), kept[2]).result(5)
    accepted[0].close()
    server.close()


def test_rollouts_of_two_threads_share_what_the_app_keeps():
    places = asyncio.Semaphore(1)

    async def body(state):
        async with places:
            await asyncio.sleep(0.001)
            return await ask(state)

    graph = app(body)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda _: returns(graph), range(2))] == [[1.0] * 4] * 2


def test_a_rollout_inside_of_an_async_reward_and_inside_of_a_running_loop():
    def reward(example, state):
        return sum(returns(app(ask)))

    async def async_reward(example, state):
        return sum(returns(app(ask)))

    async def notebook():
        return returns(app(ask), reward), returns(app(ask), async_reward)

    assert asyncio.run(notebook()) == ([4.0] * 4, [4.0] * 4)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_node_that_exits_ends_its_episode_and_not_the_loop(error):
    async def body(state):
        if state["q"] == "1":
            raise error("done")
        return await ask(state)

    graph = app(body)
    assert returns(graph) == [1.0, f"failed: {error.__name__} in node", 1.0, 1.0]
    assert returns(app(ask)) == [1.0] * 4


def test_hung_rewards_give_their_places_to_others():
    release = threading.Event()

    def reward(example, state):
        if example["q"] in "01":
            release.wait(60)
        return 1.0

    before = hung_threads()
    late = ["failed: RewardError: _TooSlow"] * 2
    found = returns(
        app(ask), reward, reward_errors="drop", reward_timeout=0.2, reward_concurrency=1
    )
    assert found == [*late, 1.0, 1.0]
    assert hung_threads() == before + 2
    release.set()
    deadline = time.monotonic() + 5
    while hung_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hung_threads() == before


def test_hung_nodes_give_their_threads_to_other_episodes():
    release = threading.Event()

    def body(state):
        if state["q"] != "3":
            release.wait(60)
        return ask_in_a_thread(state)

    try:
        found = returns(app(body), episode_timeout=0.4, concurrency=1)
    finally:
        release.set()
    assert found == ["failed: timeout"] * 3 + [1.0]


def test_an_async_reward_that_blocks_is_given_up_and_its_line_named():
    release = threading.Event()

    async def reward(example, state):
        release.wait(60)
        return 1.0

    started = time.monotonic()
    try:
        with pytest.raises(RewardError, match=r"1 seconds \(reward_timeout\).*test_process_loop"):
            returns(app(ask), reward, reward_timeout=1)
    finally:
        release.set()
    assert time.monotonic() - started < 10
    assert returns(app(ask)) == [1.0] * 4


def test_an_async_node_that_blocks_is_given_up_and_its_line_named():
    release = threading.Event()

    async def body(state):
        release.wait(60)
        return await ask(state)

    try:
        with pytest.raises(EpisodeTimeoutError, match=r"episode_timeout.*test_process_loop.py:\d+"):
            returns(app(body), episode_timeout=1)
    finally:
        release.set()
    assert returns(app(ask)) == [1.0] * 4


SCRIPT = """
import asyncio, os, sys, time
from tests.rollout.test_process_loop import app, ask, returns

places = asyncio.Semaphore(1)
kept = []

async def judge(example, state):
    async with places:
        await asyncio.sleep(0.001)
    if not kept:
        kept.append(asyncio.create_task(asyncio.sleep(1000)))
        kept.append(await asyncio.create_subprocess_exec("sleep", "1", stdout=-1))
    return 1.0

assert returns(app(ask), judge) == [1.0] * 4
child = os.fork()
if child == 0:  # has none of its parent's threads
    os._exit(0 if returns(app(ask)) == [1.0] * 4 else 1)
assert os.waitpid(child, 0)[1] == 0

def hung(example, state):
    time.sleep(1000)

found = returns(app(ask), hung, reward_errors="drop", reward_timeout=0.2)
print(found)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_with_hung_rewards_and_open_tasks_ends_without_a_word():
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout.split() == str(["failed: RewardError: _TooSlow"] * 4).split()
    assert (ended.returncode, ended.stderr) == (0, "")
