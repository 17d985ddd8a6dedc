"""Calls as tensors: which tokens go through the model, and which of them were actions.

Rows are right-padded and sorted by length; only states before an action leave the model. A batch's
action tokens are one flat axis N, in the order of its calls, so that nothing is ever masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marft_graph.episode import Call
from marft_graph.policy.grammar import Grammars


@dataclass(frozen=True, slots=True)
class CallBatch:
    """Some calls of one agent, ready for a forward pass."""

    ids_BT: Tensor
    """Prompt and completion without the last token (nothing follows it), right-padded with 0."""
    row_N: Tensor
    """Row of each action token."""
    state_N: Tensor
    """Column of the state in which each action token was sampled: one before the token's own."""
    target_N: Tensor
    """The action tokens."""
    temperature_N: Tensor

    def action_states(self, hidden_BTH: Tensor) -> Tensor:
        """Hidden states (N, H) in which the action tokens were sampled."""
        return hidden_BTH[self.row_N, self.state_N]


def collate(calls: Sequence[Call], device: torch.device) -> CallBatch:
    """One batch of all given calls, action tokens in their order."""
    longest = max(len(call.prompt_ids) + len(call.completion_ids) - 1 for call in calls)
    rows: list[tuple[int, ...]] = []
    row_N: list[int] = []
    state_N: list[int] = []
    target_N: list[int] = []
    temperature_N: list[float] = []
    for row, call in enumerate(calls):
        ids = (call.prompt_ids + call.completion_ids)[:-1]
        rows.append(ids + (0,) * (longest - len(ids)))
        count = len(call.completion_ids)
        first_state = len(call.prompt_ids) - 1
        row_N += [row] * count
        state_N += range(first_state, first_state + count)
        target_N += call.completion_ids
        temperature_N += [call.temperature] * count
    return CallBatch(
        torch.tensor(rows, device=device),
        torch.tensor(row_N, device=device),
        torch.tensor(state_N, device=device),
        torch.tensor(target_N, device=device),
        torch.tensor(temperature_N, device=device),
    )


def microbatches(calls: Sequence[Call], max_tokens: int) -> Iterator[list[int]]:
    """Indices of calls, longest first, cut so that a padded batch has at most `max_tokens`.

    A call longer than that is a batch of its own.

    >>> def call(tokens: int) -> Call:
    ...     return Call("a", "a", 0, (), (0,) * tokens, (0,), (0.0,), "stop", 0)
    >>> list(microbatches([call(2), call(9), call(3), call(8)], max_tokens=20))
    [[1, 3], [2, 0]]
    """
    lengths = [len(call.prompt_ids) + len(call.completion_ids) - 1 for call in calls]
    order = sorted(range(len(calls)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + count]
        start += count


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
