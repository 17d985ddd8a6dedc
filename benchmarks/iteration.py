"""Whole iterations against the pattern of the paper's reference code, in time and memory.

    python benchmarks/iteration.py [--rounds 3] [--json FILE]

64 episodes of a chain of agents: sampling, scoring and one update of every adapter. On the tiny
base with short prompts and answers of 8 tokens; and on a random model with a vocabulary of 32,000,
prompts of 128 tokens and answers of 32. Both have a critic, and make one step of it and of each
adapter (by default ours would make eight of the critic). Peak memory is that of one process each,
with four agents, less what Python and the libraries take before any model is loaded.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import HumanMessage
from langgraph.graph import END, START, StateGraph
from reference_pattern import ReferencePattern
from side_by_side import endless_base, in_turn, parser, publish, ratio

from marft_graph import TrainConfig, run_episodes
from marft_graph.agents import agents_of
from marft_graph.engine.routing import local_engine
from marft_graph.learn.update import Learner
from marft_graph.policy.team import Team

EPISODES, GROUP_SIZE = 64, 8
CASES = {"tiny base": (24, 8), "vocabulary of 32,000": (128, 32)}
"""Characters of a question (a byte-level tokenizer has about one token each) and answer tokens."""


class State(TypedDict):
    """The text so far."""

    text: str


def chain(agents: int) -> Any:
    """A chain of agents; each appends its answer."""
    model = GenericFakeChatModel(messages=iter(()))

    async def node(state: State) -> dict[str, str]:
        reply = await model.ainvoke([HumanMessage(state["text"])])
        return {"text": f"{state['text']}\n{reply.text}"}

    builder = StateGraph(State)
    names = [f"agent_{number}" for number in range(agents)]
    for source, target in zip([START, *names], [*names, END], strict=True):
        if target != END:
            builder.add_node(target, node)
        builder.add_edge(source, target)
    return builder.compile()


def score(text: str) -> float:
    """Something that differs between episodes."""
    return sum(char < "k" for char in text) / max(1, len(text))


class Ours:
    """An iteration as the trainer does it."""

    def __init__(self, base: Path, agents: int, tokens: int) -> None:
        self._settings = TrainConfig(
            base_model=str(base), advantage="gae", learning_rate=1e-5, critic_epochs=1, device="cpu"
        )
        names = [f"agent_{number}" for number in range(agents)]
        self._team = Team.load(agents_of(names, self._settings), self._settings)
        self._engine = local_engine(self._team)
        self._learner = Learner(self._team, self._settings)
        self._graph = chain(agents)
        self._tokens = tokens
        self._iteration = 0

    def iteration(self, questions: list[str]) -> None:
        """Sample, score and update."""
        self._iteration += 1
        episodes = run_episodes(
            self._graph,
            [{"text": question} for question in questions],
            engine=self._engine,
            reward=lambda example, state: score(state["text"]),
            group_size=GROUP_SIZE,
            max_new_tokens=self._tokens,
            seed=self._iteration,
        )
        assert all(episode.ok for episode in episodes)
        self._learner.update(episodes, self._iteration)
        self._engine.publish(self._iteration)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()


def questions(length: int) -> list[str]:
    """One question for each group."""
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefgh", k=length)) for _ in range(EPISODES // GROUP_SIZE)]


def compare(name: str, base: Path, rounds: int) -> dict[str, Any]:
    """A line of the table: two agents, time only."""
    length, tokens = CASES[name]
    asked = questions(length)
    ours = Ours(base, 2, tokens)
    agents = [f"agent_{number}" for number in range(2)]
    theirs = ReferencePattern(base, agents, tokens, minibatch=16)
    repeated = [question for question in asked for _ in range(GROUP_SIZE)]
    seconds = in_turn(
        {
            "ours": lambda: ours.iteration(asked),
            "reference": lambda: theirs.iteration(repeated, score),
        },
        rounds,
    )
    ours.close()
    return {
        "case": name,
        "figure": "seconds an iteration, 2 agents",
        "reference pattern": sorted(seconds["reference"])[rounds // 2],
        "ours": sorted(seconds["ours"])[rounds // 2],
        "ratio": ratio(seconds["reference"], seconds["ours"]),
    }


def memory(name: str, base: Path) -> dict[str, Any]:
    """A line of the table: peak memory with four agents, ours as a share of theirs."""
    peaks = {who: peak(who, name, base) for who in ("nobody", "reference", "ours")}
    theirs, ours = (peaks[who] - peaks["nobody"] for who in ("reference", "ours"))
    return {
        "case": name,
        "figure": f"peak MiB above {peaks['nobody']:,.0f} without a model, 4 agents",
        "reference pattern": theirs,
        "ours": ours,
        "ratio": ours / theirs,
    }


def peak(who: str, name: str, base: Path) -> float:
    """Peak resident memory in MiB of a process that does one iteration."""
    command = [sys.executable, __file__, "--peak", who, "--case", name, "--base", str(base)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
    return float(json.loads(done.stdout.splitlines()[-1]))


def one_iteration(who: str, name: str, base: Path) -> None:
    """What a measured process does; prints its peak."""
    length, tokens = CASES[name]
    asked = questions(length)
    if who == "ours":
        ours = Ours(base, 4, tokens)
        ours.iteration(asked)
        ours.close()
    elif who == "reference":
        agents = [f"agent_{number}" for number in range(4)]
        theirs = ReferencePattern(base, agents, tokens, minibatch=16)
        theirs.iteration([q for q in asked for _ in range(GROUP_SIZE)], score)
    print(json.dumps(own_peak()))


def own_peak() -> float:
    """Peak resident memory of this process in MiB (Linux); `ru_maxrss` would count its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@contextmanager
def large_vocabulary() -> Iterator[Path]:
    """A random model of the tiny base's shape with 32,000 tokens, and the tiny base's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with endless_base() as tiny, tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny)
        model.resize_token_embeddings(32_000, mean_resizing=False)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        yield Path(folder)


def main() -> None:
    """Print the table, or with --peak one process's peak memory."""
    options = parser(__doc__)
    options.add_argument("--peak", help=argparse.SUPPRESS)
    options.add_argument("--case", help=argparse.SUPPRESS)
    options.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.peak:
        one_iteration(given.peak, given.case, given.base)
        return
    rows = []
    with endless_base() as tiny, large_vocabulary() as large:
        for name, base in zip(CASES, (tiny, large), strict=True):
            rows += [compare(name, base, given.rounds), memory(name, base)]
    publish(rows, given.json)


if __name__ == "__main__":
    main()
