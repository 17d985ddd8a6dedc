"""How the paper's reference code trains, written from its description, as a baseline for speed.

A whole base model for each agent; agent after agent samples one static left-padded batch; the whole
batch then goes through the model with logits of the full vocabulary at every position, once for the
log-probs of what was sampled and once more with gradients; the critic has a pass of its own through
the model in either place; tokens are picked example by example in Python. Its other habits (a
second useless forward pass, another temperature in scoring) are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


class ReferencePattern:
    """Agents in a chain: each reads the question and what the agents before it wrote."""

    def __init__(
        self, base: Path, agents: Sequence[str], tokens: int, minibatch: int, rate: float = 1e-5
    ) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self._models = {
            agent: get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(lora))
            for agent in agents
        }
        width = next(iter(self._models.values())).config.hidden_size
        self._critics = {
            agent: nn.Sequential(nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 1))
            for agent in agents
        }
        self._optimizers = {
            agent: torch.optim.AdamW(
                [
                    *(p for p in model.parameters() if p.requires_grad),
                    *self._critics[agent].parameters(),
                ],
                lr=rate,
            )
            for agent, model in self._models.items()
        }
        self._tokens = tokens
        self._minibatch = minibatch

    def iteration(self, questions: Sequence[str], reward: Callable[[str], float]) -> int:
        """Sample, score and update; how many tokens were sampled."""
        texts = list(questions)
        rollouts = {}
        for agent in self._models:
            rollouts[agent] = (ids, start) = self._sample(agent, texts)
            answers = self._tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
            texts = [f"{text}\n{answer}" for text, answer in zip(texts, answers, strict=True)]
        rewards = torch.tensor([reward(text) for text in texts])
        for agent, (ids, start) in rollouts.items():
            with torch.no_grad():
                parts = self._parts(ids)
                old = torch.cat([self._logprobs(agent, part, start) for part in parts])
                values = torch.cat([self._values(agent, part, start) for part in parts])
            advantages = rewards - values
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
            self._update(agent, ids, start, old, advantages, rewards)
        return sum(ids[:, start:].numel() for ids, start in rollouts.values())

    @torch.no_grad()
    def _sample(self, agent: str, texts: Sequence[str]) -> tuple[Tensor, int]:
        prompts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
        batch = self._tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        )
        ids: Tensor = self._models[agent].generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self._tokens,
            min_new_tokens=self._tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        return ids, batch["input_ids"].shape[1]

    def _parts(self, ids: Tensor) -> tuple[Tensor, ...]:
        return ids.split(self._minibatch)

    def _logprobs(self, agent: str, ids: Tensor, start: int) -> Tensor:
        """(B, tokens): log-probs of what was sampled, from logits at every position."""
        mask = (ids != self._tokenizer.pad_token_id).long()
        logits = self._models[agent](input_ids=ids, attention_mask=mask).logits
        rows = []
        for example in range(len(ids)):
            logp = torch.log_softmax(logits[example].float(), dim=-1)
            picked = [logp[t - 1, ids[example, t]] for t in range(start, ids.shape[1])]
            rows.append(torch.stack(picked))
        return torch.stack(rows)

    def _values(self, agent: str, ids: Tensor, start: int) -> Tensor:
        """(B,): the critic's values where the prompts end, from a pass through the base alone."""
        mask = (ids[:, :start] != self._tokenizer.pad_token_id).long()
        with torch.no_grad(), self._models[agent].disable_adapter():
            output = self._models[agent](
                input_ids=ids[:, :start], attention_mask=mask, output_hidden_states=True
            )
        values: Tensor = self._critics[agent](output.hidden_states[-1][:, -1])
        return values.squeeze(-1)

    def _update(
        self,
        agent: str,
        ids: Tensor,
        start: int,
        old: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> None:
        optimizer = self._optimizers[agent]
        for first in range(0, len(ids), self._minibatch):
            part = slice(first, first + self._minibatch)
            ratio = (self._logprobs(agent, ids[part], start) - old[part]).exp()
            weight = advantages[part, None]
            clipped = ratio.clamp(0.8, 1.2)
            loss = -torch.minimum(ratio * weight, clipped * weight).mean()
            error = self._values(agent, ids[part], start) - returns[part]
            loss = loss + 0.5 * error.square().mean()
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
