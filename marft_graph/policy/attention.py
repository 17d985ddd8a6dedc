"""Attention in which queries that share a key head stand side by side: no key is copied for them.

Where scores are few, as of one token or a short answer for each row, a CPU takes plain products for
them; torch's fused attention starts a product for each row and head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_PLAIN_SCORES = 2**19
"""Up to so many stay in a processor's cache."""


def attend(q_BHTS: Tensor, k_BKLS: Tensor, v_BKLS: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """What the queries of H heads read from K key heads, (B, H, T, S).

    `hidden` (B, 1, T H / K, L) is added to scores: 0 for a key that a query sees, else very
    negative; `for_sharing` makes it.
    """
    batch, heads, tokens, _ = q_BHTS.shape
    q = q_BHTS.reshape(batch, k_BKLS.shape[1], -1, q_BHTS.shape[3])
    if _is_plain(q, batch * heads * tokens * k_BKLS.shape[2]):
        scores = torch.matmul(q * scale, k_BKLS.transpose(2, 3)).add_(hidden)
        read = torch.matmul(scores.softmax(-1), v_BKLS)
    else:
        read = functional.scaled_dot_product_attention(
            q, k_BKLS, v_BKLS, attn_mask=hidden, scale=scale
        )
    return read.reshape(batch, heads, tokens, -1)


def for_sharing(hidden_B1TL: Tensor, heads: int) -> Tensor:
    """The same for so many queries of each token, which share a key head.

    A backward pass needs it as well, so layers should be given the same one.
    """
    if hidden_B1TL.shape[2] == 1:
        return hidden_B1TL.expand(-1, -1, heads, -1)
    return hidden_B1TL.repeat(1, 1, heads, 1) if heads > 1 else hidden_B1TL


def _is_plain(q: Tensor, scores: int) -> bool:
    return q.device.type == "cpu" and q.dtype.itemsize >= 4 and scores <= _PLAIN_SCORES
