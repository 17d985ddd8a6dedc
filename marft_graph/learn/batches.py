"""Calls as tensors: which tokens go through the model, and which of them were actions.

Calls that begin alike (a group's episodes, a conversation's turns) share a row: what they have in
common goes through the model once, and each token sees only what came before it in its own call.
That is exact, and gradients add up in the shared tokens. A batch's action tokens are one
flat axis N, in the order of its calls, so that nothing is ever masked there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from marft_graph.episode import Call
from marft_graph.policy.adapters import Policy
from marft_graph.policy.grammar import Grammars
from marft_graph.policy.logprobs import token_logprobs
from marft_graph.policy.rows import Row, lay_out

_BATCH_TOKENS = 256
"""What a batch costs besides its tokens, in tokens; measured on a small model."""


@dataclass(frozen=True, slots=True)
class CallBatch:
    """The action tokens of some rows of calls, and where their states stand."""

    row_N: Tensor
    """Row of each action token."""
    state_N: Tensor
    """Column of the state in which each action token was sampled: one before the token's own."""
    target_N: Tensor
    """The action tokens."""
    temperature_N: Tensor


def microbatches(
    calls: Sequence[Call],
    max_tokens: int,
    *,
    quadratic: float = 0.0,
    longest_row: int = sys.maxsize,
    kept_tokens: int = sys.maxsize,
) -> Iterator[list[Row]]:
    """Rows of calls, cut into batches of rows of about one length, the longest first.

    A padded batch has at most `max_tokens`; a call longer than that is a batch of its own. A row's
    members are indices of calls; which of them share one, and `quadratic`, see `lay_out`. Rows that
    calls share have at most `longest_row` tokens, batches of several rows at most `kept_tokens`.

    >>> def call(*prompt: int) -> Call:
    ...     return Call("a", "a", 0, (), prompt, (0,), (0.0,), "stop", 0)
    >>> calls = [call(1, 2, 3), call(5, 6), call(1, 2, 4)]
    >>> [[(row.members, row.ids) for row in rows] for rows in microbatches(calls, max_tokens=100)]
    [[([0, 2], [1, 2, 3, 4]), ([1], [5, 6])]]
    """
    sequences = [(call.prompt_ids + call.completion_ids)[:-1] for call in calls]
    rows = lay_out(sequences, min(max_tokens, longest_row), quadratic=quadratic)
    rows.sort(key=lambda row: (-row.length, row.members[0]))
    if any(len(row.members) > 1 for row in rows):
        quadratic = 0.0  # attention by `Segments` costs the same, whatever rows are padded to
    start = 0
    for end in _cuts([row.length for row in rows], min(max_tokens, kept_tokens), quadratic):
        yield rows[start:end]
        start = end


def _cuts(lengths: Sequence[int], max_tokens: int, quadratic: float) -> list[int]:
    """Where to end batches of rows, which are sorted, so that padding and batches cost least."""
    least = [0.0] + [math.inf] * len(lengths)
    """Cost of the first so many rows."""
    begin = [0] * (len(lengths) + 1)
    """Where the last batch of the first so many rows begins."""
    for start, longest in enumerate(lengths):
        row = longest + quadratic * longest**2
        for count in range(1, max(1, min(max_tokens // longest, len(lengths) - start)) + 1):
            cost = least[start] + _BATCH_TOKENS + count * row
            if cost < least[start + count]:
                least[start + count], begin[start + count] = cost, start
    cuts = [len(lengths)] if lengths else []
    while cuts and begin[cuts[-1]] > 0:
        cuts.append(begin[cuts[-1]])
    return cuts[::-1]


def collate(calls: Sequence[Call], rows: Sequence[Row], device: torch.device) -> CallBatch:
    """One batch of rows of calls; action tokens in the order in which the rows have the calls."""
    row_N: list[np.ndarray] = []
    state_N: list[np.ndarray] = []
    target_N: list[int] = []
    temperature_N: list[float] = []
    for place, row in enumerate(rows):
        for index, path in zip(row.members, row.paths, strict=True):
            call = calls[index]
            count = len(call.completion_ids)
            row_N.append(np.full(count, place))
            state_N.append(path[len(path) - count :])
            target_N += call.completion_ids
            temperature_N += [call.temperature] * count
    return CallBatch(
        torch.from_numpy(np.concatenate(row_N)).to(device),
        torch.from_numpy(np.concatenate(state_N)).to(device),
        torch.tensor(target_N, device=device),
        torch.tensor(temperature_N, device=device),
    )


def score(
    policy: Policy, calls: Sequence[Call], rows: Sequence[Row], *, is_entropy_learnt: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """States (N, H), log-probs (N,) and entropies (N,) of the action tokens of rows' calls.

    Under the adapter that the policy uses now; `rows` is a batch as `microbatches` makes it.
    """
    inputs = collate(calls, rows, policy.device)
    laid_out = [calls[index] for row in rows for index in row.members]
    allowed_NW = None
    if any(call.grammar for call in laid_out):
        allowed_NW = allowed_tokens(laid_out, policy.grammars).to(policy.device)
    states_NH = policy.states_of(rows, inputs.row_N, inputs.state_N)
    logprobs_N, entropy_N = token_logprobs(
        states_NH,
        inputs.target_N,
        inputs.temperature_N,
        policy.bound(policy.logits),
        policy.vocabulary,
        allowed_NW,
        is_entropy_learnt=is_entropy_learnt,
    )
    return states_NH, logprobs_N, entropy_N


def token_offsets(calls: Sequence[Call]) -> list[int]:
    """Where each call's action tokens begin on the flat axis, and its total length at the end.

    >>> token_offsets([Call("a", "a", 0, (), (0,), (1, 2), (0.0, 0.0), "stop", 0)])
    [0, 2]
    """
    offsets = [0]
    for call in calls:
        offsets.append(offsets[-1] + len(call.completion_ids))
    return offsets


def allowed_tokens(calls: Sequence[Call], grammars: Grammars) -> Tensor:
    """Bits (N, V/32) of the tokens that each action was chosen from; all are set in free calls.

    Raises:
        ConfigError, ModelError: as in `Grammars.allowed`.
    """
    offsets = token_offsets(calls)
    allowed_NW = torch.full((offsets[-1], grammars.words), -1, dtype=torch.int32)
    for first, call in zip(offsets[:-1], calls, strict=True):
        if call.grammar:
            allowed_TW = grammars.allowed(call.grammar, call.completion_ids)
            allowed_NW[first : first + len(allowed_TW)] = allowed_TW
    return allowed_NW
