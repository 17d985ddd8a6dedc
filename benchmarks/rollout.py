"""Sampled tokens per second through a LangGraph app, against `model.generate` and single calls.

    python benchmarks/rollout.py [--vllm PYTHON] [--json FILE]

64 episodes of a duo on the tiny base, an adapter for each agent. The peers get the very prompts of
our episodes: `generate` samples them as static batches of 64 with PEFT's model as it is, agent
after agent; a user's own loop has one call at a time. What the app itself takes is measured with
LangChain's fake model in the same round and taken off in the last column. Ragged answers have 8 to
256 tokens, of which a static batch needs the longest. With --vllm (a Python that has vLLM, see
`make vllm-cpu`) the same app also samples on a vLLM server on this machine's processor, over HTTP.

Ours runs on as many threads of torch as the trainer gives a base of this size (one); the others on
as many as torch chooses.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langgraph.graph import END, START, StateGraph
from peft import LoraConfig, get_peft_model
from side_by_side import endless_base, in_turn, parser, publish, ratio
from transformers import AutoModelForCausalLM

from marft_graph import Episode, run_episodes
from marft_graph.agents import agents_of
from marft_graph.config import TrainConfig
from marft_graph.engine.routing import local_engine
from marft_graph.engine.vllm.engine import vllm_engine
from marft_graph.policy.team import Team

AGENTS = ("reasoner", "actor")
EPISODES = 64
VLLM = ("--enforce-eager", "--max-model-len=512", "--max-num-seqs=64")
SINGLE = 2
"""Episodes of the loop with one call at a time; more would only take longer."""


class State(TypedDict):
    """What the agents share; the lengths say how many tokens each may write."""

    question: str
    plan: str
    answer: str
    lengths: list[int]


def duo(model: BaseChatModel) -> Any:
    """Two agents, the second reading the first; as plain as a LangGraph app can be."""

    async def reasoner(state: State) -> dict[str, str]:
        messages = [SystemMessage("Write the calculation."), HumanMessage(state["question"])]
        reply = await model.ainvoke(messages, max_tokens=state["lengths"][0])
        return {"plan": reply.text}

    async def actor(state: State) -> dict[str, str]:
        messages = [SystemMessage("Answer with a number."), HumanMessage(state["question"])]
        reply = await model.ainvoke(messages, max_tokens=state["lengths"][1])
        return {"answer": reply.text}

    builder = StateGraph(State)
    builder.add_node("reasoner", reasoner)
    builder.add_node("actor", actor)
    builder.add_edge(START, "reasoner")
    builder.add_edge("reasoner", "actor")
    builder.add_edge("actor", END)
    return builder.compile()


def examples(ragged: bool) -> list[dict[str, Any]]:
    """One question for each episode, and how long its answers are."""
    draw = random.Random(0)
    return [
        {
            "question": f"{draw.randint(10, 99)} figs and {draw.randint(10, 99)} nuts. How many?",
            "lengths": [draw.randint(8, 256) if ragged else 64 for _ in AGENTS],
        }
        for _ in range(EPISODES)
    ]


class Generate:
    """PEFT's model and `generate`, as anyone would call them."""

    def __init__(self, base: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(base)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self._model = get_peft_model(model, lora, adapter_name=AGENTS[0])
        self._model.add_adapter(AGENTS[1], lora)
        self._model.eval()

    @torch.no_grad()
    def __call__(self, agent: str, prompts: Sequence[tuple[int, ...]], tokens: int) -> None:
        """Sample one left-padded batch."""
        self._model.set_adapter(agent)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=257,
        )
        assert out.shape[1] == longest + tokens


def prompts_of(episodes: Sequence[Episode]) -> dict[str, list[tuple[int, ...]]]:
    """The prompts of each agent's calls."""
    return {
        agent: [c.prompt_ids for e in episodes for c in e.calls if c.agent == agent]
        for agent in AGENTS
    }


def sampled(episodes: Sequence[Episode]) -> int:
    """Tokens that the agents wrote."""
    assert all(episode.ok for episode in episodes)
    return sum(len(call.completion_ids) for e in episodes for call in e.calls)


def plain_graph(data: Sequence[Mapping[str, Any]]) -> Callable[[], object]:
    """The same app on LangChain's fake model."""
    graph = duo(GenericFakeChatModel(messages=itertools.repeat(AIMessage("ok"))))

    async def run() -> None:
        await asyncio.gather(*(graph.ainvoke(dict(example)) for example in data))

    return lambda: asyncio.run(run())


def through(engine: Any, data: Sequence[Mapping[str, Any]]) -> list[Episode]:
    """All episodes at once on an engine."""
    graph = duo(GenericFakeChatModel(messages=iter(())))
    return run_episodes(graph, data, engine=engine, concurrency=EPISODES)


def compare(
    name: str, team: Team, engine: Any, generate: Generate, rounds: int
) -> list[dict[str, Any]]:
    """Ours against static batches, with answers of one length or ragged."""
    data = examples(name == "ragged")
    first = through(engine, data)
    prompts, tokens = prompts_of(first), sampled(first)
    longest = {a: max(example["lengths"][i] for example in data) for i, a in enumerate(AGENTS)}

    def static() -> None:
        for agent in AGENTS:
            generate(agent, prompts[agent], longest[agent])

    works: dict[str, Callable[[], object]] = {
        "ours": lambda: through(engine, data),
        "plain graph": plain_graph(data),
        "static batch": static,
    }
    if name == "64 tokens":
        works["one at a time"] = lambda: [
            generate(agent, [prompt], 64) for agent in AGENTS for prompt in prompts[agent][:SINGLE]
        ]
    seconds = in_turn(works, rounds)
    alone = [o - g for o, g in zip(seconds["ours"], seconds["plain graph"], strict=True)]
    rows = [row(f"static batch, {name}", tokens, tokens, seconds["static batch"], seconds, alone)]
    if "one at a time" in seconds:
        few = SINGLE * len(AGENTS) * 64
        rows.append(row("one at a time", tokens, few, seconds["one at a time"], seconds, alone))
    return rows


def row(
    peer: str,
    tokens: int,
    peer_tokens: int,
    peer_seconds: Sequence[float],
    seconds: Mapping[str, Sequence[float]],
    alone: Sequence[float],
) -> dict[str, Any]:
    """A line of the table: both speeds and their ratios, with and without the app's own time."""
    per_token = [s / peer_tokens for s in peer_seconds]
    return {
        "against": peer,
        "its tokens/s": 1 / statistics.median(per_token),
        "our tokens/s": tokens / statistics.median(seconds["ours"]),
        "app alone, share of our time": statistics.median(
            g / o for g, o in zip(seconds["plain graph"], seconds["ours"], strict=True)
        ),
        "ratio": ratio(per_token, [s / tokens for s in seconds["ours"]]),
        "ratio without the app": ratio(per_token, [s / tokens for s in alone]),
    }


def against_vllm(
    base: Path, python: str, team: Team, engine: Any, rounds: int
) -> list[dict[str, Any]]:
    """The same app on a vLLM server of our own, 64 tokens an answer."""
    settings = TrainConfig(
        base_model=str(base), device="cpu", engine="vllm", vllm_python=python, vllm_args=VLLM
    )
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    data = examples(ragged=False)
    with tempfile.TemporaryDirectory() as folder:
        served = vllm_engine(team, agents_of(AGENTS, settings), settings, Path(folder))
        try:
            served.publish(1)
            seconds = in_turn(
                {
                    "ours": lambda: through(engine, data),
                    "plain graph": plain_graph(data),
                    "vLLM": lambda: through(served, data),
                },
                rounds,
            )
        finally:
            served.close()
    alone = [o - g for o, g in zip(seconds["ours"], seconds["plain graph"], strict=True)]
    tokens = EPISODES * len(AGENTS) * 64
    return [row("vLLM over HTTP", tokens, tokens, seconds["vLLM"], seconds, alone)]


def main() -> None:
    """Print the table."""
    options = parser(__doc__)
    options.add_argument(
        "--vllm", metavar="PYTHON", help="also compare with vLLM on this processor"
    )
    given = options.parse_args()
    with endless_base() as base:
        config = TrainConfig(base_model=str(base), device="cpu")
        team = Team.load(agents_of(AGENTS, config), config)
        engine = local_engine(team)
        generate = Generate(str(base))
        rows = [
            line
            for name in ("64 tokens", "ragged")
            for line in compare(name, team, engine, generate, given.rounds)
        ]
        if given.vllm:
            rows += against_vllm(base, given.vllm, team, engine, given.rounds)
        engine.close()
    publish(rows, given.json)


if __name__ == "__main__":
    main()
