"""Many episodes of an app that fails in every way; prints what became of them as JSON.

    python -m tests.faults.soak --episodes 10000

Of ten episodes one each meets an exception in a node, an exception in the reward function, a tool
that times out, an episode past its deadline, a graph that never ends, a parser that refuses, a
synchronous node that hangs, and an engine that fails; two meet nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import FakeListChatModel
from langgraph.graph import END, START, StateGraph

from marft_graph import FakeEngine, run_episodes
from marft_graph.errors import EngineError
from marft_graph.rollout.worker_threads import hung_threads

FAULTS = {
    "node": "ValueError in worker",
    "reward": "RewardError: KeyError",
    "tool": "TimeoutError in worker",
    "deadline": "timeout",
    "recursion": "GraphRecursionError",
    "parser": "StructuredOutputError in worker",
    "hung": "timeout",
    "engine": "EngineError in worker",
}
KINDS = [*FAULTS, "none", "none"]
model = FakeListChatModel(responses=["never asked"])


class State(TypedDict, total=False):
    kind: str
    answer: str


def app(release: threading.Event) -> Any:
    """A worker that meets the example's fault, and a node that may send it round for ever."""

    async def worker(state: State) -> dict[str, str]:
        kind = state["kind"]
        if kind == "deadline":
            await asyncio.sleep(3600)
        answer = (await model.ainvoke(f"{kind}?")).text
        if kind == "node":
            raise ValueError("a node fails")
        if kind == "tool":
            await asyncio.wait_for(asyncio.sleep(3600), 0.01)
        if kind == "parser":
            raise OutputParserException(f"cannot parse {answer!r}")
        return {"answer": answer}

    def hanging(state: State) -> dict[str, str]:
        if state["kind"] == "hung":
            release.wait(3600)
        return {"answer": state["answer"] + "!"}

    builder = StateGraph(State)
    builder.add_node("worker", worker)
    builder.add_node("hanging", hanging)
    builder.add_edge(START, "worker")
    builder.add_edge("worker", "hanging")
    builder.add_conditional_edges(
        "hanging", lambda state: "worker" if state["kind"] == "recursion" else END, ["worker", END]
    )
    return builder.compile().with_config(recursion_limit=7)


def reward(example: Any, state: Any) -> float:
    if example["kind"] == "reward":
        raise KeyError("a reward fails")
    return 1.0


def answer(agent: str, messages: Any) -> Any:
    return EngineError("an engine fails") if "engine?" in messages[-1].text else "yes"


def measured() -> dict[str, float]:
    """Threads, open handles and resident memory in MiB, once the hung threads have been let go."""
    deadline = time.monotonic() + 60
    while hung_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "handles": len(os.listdir("/proc/self/fd")),
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=3.0, help="of an episode, in seconds")
    options = parser.parse_args()
    each = options.episodes // options.rollouts
    tally: Counter[str] = Counter()
    hung, measures = [], []
    engine = FakeEngine(answer)
    for _ in range(options.rollouts):
        release = threading.Event()
        episodes = run_episodes(
            app(release),
            [{"kind": KINDS[i % len(KINDS)]} for i in range(each)],
            engine=engine,
            reward=reward,
            nodes=["worker"],
            concurrency=128,
            episode_timeout=options.timeout,
            reward_errors="drop",
        )
        hung.append(hung_threads())
        release.set()
        for episode in episodes:
            kind = episode.example["kind"]
            tally[f"{kind}: {episode.status}"] += 1
            if not episode.ok and (episode.state is not None or episode.total_reward != 0):
                tally["failed, but with data"] += 1
        del episodes, episode
        engine.requests.clear()
        measures.append(measured())
    engine.close()
    json.dump({"tally": tally, "hung": hung, "measures": measures}, sys.stdout)


if __name__ == "__main__":
    main()
