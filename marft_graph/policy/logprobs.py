"""Log-probabilities of chosen tokens from hidden states, without keeping a vocabulary of logits.

Used by the learner, and with the same temperature convention by the local engine, so that what was
sampled and what is trained are the same numbers. Both mask what a grammar forbids by `constrained`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of one chunk: 16 Mi floats are 64 MiB in fp32, and there are several such tensors.
_CHUNK_ELEMENTS = 16 * 2**20
# The logit of a token that a grammar forbids: its probability is exactly 0 at any temperature, and
# 0 times its log-prob is still a number.
FORBIDDEN = -1e30


def token_logprobs(
    hidden_NH: Tensor,
    target_N: Tensor,
    temperature_N: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    allowed_NW: Tensor | None = None,
    *,
    is_entropy_learnt: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and entropy of its distribution (both nats, fp32).

    `head` maps hidden states to logits over `vocabulary` tokens; logits are divided by the
    temperature that the call was sampled with (0, greedy, is scored at 1). `allowed_NW` has the
    bits that `constrained` takes, for tokens sampled under a grammar; None: all tokens were free.
    Without `is_entropy_learnt` the entropies are numbers without a gradient.
    Where many tokens meet a large vocabulary the logits are made in chunks and made again in the
    backward pass.
    """

    def score(
        hidden_CH: Tensor, target_C: Tensor, temperature_C: Tensor, allowed_CW: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits_CV = head(hidden_CH)
        if allowed_CW is not None:
            logits_CV = constrained(logits_CV, allowed_CW)
        logp_CV = scaled_logprobs(logits_CV, temperature_C)
        chosen_C = logp_CV.gather(-1, target_C.unsqueeze(-1)).squeeze(-1)
        with contextlib.nullcontext() if is_entropy_learnt else torch.no_grad():
            entropy_C = -(logp_CV.exp() * logp_CV).sum(-1)
        return chosen_C, entropy_C

    rows = max(1, _CHUNK_ELEMENTS // vocabulary)
    if len(target_N) <= rows:
        chosen, entropy = score(hidden_NH, target_N, temperature_N, allowed_NW)
        return chosen, entropy
    parts = [torch.split(tensor, rows) for tensor in (hidden_NH, target_N, temperature_N)]
    free = (None,) * len(parts[0])
    allowed = free if allowed_NW is None else torch.split(allowed_NW, rows)
    pieces = [
        checkpoint(score, *part, use_reentrant=False) for part in zip(*parts, allowed, strict=True)
    ]
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def scaled_logprobs(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Log-softmax in fp32 of logits over temperature; rows with temperature 0 are taken at 1.

    >>> scaled_logprobs(torch.tensor([[0.0, 2.0]]), torch.tensor([2.0])).exp().round(decimals=3)
    tensor([[0.2690, 0.7310]])
    """
    divisor_B = torch.where(temperature_B > 0, temperature_B, torch.ones_like(temperature_B))
    return torch.log_softmax(logits_BV.float() / divisor_B.unsqueeze(-1), dim=-1)


def constrained(logits_BV: Tensor, allowed_BW: Tensor) -> Tensor:
    """Logits in fp32, `FORBIDDEN` where a token's bit is 0: token i is bit i % 32 of word i // 32.

    The softmax of what is left is the model's distribution given that the token is allowed.

    >>> constrained(torch.zeros(1, 3), torch.tensor([[5]], dtype=torch.int32))
    tensor([[ 0.0000e+00, -1.0000e+30,  0.0000e+00]])
    """
    bytes_BN = allowed_BW.contiguous().view(torch.uint8)
    bit = torch.arange(8, dtype=torch.uint8, device=allowed_BW.device)
    forbidden = (bytes_BN.bitwise_not().unsqueeze(-1) >> bit) & 1
    forbidden_BV = forbidden.view(torch.bool).flatten(1)[:, : logits_BV.shape[-1]]
    return logits_BV.float().masked_fill(forbidden_BV, FORBIDDEN)
