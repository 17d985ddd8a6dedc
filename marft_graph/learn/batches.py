"""Calls as tensors: which tokens go through the model, and which of them were actions.

Calls that begin alike (a group's episodes, a conversation's turns) share a row: what they have in
common goes through the model once, and a mask lets each token see only what came before it in its
own call. That is exact, and gradients add up in the shared tokens. A batch's action tokens are one
flat axis N, in the order of its calls, so that nothing is ever masked there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from marft_graph.episode import Call
from marft_graph.policy.grammar import Grammars


@dataclass(slots=True)
class Row:
    """Calls laid out as one sequence, in which a shared beginning stands once."""

    calls: list[int] = field(default_factory=list)
    """Indices of the calls, in the order in which they were laid out."""
    paths: list[np.ndarray] = field(default_factory=list)
    """For each call, the columns of its tokens."""
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Columns of the row."""
        return len(self.ids)

    def add(self, index: int, ids: np.ndarray, shared: int) -> None:
        """Lay out a call whose first `shared` tokens are those of the call before it."""
        own = np.arange(self.length, self.length + len(ids) - shared)
        known = self.paths[-1][:shared] if self.paths else own[:0]
        self.calls.append(index)
        self.paths.append(np.concatenate([known, own]))
        self.ids.extend(ids[shared:].tolist())


@dataclass(frozen=True, slots=True)
class CallBatch:
    """Some calls of one agent, ready for a forward pass."""

    ids_BT: Tensor
    """Rows of tokens, right-padded with 0; a call's last token is left out (nothing follows)."""
    position_BT: Tensor | None
    """Place of each token in its own call; None: every row is one call."""
    is_seen_BTT: Tensor | None
    """Whether a token (second axis) sees another (third); None: all that stand before it."""
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


def microbatches(
    calls: Sequence[Call], max_tokens: int, *, quadratic: float = 0.0
) -> Iterator[list[Row]]:
    """Rows of calls, longest first, cut so that a padded batch has at most `max_tokens`.

    A call joins the row of one that begins alike where that saves work: a row of T tokens costs
    T + `quadratic` * T^2, the latter for attention, of which a row with one call needs only half. A
    call longer than `max_tokens` is a batch of its own.

    >>> def call(*prompt: int) -> Call:
    ...     return Call("a", "a", 0, (), prompt, (0,), (0.0,), "stop", 0)
    >>> calls = [call(1, 2, 3), call(5, 6), call(1, 2, 4)]
    >>> [[(row.calls, row.ids) for row in rows] for rows in microbatches(calls, max_tokens=100)]
    [[([0, 2], [1, 2, 3, 4]), ([1], [5, 6])]]
    """
    rows = sorted(_rows(calls, max_tokens, quadratic), key=lambda row: (-row.length, row.calls[0]))
    start = 0
    while start < len(rows):
        count = max(1, max_tokens // rows[start].length)
        yield rows[start : start + count]
        start += count


def _rows(calls: Sequence[Call], max_tokens: int, quadratic: float) -> list[Row]:
    """All calls in rows; calls that begin alike are neighbours in lexical order."""
    ids = [(call.prompt_ids + call.completion_ids)[:-1] for call in calls]
    sequences = [np.array(own) for own in ids]
    rows: list[Row] = []
    previous = -1
    for index in sorted(range(len(calls)), key=lambda i: (ids[i], i)):
        own = sequences[index]
        shared = _common(sequences[previous], own) if rows else 0
        if not (shared and _is_worth_it(rows[-1].length, len(own), shared, max_tokens, quadratic)):
            rows.append(Row())
            shared = 0
        rows[-1].add(index, own, shared)
        previous = index
    return rows


def _is_worth_it(row: int, call: int, shared: int, max_tokens: int, quadratic: float) -> bool:
    joined = row + call - shared
    alone = call + 0.5 * quadratic * call**2
    return joined <= max_tokens and joined - row + quadratic * (joined**2 - row**2) < alone


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def collate(calls: Sequence[Call], rows: Sequence[Row], device: torch.device) -> CallBatch:
    """One batch of rows of calls; action tokens in the order in which the rows have the calls."""
    longest = max(row.length for row in rows)
    ids_BT = np.zeros((len(rows), longest), dtype=np.int64)
    row_N: list[np.ndarray] = []
    state_N: list[np.ndarray] = []
    target_N: list[int] = []
    temperature_N: list[float] = []
    for place, row in enumerate(rows):
        ids_BT[place, : row.length] = row.ids
        for index, path in zip(row.calls, row.paths, strict=True):
            call = calls[index]
            count = len(call.completion_ids)
            row_N.append(np.full(count, place))
            state_N.append(path[len(path) - count :])
            target_N += call.completion_ids
            temperature_N += [call.temperature] * count
    is_shared = any(len(row.calls) > 1 for row in rows)
    return CallBatch(
        torch.from_numpy(ids_BT).to(device),
        torch.from_numpy(_positions(rows, longest)).to(device) if is_shared else None,
        torch.from_numpy(_seen(rows, longest)).to(device) if is_shared else None,
        torch.from_numpy(np.concatenate(row_N)).to(device),
        torch.from_numpy(np.concatenate(state_N)).to(device),
        torch.tensor(target_N, device=device),
        torch.tensor(temperature_N, device=device),
    )


def _positions(rows: Sequence[Row], longest: int) -> np.ndarray:
    position_BT = np.zeros((len(rows), longest), dtype=np.int64)
    for place, row in enumerate(rows):
        for path in row.paths:
            position_BT[place, path] = np.arange(len(path))
    return position_BT


def _seen(rows: Sequence[Row], longest: int) -> np.ndarray:
    """(B, T, T): a token sees itself and what stands before it in its call; padding sees itself."""
    is_seen_BTT = np.zeros((len(rows), longest, longest), dtype=np.bool_)
    is_seen_BTT[:, np.arange(longest), np.arange(longest)] = True
    for is_seen_TT, row in zip(is_seen_BTT, rows, strict=True):
        laid_out = 0
        for path in row.paths:
            own = path[path >= laid_out]  # the columns that this call added, all in one piece
            laid_out += len(own)
            if len(own):
                block = slice(own[0], own[-1] + 1)
                is_seen_TT[block, path[: len(path) - len(own)]] = True
                is_seen_TT[block, block] = np.tri(len(own), dtype=np.bool_)
    return is_seen_BTT


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
