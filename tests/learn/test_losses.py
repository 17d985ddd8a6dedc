"""Losses against hand arithmetic, finite differences and their invariants."""

from __future__ import annotations

import math

import pytest
import torch

from marft_graph.learn.losses import action_logprobs, kl_k3, policy_loss, value_loss

CLIP = (0.2, 0.2)


def test_zero_advantage_gives_zero_gradient() -> None:
    logprobs = torch.tensor([-1.0, -0.1, -3.0], requires_grad=True)
    loss, clipped = policy_loss(
        logprobs, torch.tensor([-1.0, -2.0, -1.0]), torch.zeros(3), clip=CLIP, denominator=3
    )
    loss.backward()
    assert loss.item() == 0.0
    assert clipped == 0.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, 0.0, 0.0]


def test_at_ratio_one_the_gradient_is_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -0.5], requires_grad=True)
    advantages = torch.tensor([2.0, -3.0])
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, clip=CLIP, denominator=4)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)  # -(2 - 3) / 4
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.5, 0.75])  # -A / 4


def test_asymmetric_clip_by_hand() -> None:
    ratios = torch.tensor([1.25, 1.5, 0.85, 0.5, 1.5, 0.5])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    logprobs = ratios.log().requires_grad_()
    loss, clipped = policy_loss(
        logprobs, torch.zeros(6), advantages, clip=(0.2, 0.3), denominator=6
    )
    # 1.25 is inside (up to 1.3), 1.5 is cut to 1.3; 0.85 is inside, 0.5 is cut to 0.8;
    # the last two are the pessimistic side, which is never cut.
    assert loss.item() == pytest.approx(-(1.25 + 1.3 - 0.85 - 0.8 - 1.5 + 0.5) / 6)
    assert clipped == pytest.approx(2 / 6)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(
        [-1.25 / 6, 0.0, 0.85 / 6, 0.0, 1.5 / 6, -0.5 / 6], abs=1e-6
    )


def test_eight_micro_batches_of_one_equal_one_of_eight() -> None:
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(8, generator=generator, dtype=torch.float64) - 2
    start = old + 0.3 * torch.randn(8, generator=generator, dtype=torch.float64)
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    gradients, losses, shares = [], [], []
    for size in (8, 1):
        logprobs = start.clone().requires_grad_()
        total, share = 0.0, 0.0
        for part in torch.arange(8).split(size):
            loss, clipped = policy_loss(
                logprobs[part], old[part], advantages[part], clip=CLIP, denominator=8
            )
            loss.backward()
            total, share = total + loss.item(), share + clipped
        assert logprobs.grad is not None
        gradients.append(logprobs.grad)
        losses.append(total)
        shares.append(share)
    assert torch.equal(gradients[0], gradients[1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert shares[0] == pytest.approx(shares[1])


def test_gradient_equals_finite_differences() -> None:
    old = torch.tensor([-1.0, -2.0, -0.3, -0.7], dtype=torch.float64)
    logprobs = torch.tensor([-0.7, -1.5, -0.5, -0.75], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return policy_loss(x, old, advantages, clip=CLIP, denominator=4)[0]

    assert torch.autograd.gradcheck(loss, (logprobs,))


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_an_exploding_ratio_leaves_loss_and_gradient_finite(advantage: float) -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    loss, _ = policy_loss(
        logprobs, torch.tensor([-500.0]), torch.tensor([advantage]), clip=CLIP, denominator=1
    )
    loss.backward()
    assert math.isfinite(loss.item())
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()


def test_action_logprobs_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    offsets = [0, 3, 5]
    assert action_logprobs(logprobs, offsets, "sum").tolist() == [-6.0, -9.0]
    assert action_logprobs(logprobs, offsets, "token").tolist() == [-2.0, -4.5]
    assert action_logprobs(logprobs, offsets, "word", [2, 1]).tolist() == [-3.0, -9.0]
    # An answer without a word still divides by one.
    assert action_logprobs(logprobs, offsets, "word", [0, 3]).tolist() == [-6.0, -3.0]


def test_words_must_be_counted_to_divide_by_them() -> None:
    with pytest.raises(ValueError, match="number of words"):
        action_logprobs(torch.zeros(1), [0, 1], "word")


def test_action_logprobs_pass_gradients_to_their_own_tokens_only() -> None:
    logprobs = torch.zeros(3, requires_grad=True)
    action_logprobs(logprobs, [0, 2, 3], "token")[0].backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.5, 0.5, 0.0]


def test_kl_k3_by_hand_and_unbiased() -> None:
    # difference ln 2: 2 - 1 - ln 2; difference -ln 2: 0.5 - 1 + ln 2
    estimate = kl_k3(torch.tensor([0.0, 0.0]), torch.tensor([math.log(2), -math.log(2)]))
    assert estimate.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5], abs=1e-6)
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    expected = (policy * kl_k3(policy.log(), reference.log())).sum()
    assert expected.item() == pytest.approx(exact.item())


def test_value_loss_by_hand() -> None:
    values, returns = torch.tensor([0.5, 3.0]), torch.tensor([1.0, 1.0])
    far = torch.tensor([9.0, 9.0])
    assert value_loss(values, far, returns, clip=None, kind="mse").item() == pytest.approx(
        (0.125 + 2.0) / 2
    )
    # Huber: 0.5 * 0.5^2 and 2 - 0.5
    assert value_loss(values, far, returns, clip=None, kind="huber").item() == pytest.approx(
        (0.125 + 1.5) / 2
    )


def test_a_clipped_value_counts_the_larger_loss_and_has_no_gradient_beyond() -> None:
    old, returns = torch.tensor([0.0]), torch.tensor([1.0])
    moved = torch.tensor([0.5], requires_grad=True)
    loss = value_loss(moved, old, returns, clip=0.2, kind="mse")
    loss.backward()
    assert loss.item() == pytest.approx(0.32)  # (1 - 0.2)^2 / 2, larger than (1 - 0.5)^2 / 2
    assert moved.grad is not None
    assert moved.grad.item() == 0.0
