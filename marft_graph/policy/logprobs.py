"""Log-probabilities of chosen tokens from hidden states, without keeping a vocabulary of logits.

Used by the learner, and with the same temperature convention by the local engine, so that what was
sampled and what is trained are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of one chunk: 64 Mi floats are 256 MiB in fp32.
_CHUNK_ELEMENTS = 64 * 2**20


def token_logprobs(
    hidden_NH: Tensor,
    target_N: Tensor,
    temperature_N: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and entropy of its distribution (both nats, fp32).

    `head` maps hidden states to logits over `vocabulary` tokens; logits are divided by the
    temperature that the call was sampled with (0, greedy, is scored at 1). Where many tokens meet a
    large vocabulary the logits are made in chunks and made again in the backward pass.
    """

    def score(hidden_CH: Tensor, target_C: Tensor, temperature_C: Tensor) -> tuple[Tensor, Tensor]:
        logp_CV = scaled_logprobs(head(hidden_CH), temperature_C)
        chosen_C = logp_CV.gather(-1, target_C.unsqueeze(-1)).squeeze(-1)
        return chosen_C, -(logp_CV.exp() * logp_CV).sum(-1)

    rows = max(1, _CHUNK_ELEMENTS // vocabulary)
    if len(target_N) <= rows:
        chosen, entropy = score(hidden_NH, target_N, temperature_N)
        return chosen, entropy
    pieces = [
        checkpoint(score, hidden, target, temperature, use_reentrant=False)
        for hidden, target, temperature in zip(
            *(torch.split(tensor, rows) for tensor in (hidden_NH, target_N, temperature_N)),
            strict=True,
        )
    ]
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def scaled_logprobs(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Log-softmax in fp32 of logits over temperature; rows with temperature 0 are taken at 1.

    >>> scaled_logprobs(torch.tensor([[0.0, 2.0]]), torch.tensor([2.0])).exp().round(decimals=3)
    tensor([[0.2690, 0.7310]])
    """
    divisor_B = torch.where(temperature_B > 0, temperature_B, torch.ones_like(temperature_B))
    return torch.log_softmax(logits_BV.float() / divisor_B.unsqueeze(-1), dim=-1)
