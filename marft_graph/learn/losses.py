"""Losses of one optimizer step, as pure functions of flat axes.

N is the axis of ratios: action tokens at token level (MARFT-T), calls at action level (MARFT-A).
Sums over micro-batches equal the loss of the whole batch, because every denominator is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

_MOST_LOG_RATIO = 40.0
"""Its exponential and the square of that, as in a gradient's norm, are finite in float32."""


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip: tuple[float, float],
    denominator: int,
) -> tuple[Tensor, float]:
    """PPO's clipped objective, negated (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    L = -1/denominator * sum over n of min(rho A, clip(rho, 1 - low, 1 + high) A), with
    rho = exp(logprob - old logprob). Departure: a log-ratio counts as 40 at most, for one that
    overflows (a whole action's sum can) would turn the gradient of the batch into NaN.

    Args:
        logprobs_N: under the policy being trained.
        old_logprobs_N: as stored when sampled.
        advantages_N: constants.
        clip: (low, high), the clip range below and above 1.
        denominator: ratios in the whole optimizer step, all micro-batches together.

    Returns:
        The loss (scalar), and the share of the denominator's ratios at which the clip holds the
        gradient back.

    >>> loss, clipped = policy_loss(
    ...     torch.tensor([0.0, 1.0]), torch.zeros(2), torch.tensor([1.0, 1.0]),
    ...     clip=(0.2, 0.2), denominator=2)
    >>> round(loss.item(), 4), clipped
    (-1.1, 0.5)
    """
    low, high = clip
    ratio_N = torch.exp((logprobs_N - old_logprobs_N).clamp(max=_MOST_LOG_RATIO))
    clipped_N = ratio_N.clamp(1 - low, 1 + high)
    objective_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    held_N = torch.where(advantages_N > 0, ratio_N > 1 + high, ratio_N < 1 - low)
    held_N = held_N & (advantages_N != 0)
    return -objective_N.sum() / denominator, held_N.sum().item() / denominator


def action_logprobs(
    logprobs_N: Tensor,
    offsets: Sequence[int],
    how: Literal["sum", "token", "word"],
    words: Sequence[int] | None = None,
) -> Tensor:
    """Log-prob of each call's whole action (C,) from its tokens' (N,).

    Args:
        logprobs_N: token log-probs, call after call.
        offsets: where each call begins, and N at the end (C + 1).
        how: `sum`; `token`: the sum over the number of tokens; `word`: over the number of words.
        words: words of each call (C,), at least 1 counted; needed for `word`.

    >>> action_logprobs(torch.tensor([-1.0, -3.0, -5.0]), [0, 2, 3], "token")
    tensor([-2., -5.])
    """
    lengths_C = torch.tensor(offsets, device=logprobs_N.device).diff()
    call_N = torch.repeat_interleave(
        torch.arange(len(lengths_C), device=logprobs_N.device), lengths_C
    )
    sums_C = logprobs_N.new_zeros(len(lengths_C)).index_add(0, call_N, logprobs_N)
    if how == "sum":
        return sums_C
    if how == "token":
        return sums_C / lengths_C
    if words is None:
        raise ValueError("normalising by words needs the number of words of each call")
    return sums_C / torch.tensor(words, device=logprobs_N.device).clamp_min(1)


def importance_weights(
    logprobs_N: Tensor, sampled_N: Tensor, cap: float, offsets: Sequence[int] | None = None
) -> Tensor:
    """Truncated importance weights (N,) for tokens that another policy sampled than will learn.

    w = min(exp(logprob - sampled), cap). With an engine that has the learner's weights the two
    differ by precision and kernels alone (https://fengyao.notion.site/off-policy-rl); with one that
    is some updates behind, by those too, and w is the weight of the decoupled objective, whose
    ratio is taken to `logprobs_N` (arXiv 2110.00641; AReaL, arXiv 2505.24298).

    Args:
        logprobs_N: of the learner before its update.
        sampled_N: of the engine.
        cap: largest weight.
        offsets: where each call begins, and N at the end: one weight for a whole action, from its
            summed log-probs; None: one for each token.

    >>> importance_weights(torch.zeros(2), torch.tensor([-9.0, 0.0]), 2.0)
    tensor([2., 1.])
    """
    difference_N = logprobs_N - sampled_N
    if offsets is not None:
        lengths_C = torch.tensor(offsets, device=difference_N.device).diff()
        sums_C = action_logprobs(difference_N, offsets, "sum")
        difference_N = torch.repeat_interleave(sums_C, lengths_C)
    return difference_N.clamp(max=math.log(cap)).exp()


def kl_k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) at each sampled token (N,), in nats.

    k3 = exp(d) - 1 - d with d = reference - logprob: unbiased and never negative
    (http://joschu.net/blog/kl-approx.html).

    >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0]))
    tensor([0.])
    """
    difference_N = reference_N - logprobs_N
    return torch.expm1(difference_N) - difference_N


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    *,
    clip: float | None,
    kind: Literal["huber", "mse"],
) -> Tensor:
    """Mean over N of the loss between values and returns, values clipped around the old ones.

    With a clip the larger of the clipped and unclipped loss counts, as in PPO's reference code.
    Huber is quadratic up to an error of 1 and linear beyond; both kinds carry the factor 1/2.

    >>> value_loss(torch.tensor([0.5]), torch.zeros(1), torch.ones(1), clip=0.2, kind="mse")
    tensor(0.3200)
    """

    def error(value_N: Tensor) -> Tensor:
        if kind == "huber":
            return functional.huber_loss(value_N, returns_N, reduction="none")
        return (value_N - returns_N).square() / 2

    loss_N = error(values_N)
    if clip is not None:
        near_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        loss_N = torch.maximum(loss_N, error(near_N))
    return loss_N.mean()
