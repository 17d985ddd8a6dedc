"""Sequences that begin alike as one row of tokens, in which the common beginning stands once.

Each token sees only what came before it in its own sequence, by `segments` or a mask. So the states
of a row are exactly those of its sequences. The engine lays out prompts so, the learner calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Row:
    """Sequences laid out as one."""

    members: list[int] = field(default_factory=list)
    """Indices of the sequences, in the order in which they were laid out."""
    paths: list[np.ndarray] = field(default_factory=list)
    """For each sequence, the columns of its tokens."""
    own: list[np.ndarray] = field(default_factory=list)
    """For each sequence, those of its columns that it added to the row, all in one piece."""
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Columns of the row."""
        return len(self.ids)

    def add(self, index: int, ids: np.ndarray, shared: int) -> None:
        """Lay out a sequence whose first `shared` tokens are those of the one before it."""
        own = np.arange(self.length, self.length + len(ids) - shared)
        known = self.paths[-1][:shared] if self.paths else own[:0]
        self.members.append(index)
        self.paths.append(np.concatenate([known, own]))
        self.own.append(own)
        self.ids.extend(ids[shared:].tolist())


def lay_out(
    sequences: Sequence[tuple[int, ...]], max_tokens: int, *, quadratic: float = 0.0
) -> list[Row]:
    """All sequences in rows.

    A sequence joins a row that begins alike where that saves work and the row has at most
    `max_tokens` then: its T own tokens cost T + `quadratic` * T * L, the latter for attention to
    the L tokens of its path, of which a row with one sequence needs only half. Attention by a mask
    costs more, for the few bases that need one.

    >>> [(row.members, row.ids) for row in lay_out([(1, 2, 3), (5, 6), (1, 2, 4)], 100)]
    [([0, 2], [1, 2, 3, 4]), ([1], [5, 6])]
    """
    arrays = [np.array(ids) for ids in sequences]
    rows: list[Row] = []
    previous = -1
    # In lexical order neighbours share most, and what follows a sequence stands right after it.
    for index in sorted(range(len(sequences)), key=lambda i: (sequences[i], i)):
        own = arrays[index]
        shared = _common(arrays[previous], own) if rows else 0
        if not (shared and _is_worth_it(rows[-1].length, len(own), shared, max_tokens, quadratic)):
            rows.append(Row())
            shared = 0
        rows[-1].add(index, own, shared)
        previous = index
    return rows


def _is_worth_it(row: int, length: int, shared: int, max_tokens: int, quadratic: float) -> bool:
    own = length - shared
    joined = own + quadratic * own * length
    alone = length + 0.5 * quadratic * length**2
    return row + own <= max_tokens and joined < alone


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def padded_ids(rows: Sequence[Row]) -> np.ndarray:
    """(B, T): the rows' tokens, right-padded with 0."""
    ids_BT = np.zeros((len(rows), max(row.length for row in rows)), dtype=np.int64)
    for place, row in enumerate(rows):
        ids_BT[place, : row.length] = row.ids
    return ids_BT


def positions(rows: Sequence[Row]) -> np.ndarray:
    """(B, T): the place of each token in its own sequence."""
    longest = max(row.length for row in rows)
    position_BT = np.zeros((len(rows), longest), dtype=np.int64)
    for place, row in enumerate(rows):
        for path in row.paths:
            position_BT[place, path] = np.arange(len(path))
    return position_BT


def seen(rows: Sequence[Row]) -> np.ndarray:
    """(B, T, T): a token sees itself and what stands before it in its sequence; padding, itself."""
    longest = max(row.length for row in rows)
    is_seen_BTT = np.zeros((len(rows), longest, longest), dtype=np.bool_)
    is_seen_BTT[:, np.arange(longest), np.arange(longest)] = True
    for is_seen_TT, row in zip(is_seen_BTT, rows, strict=True):
        for own, path in zip(row.own, row.paths, strict=True):
            is_seen_TT[own[:, None], path[: len(path) - len(own)]] = True
            is_seen_TT[own[:, None], own] = np.tri(len(own), dtype=np.bool_)
    return is_seen_BTT
