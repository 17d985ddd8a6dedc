"""The update against a bare PyTorch loop, and whole steps against TRL's GRPOTrainer.

    python benchmarks/update.py [--rounds 5] [--json FILE]

Floor: forward and backward of the same 64 calls through PEFT's model, logits only where answers
are, without any RL. TRL: one agent, 64 completions of 64 tokens in groups of 8, one update a step,
same model, LoRA and prompts; sampling, scoring and updating. Both with prompts of 45 and of 256
tokens, of which a group's members share all.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import HumanMessage
from langgraph.graph import END, START, StateGraph
from peft import LoraConfig, get_peft_model
from side_by_side import endless_base, in_turn, parser, publish, ratio
from transformers import AutoModelForCausalLM, AutoTokenizer

from marft_graph import TrainConfig, run_episodes
from marft_graph.agents import agents_of
from marft_graph.engine.routing import local_engine
from marft_graph.episode import Call
from marft_graph.learn.update import Learner
from marft_graph.policy.team import Team

GROUPS, GROUP_SIZE, TOKENS = 8, 8, 64
BATCH_TOKENS = 8192
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class State(TypedDict):
    """A question and its answer."""

    question: str
    answer: str


def one_node() -> Any:
    """An app with a single call."""
    model = GenericFakeChatModel(messages=iter(()))

    async def writer(state: State) -> dict[str, str]:
        return {"answer": (await model.ainvoke([HumanMessage(state["question"])])).text}

    builder = StateGraph(State)
    builder.add_node("writer", writer)
    builder.add_edge(START, "writer")
    builder.add_edge("writer", END)
    return builder.compile()


def questions(base: Path, prompt_tokens: int, count: int) -> list[str]:
    """Different questions whose rendered prompts have so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    draw = random.Random(0)

    def rendered(text: str) -> int:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return len(ids)

    length = prompt_tokens - rendered("")
    texts = ["".join(draw.choices("abcdefgh ", k=length - 2)) + "xx" for _ in range(count)]
    texts = ["x" + text[1:] for text in texts]  # neither begins nor ends with a space
    assert all(rendered(text) == prompt_tokens for text in texts)
    return texts


def reward(text: str) -> float:
    """Something that differs within a group."""
    return sum(char < "k" for char in text) / max(1, len(text))


class Ours:
    """Sampling, scoring and updating as the trainer does it."""

    def __init__(self, base: Path, texts: Sequence[str]) -> None:
        self._settings = TrainConfig(
            base_model=str(base),
            advantage="group",
            learning_rate=1e-5,
            device="cpu",
            microbatch_tokens=BATCH_TOKENS,
        )
        self._team = Team.load(agents_of(["writer"], self._settings), self._settings)
        self._engine = local_engine(self._team)
        self._learner = Learner(self._team, self._settings)
        self._graph = one_node()
        self._examples = [{"question": text} for text in texts]
        self.iteration = 0
        self.episodes = self._sample()

    def _sample(self) -> list[Any]:
        start = GROUPS * self.iteration % len(self._examples)
        return run_episodes(
            self._graph,
            self._examples[start : start + GROUPS],
            engine=self._engine,
            reward=lambda example, state: reward(state["answer"]),
            group_size=GROUP_SIZE,
            max_new_tokens=TOKENS,
            seed=self.iteration,
        )

    def update(self) -> None:
        """Learn from the newest episodes."""
        self._learner.update(self.episodes, self.iteration + 1)

    def step(self) -> None:
        """One iteration."""
        self.iteration += 1
        self.episodes = self._sample()
        self.update()
        self._engine.publish(self.iteration)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()


def bare_loop(base: Path, calls: Sequence[Call]) -> Callable[[], None]:
    """Forward, backward and a step, and nothing else."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    start = len(calls[0].prompt_ids)
    ids = torch.tensor([call.prompt_ids + call.completion_ids for call in calls])
    inner = model.get_base_model()

    def run() -> None:
        for part in ids.split(BATCH_TOKENS // ids.shape[1]):
            hidden = inner.model(input_ids=part[:, :-1]).last_hidden_state[:, start - 1 :]
            logits = inner.lm_head(hidden).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, part[:, start:].flatten())
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return run


def trl_steps(base: Path, texts: Sequence[str], steps: int) -> list[float]:
    """Seconds of each of TRL's steps."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=str(base),
            reward_funcs=lambda completions, **_: [reward(c[0]["content"]) for c in completions],
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": text}]} for text in texts]
            ),
            peft_config=LoraConfig(**LORA),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=GROUPS * GROUP_SIZE,
                num_generations=GROUP_SIZE,
                max_completion_length=TOKENS,
                max_steps=steps,
                learning_rate=1e-5,
                beta=0.0,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                gradient_checkpointing=False,
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds


def compare(base: Path, prompt_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Both comparisons for prompts of one length."""
    texts = questions(base, prompt_tokens, GROUPS * (rounds + 1))
    ours = Ours(base, texts)
    calls = [call for episode in ours.episodes for call in episode.calls]
    assert {len(call.completion_ids) for call in calls} == {TOKENS}
    updates = in_turn({"ours": ours.update, "bare loop": bare_loop(base, calls)}, rounds)
    trained = TOKENS * len(calls)
    rows = [row(prompt_tokens, "bare loop", trained, updates["bare loop"], updates["ours"])]
    steps: dict[str, list[float]] = {"ours": [], "TRL": []}
    # TRL trains in one go: half of our steps before it and half after it.
    own = in_turn({"ours": ours.step}, rounds)["ours"]
    steps["TRL"] = trl_steps(base, texts, rounds + 1)[1:]
    own += in_turn({"ours": ours.step}, rounds)["ours"]
    steps["ours"] = [
        statistics.fmean(pair) for pair in zip(own[:rounds], own[rounds:], strict=True)
    ]
    ours.close()
    return [*rows, row(prompt_tokens, "TRL GRPOTrainer", trained, steps["TRL"], steps["ours"])]


def row(
    prompt_tokens: int, peer: str, tokens: int, theirs: Sequence[float], ours: Sequence[float]
) -> dict[str, Any]:
    """A line of the table."""
    return {
        "prompt tokens": prompt_tokens,
        "against": peer,
        "its seconds": statistics.median(theirs),
        "our seconds": statistics.median(ours),
        "our trained tokens/s": tokens / statistics.median(ours),
        "ratio": ratio(theirs, ours),
    }


def main() -> None:
    """Print the table."""
    options = parser(__doc__).parse_args()
    with endless_base() as base:
        rows = [row for length in (45, 256) for row in compare(base, length, options.rounds)]
    publish(rows, options.json)


if __name__ == "__main__":
    main()
