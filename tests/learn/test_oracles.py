"""Losses and a whole update against TRL's own code, which computes the same on padded tensors.

`GRPOTrainer._compute_loss` is called on a stand-in for the trainer that holds its settings and
returns the log-probs and entropies under test; everything else is TRL's.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from marft_graph.episode import Episode
from marft_graph.learn.losses import action_logprobs, importance_weights, kl_k3, policy_loss
from marft_graph.policy.logprobs import token_logprobs
from tests.learn.test_update import AGENTS, learner, sampled_episodes

LENGTHS = (3, 5, 1, 4)
OFFSETS = [0, 3, 8, 9, 13]


class Tape(dict):
    """TRL appends what it measures to lists; we do not look at it."""

    def __missing__(self, key: str) -> Any:
        self[key] = []
        return self[key]


def padded(flat_N: Tensor) -> Tensor:
    """(B, T) from the flat axis, zeros behind each row's end."""
    rows = flat_N.split(LENGTHS if len(flat_N) == sum(LENGTHS) else [len(flat_N)])
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def trl_loss(
    logps_BT: Tensor,
    old_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    entropies_BT: Tensor | None = None,
    ref_BT: Tensor | None = None,
    importance_BT: Tensor | None = None,
    low: float = 0.2,
    high: float = 0.2,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    level: str = "token",
    loss_type: str = "bnpo",
) -> Tensor:
    """TRL's loss of one batch."""
    entropies_BT = torch.zeros_like(logps_BT) if entropies_BT is None else entropies_BT
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps_BT, entropies_BT, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=importance_BT is not None,
        vllm_importance_sampling_correction=importance_BT is not None,
        model=SimpleNamespace(training=False),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=entropy_coef > 0,
        entropy_coef=entropy_coef,
        _adaptive_entropy=False,
        use_adaptive_entropy=False,
        accelerator=SimpleNamespace(
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x,
            num_processes=1,
        ),
        _metrics={"train": Tape(), "eval": Tape()},
    )
    ids = torch.zeros_like(mask_BT)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": mask_BT,
        "completion_ids": ids,
        "completion_mask": mask_BT,
        "advantages": advantages_B,
        "old_per_token_logps": old_BT,
        "ref_per_token_logps": ref_BT,
        "importance_sampling_ratio": importance_BT,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.fixture
def numbers() -> dict[str, Tensor]:
    torch.manual_seed(0)
    old = -torch.rand(13) * 3
    return {
        "old": old,
        "new": (old + 0.4 * torch.randn(13)).requires_grad_(),
        "ref": old + 0.3 * torch.randn(13),
        "advantage": torch.tensor([1.5, -0.7, 0.0, -2.0]),
        "mask": padded(torch.ones(13)).long(),
    }


def per_token(advantage_C: Tensor) -> Tensor:
    return torch.repeat_interleave(advantage_C, torch.tensor(LENGTHS))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.28)])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_token_level_loss_and_gradient_are_trls(
    numbers: dict[str, Tensor], low: float, high: float, beta: float
) -> None:
    new, old, ref = numbers["new"], numbers["old"], numbers["ref"]
    loss, _ = policy_loss(
        new, old, per_token(numbers["advantage"]), clip=(low, high), denominator=13
    )
    loss = loss + beta * kl_k3(new, ref).sum() / 13
    (ours,) = torch.autograd.grad(loss, new)
    expected = trl_loss(
        padded(new),
        padded(old),
        numbers["advantage"],
        numbers["mask"],
        ref_BT=padded(ref),
        low=low,
        high=high,
        beta=beta,
    )
    (theirs,) = torch.autograd.grad(expected, new)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_action_level_loss_by_tokens_is_trls_sequence_level(numbers: dict[str, Tensor]) -> None:
    new, old = numbers["new"], numbers["old"]
    loss, _ = policy_loss(
        action_logprobs(new, OFFSETS, "token"),
        action_logprobs(old, OFFSETS, "token"),
        numbers["advantage"],
        clip=(0.2, 0.2),
        denominator=4,
    )
    expected = trl_loss(
        padded(new),
        padded(old),
        numbers["advantage"],
        numbers["mask"],
        level="sequence",
        loss_type="grpo",
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, new)[0],
        torch.autograd.grad(expected, new)[0],
        atol=1e-5,
        rtol=1e-5,
    )


def test_truncated_importance_sampling_is_trls_correction(numbers: dict[str, Tensor]) -> None:
    new, old = numbers["new"], numbers["old"]
    sampled = old - torch.linspace(-1, 1.5, 13)  # what another engine says it sampled with
    weights = importance_weights(old, sampled, 2.0)
    loss, _ = policy_loss(
        new, old, per_token(numbers["advantage"]) * weights, clip=(0.2, 0.2), denominator=13
    )
    ratio = torch.clamp(torch.exp(padded(old) - padded(sampled)), max=2.0)  # as TRL prepares it
    expected = trl_loss(
        padded(new), padded(old), numbers["advantage"], numbers["mask"], importance_BT=ratio
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_log_probs_and_entropies_are_trls() -> None:
    torch.manual_seed(0)
    states, head = torch.randn(7, 16), torch.randn(50, 16)
    targets = torch.randint(0, 50, (7,))
    temperature = torch.tensor([1.0, 1.0, 0.5, 2.0, 1.0, 0.7, 1.3])
    logps, entropy = token_logprobs(states, targets, temperature, lambda h: h @ head.T, 50)
    logits = states @ head.T / temperature.unsqueeze(-1)
    torch.testing.assert_close(logps, selective_log_softmax(logits, targets), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, entropy_from_logits(logits), atol=1e-5, rtol=1e-5)


def by_hand(model: Any, agent: str, episodes: list[Episode], **coefficients: float) -> None:
    """One optimizer step of one agent, with transformers' forward pass and TRL's loss."""
    returns: dict[int, list[float]] = {}
    for episode in episodes:
        returns.setdefault(episode.example_index, []).append(episode.outcome_reward)
    calls = [episode.calls[AGENTS.index(agent)] for episode in episodes]
    advantages = []
    for episode in episodes:
        group = torch.tensor(returns[episode.example_index])
        deviation = group.std(unbiased=False)
        advantages.append((episode.outcome_reward - group.mean()) / (deviation + 1e-6))

    def forward() -> list[Tensor]:
        found = []
        for call in calls:
            ids = torch.tensor([call.prompt_ids + call.completion_ids])
            found.append(model(input_ids=ids).logits[0, len(call.prompt_ids) - 1 : -1])
        return found

    def logps(all_logits: list[Tensor]) -> Tensor:
        rows = [
            logits.log_softmax(-1)[range(len(call.completion_ids)), list(call.completion_ids)]
            for call, logits in zip(calls, all_logits, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    model.set_adapter("node-" + agent)
    parameters = [p for n, p in model.named_parameters() if f".node-{agent}." in n]
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(call.completion_ids), dtype=torch.long) for call in calls], batch_first=True
    )
    old = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(call.logprobs) for call in calls], batch_first=True
    )
    with model.disable_adapter(), torch.no_grad():
        reference = logps(forward())
    all_logits = forward()
    entropies = torch.nn.utils.rnn.pad_sequence(
        [entropy_from_logits(logits) for logits in all_logits], batch_first=True
    )
    beta, bonus = coefficients["kl_coef"], coefficients["entropy_coef"]
    loss = trl_loss(
        logps(all_logits), old, torch.stack(advantages), mask, ref_BT=reference, beta=beta
    )
    loss = loss - bonus * (entropies * mask).sum() / mask.sum()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def test_one_whole_update_is_that_of_transformers_and_trl(tiny_model: Path) -> None:
    coefficients = {"kl_coef": 0.05, "entropy_coef": 0.01}
    policy, own = learner(
        tiny_model, advantage="group", group_by="example", learning_rate=1.0, **coefficients
    )
    torch.manual_seed(3)
    for agent in AGENTS:  # adapters that differ from the base, so that the KL has a gradient
        for parameter in policy.adapter_parameters[agent]:
            torch.nn.init.normal_(parameter, std=0.05)
    episodes = sampled_episodes(policy, 8)
    copied, _ = learner(tiny_model, advantage="group")
    twin = copied.model
    with torch.no_grad():
        for agent in AGENTS:
            for ours, theirs in zip(
                policy.adapter_parameters[agent], copied.adapter_parameters[agent], strict=True
            ):
                theirs.copy_(ours)
    for agent in AGENTS:  # Adam's first step would blow rounding in gradients near 0 up to its rate
        assert isinstance(own.optimizers[agent], torch.optim.AdamW)
        own.optimizers[agent] = torch.optim.SGD(policy.adapter_parameters[agent], lr=1.0)
    own.update(episodes, iteration=1)
    for agent in AGENTS:
        by_hand(twin, agent, episodes, **coefficients)
        expected = [p for n, p in twin.named_parameters() if f".node-{agent}." in n]
        for ours, theirs in zip(policy.adapter_parameters[agent], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
