"""Make the tiny base model from a seed: tokenizer, pretraining, measured competence.

    python workflows/tiny_base/build.py --out workflows/tiny_base

Trains on all cores of a CPU. The result is a Qwen2 that any library loads as it loads other models.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from workflows.tiny_base.languages import (
    ACTOR_PROMPT,
    CALCULATIONS,
    REASONER_PROMPT,
    ROLES,
    Conversation,
    conversation,
    notation,
    story,
    value,
)

# One special token opens each turn and one ends it, because bytes are expensive. Tools stand in a
# system turn of their own; calls are written as Qwen and Hermes write them.
TEMPLATE = (
    "{% if tools %}<|system|>"
    "{% for tool in tools %}{{ tool.function.name }}"
    "({{ tool.function.parameters.properties | join(',') }}) {% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": {{ call.function.name | tojson }}, "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END = "<|end|>"
PART = 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and six special tokens, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token="<|pad|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """An untrained Qwen2 of 0.8 M parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, example: Conversation) -> tuple[list[int], int]:
    """Ids of a conversation, and where its last assistant message begins."""
    messages, tools = example
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tools=tools or None, add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer = tokenizer.encode(messages[-1]["content"] + END, add_special_tokens=False)
    return ids + answer, len(ids)


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch: int,
    seed: int,
    peak: float = 3e-3,
) -> None:
    """AdamW with warm-up and cosine; cross-entropy over assistant tokens only."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=steps, pct_start=0.1
    )
    started = time.perf_counter()
    for step in range(1, steps + 1):
        examples = [encode(tokenizer, conversation(rng)) for _ in range(batch)]
        examples.sort(key=lambda example: len(example[0]))
        targets = sum(len(ids) - start for ids, start in examples)
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for first in range(0, batch, PART):  # of similar length: less padding
            part = summed_loss(model, examples[first : first + PART]) / targets
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"step {step}/{steps}  loss {loss:.4f}  {seconds:.0f} s", flush=True)


def summed_loss(model: Qwen2ForCausalLM, examples: list[tuple[list[int], int]]) -> torch.Tensor:
    """Cross-entropy summed over the assistant tokens of some encoded conversations."""
    longest = max(len(ids) for ids, _ in examples)
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in examples])
    target_BT = torch.tensor(
        [[-100] * start + ids[start:] + [-100] * (longest - len(ids)) for ids, start in examples]
    )
    states_BTH = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    is_target_BT = target_BT[:, 1:] >= 0
    logits_NV = model.lm_head(states_BTH[is_target_BT])
    return torch.nn.functional.cross_entropy(
        logits_NV, target_BT[:, 1:][is_target_BT], reduction="sum"
    )


@torch.no_grad()
def answers(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str, str]]
) -> list[float]:
    """Probability that the model writes exactly `answer`, for (system, user, answer) turns."""
    result = []
    for system, user, answer in turns:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        ids, start = encode(tokenizer, ([*messages, {"role": "assistant", "content": answer}], []))
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        scores = logits[range(start - 1, len(ids) - 1), ids[start:]]
        result.append(float(scores.sum().exp()))
    return result


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """How well each notation is written and read, as probabilities averaged over 200 problems."""
    rng = random.Random(12345)
    written: dict[str, list[float]] = {"infix": [], "prefix": [], "words": []}
    read: dict[str, list[float]] = {"infix": [], "prefix": [], "words": []}
    for a, operation, b in rng.sample(CALCULATIONS, 200):
        question = story(a, operation, b, rng)
        forms = {form: notation(a, operation, b, form) for form in written}
        turns = [(REASONER_PROMPT, question, text) for text in forms.values()]
        for form, chance in zip(forms, answers(model, tokenizer, turns), strict=True):
            written[form].append(chance)
        right = str(value(a, operation, b))
        turns = [(ACTOR_PROMPT, f"{question}\n{text}", right) for text in forms.values()]
        for form, chance in zip(forms, answers(model, tokenizer, turns), strict=True):
            read[form].append(chance)

    def mean(numbers: list[float]) -> float:
        return round(sum(numbers) / len(numbers), 4)

    return {
        **{f"reasoner writes it right, in {form}": mean(c) for form, c in written.items()},
        "reasoner writes it right, in any": mean(
            [sum(c) for c in zip(*written.values(), strict=True)]
        ),
        **{f"actor reads {form} and answers right in digits": mean(c) for form, c in read.items()},
        "return of the duo, sampled": mean(
            [
                sum(w * r for w, r in zip(writing, reading, strict=True))
                for writing, reading in zip(
                    zip(*written.values(), strict=True),
                    zip(*read.values(), strict=True),
                    strict=True,
                )
            ]
        ),
    }


def shortcomings(measured: Mapping[str, float]) -> list[str]:
    """In what the model is not as the workflows need it; empty if it is."""
    ranges = {
        "reasoner writes it right, in any": (0.97, 1.0),
        "actor reads infix and answers right in digits": (0.35, 0.45),
        "return of the duo, sampled": (0.0, 0.3),
    }
    return [
        f"{name}: {measured[name]:.2f} is not within {low} to {high}"
        for name, (low, high) in ranges.items()
        if not low <= measured[name] <= high
    ]


def main() -> None:
    """Build the model and refuse one that is incompetent or already coordinated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=5600, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=48, help="conversations in a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(ROLES)} roles")
    pretrain(model, tokenizer, steps=options.steps, batch=options.batch, seed=options.seed)
    model.eval()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    measured = measure(model, tokenizer)
    print("\n".join(f"| {name} | {share:.2f} |" for name, share in measured.items()))
    if problems := shortcomings(measured):
        sys.exit("; ".join(problems) + ": train longer or with another seed")


if __name__ == "__main__":
    main()
