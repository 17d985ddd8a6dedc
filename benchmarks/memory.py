"""Peak memory of training, one setting against another, in one run.

    python benchmarks/memory.py [--json FILE]

Every figure is the peak resident memory of a process of its own that trains for one iteration, less
what Python and the libraries take before a model is loaded. The base has random weights, 4 layers
of width 512 and a vocabulary of 32,000 (33 million parameters, 127 MiB). The first two lines have
8 episodes with answers of 8 tokens and adapters of rank 4, so that the base weighs most; the others
one agent and 32 episodes with answers of 128 tokens, and the last one samples only, 64 episodes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from iteration import chain, own_peak, score
from side_by_side import endless_base, parser, publish
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from marft_graph import Trainer
from marft_graph.policy import logprobs

AGENTS = 8
QUESTIONS = [{"text": "abcdefgh"[number:] + "ijklmnop" * 2} for number in range(8)]
FEW = {"examples_per_iteration": 2, "group_size": 4, "max_new_tokens": 8, "lora_rank": 4}
LONG = {"examples_per_iteration": 4, "group_size": 8, "max_new_tokens": 128}
SAMPLED = {**LONG, "trains": False}
Case = tuple[str, dict[str, Any], dict[str, Any]]
CASES: tuple[Case, ...] = (
    ("8 agents on one base / 1 agent", FEW, {**FEW, "agents": AGENTS}),
    ("8 agents, a base each / 1 agent", FEW, {**FEW, "agents": AGENTS, "own_bases": True}),
    ("microbatch_tokens 1024 / 4096", LONG, {**LONG, "microbatch_tokens": 1024}),
    ("gradient_checkpointing true / false", LONG, {**LONG, "gradient_checkpointing": True}),
    ("logits in chunks / of a micro-batch at once", {**LONG, "whole_logits": True}, LONG),
    ("cache_gib 0.1 / 4, sampling only", SAMPLED, {**SAMPLED, "cache_gib": 0.1}),
)
"""What is compared: the name "first / second", how the second trains, and how the first."""


def compare(case: Case, base: Path, without_model: float) -> dict[str, Any]:
    """A line of the table."""
    name, second, first = case
    peaks = [peak(base, json.dumps(settings)) - without_model for settings in (first, second)]
    return {
        "compared": name,
        "first, MiB": peaks[0],
        "second, MiB": peaks[1],
        "ratio": peaks[0] / peaks[1],
    }


@functools.cache
def peak(base: Path, settings: str) -> float:
    """Peak resident memory in MiB of a process that trains so; "null": that loads no model."""
    done = subprocess.run(
        [sys.executable, __file__, "--train", settings, "--base", str(base)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=3600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # so many threads, so many buffers
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def train(base: Path, settings: Mapping[str, Any], folder: Path) -> None:
    """What a measured process does."""
    given = dict(settings)
    names = [f"agent_{number}" for number in range(given.pop("agents", 1))]
    if given.pop("own_bases", False):
        copies = {name: folder / name for name in names}
        for copy in copies.values():
            shutil.copytree(base, copy)
        given["per_node"] = {name: {"base_model": str(copy)} for name, copy in copies.items()}
    if given.pop("whole_logits", False):
        logprobs._CHUNK_ELEMENTS = 2**62
    trains = given.pop("trains", True)
    with Trainer(
        chain(len(names)),
        train_dataset=QUESTIONS,
        eval_dataset=None if trains else [q for q in QUESTIONS for _ in range(8)],
        reward=lambda example, state: score(state["text"]),
        config={
            "base_model": str(base),
            "advantage": "group",
            "iterations": 1,
            "eval_every": 0,
            "device": "cpu",
            **given,
        },
        run_dir=folder / "run",
    ) as trainer:
        if trains:
            trainer.train(progress=False)
        else:
            trainer.evaluate()


@contextmanager
def random_base() -> Iterator[Path]:
    """A model with random weights, the tiny base's tokenizer, and answers of full length."""
    with endless_base() as tiny, tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(tiny)
        config.update(
            {
                "vocab_size": 32_000,
                "hidden_size": 512,
                "intermediate_size": 2048,
                "num_hidden_layers": 4,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "layer_types": ["full_attention"] * 4,
            }
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        yield Path(folder)


def main() -> None:
    """Print the table, or with --train train and print this process's peak memory."""
    options = parser(__doc__)
    options.add_argument("--train", type=json.loads, default={}, help=argparse.SUPPRESS)
    options.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.base is not None:
        with tempfile.TemporaryDirectory() as folder:
            if given.train is not None:
                train(given.base, given.train, Path(folder))
            print(json.dumps(own_peak()))
        return
    with random_base() as base:
        without_model = peak(base, "null")
        rows = [compare(case, base, without_model) for case in CASES]
    publish(rows, given.json)


if __name__ == "__main__":
    main()
