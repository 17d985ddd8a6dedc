"""Real data, end to end: train math_duo on GSM8K with a model of 30 M parameters made here.

    python benchmarks/gsm8k.py --data DIR --out runs/gsm8k

DIR holds GSM8K's parquet files (`*train*.parquet`, `*test*.parquet`). The model is a Qwen2 with
random weights and a byte-pair tokenizer trained on the data's own text, so returns stay near zero:
what is measured is that the whole road works on real text, its time, and its peak memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from workflows.math_duo.task import load_data

WORKFLOW = Path(__file__).parents[1] / "workflows" / "math_duo"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = 10_000


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of 10,000 tokens in Qwen's format."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(data: str, folder: Path) -> None:
    """Write the tokenizer and an untrained Qwen2 of about 30 M parameters to a folder."""
    train, _ = load_data(data)
    texts = [f"{row['question']}\n{row['solution']}\n{row['answer']}" for row in train]
    tokenizer = make_tokenizer(texts)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = sum(p.numel() for p in model.parameters())
    print(f"model: {size / 1e6:.1f} M parameters, {len(tokenizer)} tokens")


def run(*command: str) -> None:
    """Run a command of the package; print its time and the most memory a child has held so far."""
    print("$ marft-graph", " ".join(command), flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "marft_graph", *command], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s, peak resident memory {peak:.2f} GiB", flush=True)


def bind_and_ask(data: str, export: Path) -> None:
    """Answer one held-out question with the trained adapters inside the app."""
    from marft_graph import bind
    from marft_graph.workflow import load_target

    _, held_out = load_data(data)
    app = bind(load_target(str(WORKFLOW)).graph, export)
    state = app.invoke({"question": held_out[0]["question"]})
    print(
        f"bound app: plan of {len(state['plan'])} and answer of {len(state['answer'])} characters"
    )


def main() -> None:
    """Make the model, then train, evaluate, export and bind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with GSM8K's parquet files")
    parser.add_argument("--out", type=Path, required=True, help="new folder for model and run")
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"{options.out} exists; give a new folder")
    options.out.mkdir(parents=True)
    make_model(options.data, options.out / "model")
    run_dir, adapters = options.out / "run", options.out / "adapters"
    run(
        "train",
        str(WORKFLOW),
        *("--run-dir", str(run_dir), "--dataset", options.data),
        *("--base-model", str(options.out / "model")),
        *("--iterations", "3", "--examples-per-iteration", "8", "--group-size", "4"),
        *("--eval-examples", "64"),
    )
    run("export", str(run_dir), str(adapters))
    run(
        "eval",
        str(WORKFLOW),
        *("--adapters", str(adapters), "--dataset", options.data),
        *("--examples", "64"),
    )
    bind_and_ask(options.data, adapters)


if __name__ == "__main__":
    main()
