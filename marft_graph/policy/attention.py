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


def attend(
    q_BHTS: Tensor, k_BKLS: Tensor, v_BKLS: Tensor, hidden_B1TL: Tensor, scale: float
) -> Tensor:
    """What the queries of H heads read from K key heads, (B, H, T, S).

    `hidden_B1TL` is added to scores: 0 for a key that a query sees, else very negative.
    """
    batch, heads, tokens, _ = q_BHTS.shape
    shared, length = heads // k_BKLS.shape[1], k_BKLS.shape[2]
    q = q_BHTS.reshape(batch, -1, shared * tokens, q_BHTS.shape[3])
    hidden = hidden_B1TL
    if shared > 1 and tokens > 1:
        hidden = hidden.unsqueeze(2).expand(-1, -1, shared, -1, -1).flatten(2, 3)
    elif shared > 1:
        hidden = hidden.expand(-1, -1, shared, -1)
    if _is_plain(q, batch * heads * tokens * length):
        scores = torch.matmul(q * scale, k_BKLS.transpose(2, 3)).add_(hidden)
        read = torch.matmul(scores.softmax(-1), v_BKLS)
    else:
        read = functional.scaled_dot_product_attention(
            q, k_BKLS, v_BKLS, attn_mask=hidden, scale=scale
        )
    return read.reshape(batch, heads, tokens, -1)


def _is_plain(q: Tensor, scores: int) -> bool:
    return q.device.type == "cpu" and q.dtype.itemsize >= 4 and scores <= _PLAIN_SCORES
