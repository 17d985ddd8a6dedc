"""One base in memory, however many agents stand on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.support import save_random_model

SCRIPT = """
import resource, sys
from marft_graph import TrainConfig, Trainer
from tests.test_memory import agents_in_a_row

model, count, run = sys.argv[1], int(sys.argv[2]), sys.argv[3]
config = TrainConfig(
    base_model=model, iterations=2, examples_per_iteration=2, group_size=2, max_new_tokens=4,
    advantage="group", eval_every=0, device="cpu", lora_rank=4,
)
rows = [{"text": c} for c in "abcd"]
with Trainer(
    agents_in_a_row(count), train_dataset=rows, config=config, run_dir=run,
    reward=lambda example, state: float(len(state["text"]) % 2),
) as trainer:
    trainer.train(progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def agents_in_a_row(count: int):
    """A chain of agents, each with a prompt of the same length."""
    from typing import TypedDict

    from langchain_core.messages import HumanMessage
    from langgraph.graph import END, START, StateGraph

    from tests.apps import model

    class State(TypedDict):
        text: str

    builder = StateGraph(State)
    before = START
    for number in range(count):

        def agent(state: State) -> dict[str, str]:
            return {"text": model.invoke([HumanMessage(state["text"][:4])]).text}

        builder.add_node(f"agent_{number}", agent)
        builder.add_edge(before, f"agent_{number}")
        before = f"agent_{number}"
    builder.add_edge(before, END)
    return builder.compile()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_agents_need_little_more_memory_than_one(tmp_path: Path) -> None:
    """Peak resident memory, with a base large enough (0.2 GiB) that eight copies would show."""
    folder = save_random_model(tmp_path / "model")
    small = Qwen2Config.from_pretrained(folder)
    large = Qwen2Config(
        vocab_size=small.vocab_size,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        eos_token_id=small.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(large).save_pretrained(folder)
    peaks = []
    for count in (1, 8):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, folder, str(count), tmp_path / f"run_{count}"],
            capture_output=True,
            text=True,
            timeout=500,
            cwd=Path(__file__).parents[1],
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]) / 2**20)
    told = f"{peaks[0]:.2f} GiB with 1 agent, {peaks[1]:.2f} with 8"
    assert peaks[1] <= 1.15 * peaks[0], told
