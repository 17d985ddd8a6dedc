"""What the framework costs around a fake engine: processor time a call, and how it grows.

    python benchmarks/overhead.py [--json FILE]

A duo of trivial async nodes. First 1,000 episodes at once, traced against `ainvoke` of the plain
graph with LangChain's fake model, in turn; the difference is divided by the calls. Then 100 to
10,000 episodes at the usual concurrency: seconds and peak memory; the exponent is the slope of log
time over log episodes.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph
from side_by_side import parser, publish

from marft_graph import FakeEngine, run_episodes

AT_ONCE, CALLS = 1000, 2
SIZES = (100, 316, 1000, 3162, 10_000)


class State(TypedDict):
    """What the two nodes pass on."""

    text: str
    plan: str


def duo() -> Any:
    """Two async nodes with a call each."""
    model = GenericFakeChatModel(messages=itertools.repeat(AIMessage("ok")))

    async def planner(state: State) -> dict[str, str]:
        return {"plan": (await model.ainvoke(state["text"])).text}

    async def actor(state: State) -> dict[str, str]:
        return {"text": (await model.ainvoke(state["plan"])).text}

    builder = StateGraph(State)
    builder.add_node("planner", planner)
    builder.add_node("actor", actor)
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "actor")
    builder.add_edge("actor", END)
    return builder.compile()


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor time of this process while it does some work."""
    started = time.process_time()
    work()
    return time.process_time() - started


def per_call(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds that tracing adds to a call."""
    graph, engine = duo(), FakeEngine("ok")
    examples = [{"text": f"example {index}", "plan": ""} for index in range(AT_ONCE)]

    async def plain() -> None:
        await asyncio.gather(*(graph.ainvoke(example) for example in examples))

    def traced() -> None:
        episodes = run_episodes(graph, examples, engine=engine, concurrency=AT_ONCE)
        assert all(episode.ok and len(episode.calls) == CALLS for episode in episodes)

    pairs = [
        (processor_seconds(lambda: asyncio.run(plain())), processor_seconds(traced))
        for _ in range(rounds + 1)
    ][1:]
    engine.close()
    calls = AT_ONCE * CALLS
    base, ours = (1000 * statistics.median(column) / calls for column in zip(*pairs, strict=True))
    added = 1000 * statistics.median(after - before for before, after in pairs) / calls
    return [
        {"figure": "plain graph, ms of processor time a call", "value": base},
        {"figure": "traced, ms of processor time a call", "value": ours},
        {"figure": "added, ms of processor time a call", "value": added},
    ]


def growth() -> list[dict[str, Any]]:
    """Seconds and memory from 100 to 10,000 episodes."""
    graph = duo()
    rows, points = [], []
    for size in SIZES:
        engine = FakeEngine("ok")
        examples = [{"text": f"example {index}", "plan": ""} for index in range(size)]
        seconds = min(
            processor_seconds(lambda: run_episodes(graph, examples, engine=engine))  # noqa: B023
            for _ in range(3 if size <= 1000 else 1)
        )
        engine.close()
        points.append((math.log(size), math.log(seconds)))
        rows.append({"figure": f"{size} episodes, s of processor time", "value": seconds})
    slope = statistics.linear_regression(*zip(*points, strict=True)).slope
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        *rows,
        {"figure": "exponent", "value": slope},
        {"figure": "peak memory, MiB (every episode is kept)", "value": peak},
    ]


def main() -> None:
    """Print the table."""
    options = parser(__doc__).parse_args()
    publish([*per_call(options.rounds), *growth()], options.json)


if __name__ == "__main__":
    main()
