"""Supervised fine-tuning of adapters on demonstrations: RL then starts from a student.

The loss is over the answer's tokens alone, under the prompt as it is rendered in a rollout. Answers
whose prompts begin alike share a row. Log-probs are those of the PPO update.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from langchain_core.messages import AIMessage, BaseMessage

from marft_graph.config import MICROBATCH_TOKENS
from marft_graph.episode import Call
from marft_graph.errors import DatasetError, TrainingCollapsedError
from marft_graph.learn.batches import microbatches, score
from marft_graph.names import agent_of_adapter
from marft_graph.policy.adapters import Policy
from marft_graph.policy.team import Team

logger = logging.getLogger(__name__)

Stats = dict[str, float]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One answer of one node, and what it answered."""

    node: str
    """Agent path."""
    prompt: tuple[BaseMessage, ...]
    answer: AIMessage
    tools: tuple[dict[str, Any], ...] = ()
    """Schemas in OpenAI form."""
    prompt_ids: tuple[int, ...] = ()
    """As sampled, where an adapter wrote the answer; else empty, as `completion_ids` are."""
    completion_ids: tuple[int, ...] = ()


def imitate(
    team: Team,
    demonstrations: Iterable[Demonstration],
    adapters: Mapping[str, str],
    *,
    epochs: int = 3,
    batch_size: int = 16,
    learning_rate: float | Mapping[str, float] = 1e-4,
    microbatch_tokens: int = MICROBATCH_TOKENS,
    max_grad_norm: float = 1.0,
    seed: int = 0,
) -> dict[str, Stats]:
    """Fine-tune each node's adapter on its demonstrations, in place.

    Args:
        team: the policies; nodes that share an adapter are learnt together.
        demonstrations: of nodes in `adapters`; others are left out, and logged.
        adapters: agent path -> adapter.
        epochs: passes over the demonstrations.
        batch_size: answers in an optimizer step.
        learning_rate: AdamW step, of all adapters or by adapter; it falls linearly to 0.
        microbatch_tokens: padded tokens in one forward pass.
        max_grad_norm: gradient clipping.
        seed: of the order.

    Returns:
        By adapter: `demonstrations`, their `tokens`, those `too_long` for the model, and the mean
        loss per answer token (nats) of the first pass, `loss_first`, and of the last, `loss_last`.

    Raises:
        DatasetError: no demonstration is of a trained node, or none of a node fits the context.
        TrainingCollapsedError: the loss is not finite.
    """
    by_agent: dict[str, list[Demonstration]] = {}
    others: dict[str, int] = {}
    for demonstration in demonstrations:
        agent = adapters.get(demonstration.node)
        if agent is None:
            others[demonstration.node] = others.get(demonstration.node, 0) + 1
        else:
            by_agent.setdefault(agent, []).append(demonstration)
    if not by_agent:
        raise DatasetError(
            f"the demonstrations are of {', '.join(others) or 'no node'}; trained are "
            f"{', '.join(adapters)}"
        )
    for node, count in others.items():
        logger.warning("%d demonstrations of %r are left out: it is not trained", count, node)
    stats = {}
    for agent, own in by_agent.items():
        policy = team.of(agent)
        calls = [call for one in own if (call := as_call(one, agent, policy)) is not None]
        if not calls:
            raise DatasetError(
                f"{agent_of_adapter(agent)}: none of its {len(own)} demonstrations fits the "
                f"model's context of {policy.codec.context_length} tokens"
            )
        rate = learning_rate[agent] if isinstance(learning_rate, Mapping) else learning_rate
        losses = _fit(
            policy,
            agent,
            calls,
            epochs=epochs,
            batch_size=batch_size,
            rate=rate,
            microbatch_tokens=microbatch_tokens,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )
        stats[agent] = {
            "demonstrations": float(len(calls)),
            "tokens": float(sum(len(call.completion_ids) for call in calls)),
            "too_long": float(len(own) - len(calls)),
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }
    return stats


def as_call(demonstration: Demonstration, agent: str, policy: Policy) -> Call | None:
    """A demonstration as prompt and answer tokens; None where it does not fit the context.

    Token ids that were sampled are kept where they still say what was recorded; text is rendered.

    Raises:
        DatasetError: the chat template does not write the answer after its prompt.
    """
    codec = policy.codec
    prompt_ids, answer_ids = demonstration.prompt_ids, demonstration.completion_ids
    if not answer_ids or not _says(policy, demonstration):
        messages = (*demonstration.prompt, demonstration.answer)
        try:
            prompt_ids, answer_ids = codec.render_answer(
                messages, demonstration.tools, policy.end_ids
            )
        except ValueError as error:
            raise DatasetError(f"a demonstration of {demonstration.node!r}: {error}") from error
    if len(prompt_ids) + len(answer_ids) > codec.context_length:
        return None
    return Call(
        agent=agent,
        node=demonstration.node,
        index=0,
        parents=(),
        prompt_ids=tuple(prompt_ids),
        completion_ids=tuple(answer_ids),
        logprobs=(0.0,) * len(answer_ids),
        finish_reason="stop",
        adapter_version=0,
    )


def _says(policy: Policy, demonstration: Demonstration) -> bool:
    """Whether recorded ids are of this model's tokenizer: they read as the recorded answer."""
    ids = demonstration.completion_ids
    if max((*ids, *demonstration.prompt_ids)) >= policy.vocabulary:
        return False
    read = policy.codec.parse(ids, tools=demonstration.tools)
    calls = [[(c["name"], c["args"]) for c in m.tool_calls] for m in (read, demonstration.answer)]
    return read.text == demonstration.answer.text and calls[0] == calls[1]


def _fit(
    policy: Policy,
    agent: str,
    calls: Sequence[Call],
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    microbatch_tokens: int,
    max_grad_norm: float,
    seed: int,
) -> list[float]:
    """Mean loss per answer token of each pass."""
    parameters = policy.adapter_parameters[agent]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * -(-len(calls) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for epoch in range(epochs):
        order = list(range(len(calls)))
        random.Random(f"{seed} {epoch}").shuffle(order)
        total = 0.0
        for start in range(0, len(order), batch_size):
            batch = [calls[i] for i in order[start : start + batch_size]]
            total += _backward(policy, agent, batch, microbatch_tokens)
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            if not torch.isfinite(norm):
                optimizer.zero_grad(set_to_none=True)
                raise TrainingCollapsedError(
                    f"{agent_of_adapter(agent)}: the gradient's norm on demonstrations is "
                    f"{norm:g}; no step was made"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        losses.append(total / sum(len(call.completion_ids) for call in calls))
    return losses


def _backward(policy: Policy, agent: str, batch: Sequence[Call], microbatch_tokens: int) -> float:
    """Accumulate the gradient of the batch's mean loss per token; the sum of its losses."""
    count = sum(len(call.completion_ids) for call in batch)
    total = 0.0
    for rows in microbatches(batch, microbatch_tokens, quadratic=policy.attention_cost):
        with policy.using(agent):
            _, logprobs_N, _ = score(policy, batch, rows, is_entropy_learnt=False)
            loss = -logprobs_N.sum()
            torch.autograd.backward(loss / count)
        total += loss.item()
    return total
