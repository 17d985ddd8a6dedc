"""What tracing costs: traced episodes with the fake engine against `ainvoke` of the plain graph.

    python benchmarks/trace_overhead.py

The plain graph's nodes call LangChain's own fake chat model; ours answers the same nodes from a
FakeEngine and keeps every call with its parents. Both run the same number of episodes at once, in
turn, in one process; the ratio is the median one of processor time, for chains of nodes.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph

from marft_graph import FakeEngine, run_episodes

EPISODES, ROUNDS = 64, 7


class State(TypedDict):
    """One channel that every node reads and writes."""

    text: str


def chain(nodes: int) -> Any:
    """A chain of trivial async nodes, each with one call of a fake model."""
    model = GenericFakeChatModel(messages=itertools.repeat(AIMessage("ok")))

    async def node(state: State) -> dict[str, str]:
        return {"text": (await model.ainvoke(state["text"])).text}

    builder = StateGraph(State)
    names = [f"node_{index}" for index in range(nodes)]
    for name in names:
        builder.add_node(name, node)
    for source, target in itertools.pairwise([START, *names, END]):
        builder.add_edge(source, target)
    return builder.compile()


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor time of this process while it does some work."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(nodes: int) -> tuple[float, float, float]:
    """Milliseconds of processor time an episode, plain and traced, and the median ratio."""
    graph = chain(nodes).with_config({"recursion_limit": nodes + 5})
    examples = [{"text": f"example {index}"} for index in range(EPISODES)]
    engine = FakeEngine("ok")

    async def plain() -> None:
        await asyncio.gather(*(graph.ainvoke(example) for example in examples))

    def traced() -> None:
        episodes = run_episodes(graph, examples, engine=engine)
        assert all(episode.ok and len(episode.calls) == nodes for episode in episodes)

    pairs = [
        (processor_seconds(lambda: asyncio.run(plain())), processor_seconds(traced))
        for _ in range(ROUNDS)
    ]
    base, ours = (1000 * statistics.median(c) / EPISODES for c in zip(*pairs, strict=True))
    return base, ours, statistics.median(after / before for before, after in pairs)


def main() -> None:
    """Print the table."""
    print("| nodes | plain, ms an episode | traced, ms an episode | ratio |\n|---|---|---|---|")
    for nodes in (3, 10, 50):
        base, ours, ratio = compare(nodes)
        print(f"| {nodes} | {base:.2f} | {ours:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
