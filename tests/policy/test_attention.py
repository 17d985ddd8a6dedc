"""Attention with shared key heads: both ways of it against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marft_graph.policy import attention
from marft_graph.policy.attention import attend, for_sharing


def by_formula(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    return (q @ k.transpose(2, 3) * scale + hidden).softmax(-1) @ v


@pytest.mark.parametrize("plain", [0, 2**19])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_read_and_its_gradients(
    plain: int, heads: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_PLAIN_SCORES", plain)
    torch.manual_seed(0)
    q = torch.randn(3, heads, tokens, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(3, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    hidden = torch.where(torch.rand(3, 1, tokens, 7) < 0.3, -1e9, 0.0).double()
    hidden[..., 0] = 0
    ours = attend(q, k, v, for_sharing(hidden, heads // 2), 0.3)
    theirs = by_formula(q, k, v, hidden, 0.3)
    torch.testing.assert_close(ours, theirs)
    own = torch.autograd.grad(ours.square().sum(), (q, k, v))
    for gradient, expected in zip(
        own, torch.autograd.grad(theirs.square().sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(gradient, expected)
