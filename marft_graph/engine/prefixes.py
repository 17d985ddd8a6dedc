"""Keys and values of answered calls, kept for calls that begin with the same tokens.

A conversation's next turn begins with the whole turn before, and late episodes of a group ask what
earlier ones were asked. Bounded in tokens; what was used least recently goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

BLOCK = 16
"""Beginnings are looked up in steps of so many tokens."""
SHORTEST = 64
"""What is shorter is not kept: it is computed as fast as it is copied."""

Layers = Sequence[tuple[Tensor, Tensor]]
"""Keys and values (heads, tokens, size) of each layer."""


@dataclass(eq=False, slots=True)
class Kept:
    """A sequence under an agent's adapter, and its keys and values."""

    agent: str | None
    ids: tuple[int, ...]
    layers: Layers
    blocks: list[int] = field(default_factory=list)


class Prefixes:
    """What answered calls left, by agent and tokens.

    Args:
        max_tokens: so many at most are kept in all.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens = 0
        self._kept: OrderedDict[Kept, None] = OrderedDict()
        self._by_block: dict[int, Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """Tokens that are kept now."""
        return self._tokens

    def wants(self, ids: Sequence[int]) -> bool:
        """Whether a sequence of this length is kept at all."""
        return SHORTEST <= len(ids) <= self._max_tokens

    def put(self, agent: str | None, ids: tuple[int, ...], layers: Layers) -> None:
        """Keep a sequence; one that it continues is forgotten."""
        known = self._longest(agent, ids)
        if known is not None and known.ids[: len(ids)] == ids:
            return
        if known is not None and ids[: len(known.ids)] == known.ids:
            self._forget(known)
        new = Kept(agent, ids, layers, list(_blocks(agent, ids)))
        self._kept[new] = None
        self._tokens += len(ids)
        self._by_block |= dict.fromkeys(new.blocks, new)
        while self._tokens > self._max_tokens:
            self._forget(next(iter(self._kept)))

    def find(self, agent: str | None, ids: tuple[int, ...]) -> tuple[Kept, int] | None:
        """A kept sequence with which most of `ids` begins, and how many tokens they share.

        The last token of `ids` never counts: its state is what a prompt is computed for. None where
        less than half would be saved.
        """
        kept = self._longest(agent, ids[:-1])
        if kept is None:
            return None
        shared = 0
        for own, other in zip(ids[:-1], kept.ids, strict=False):
            if own != other:
                break
            shared += 1
        if 2 * shared < len(ids):
            return None
        self._kept.move_to_end(kept)
        return kept, shared

    def clear(self) -> None:
        """Forget everything: the adapters have changed."""
        self._kept.clear()
        self._by_block.clear()
        self._tokens = 0

    def _longest(self, agent: str | None, ids: tuple[int, ...]) -> Kept | None:
        found = None
        for block in _blocks(agent, ids):
            kept = self._by_block.get(block)
            if kept is None:
                break
            found = kept
        return found

    def _forget(self, kept: Kept) -> None:
        del self._kept[kept]
        self._tokens -= len(kept.ids)
        for block in kept.blocks:
            if self._by_block.get(block) is kept:
                del self._by_block[block]


def _blocks(agent: str | None, ids: Sequence[int]) -> Iterator[int]:
    """A number for each beginning of whole blocks; equal beginnings have equal numbers."""
    number = hash(agent)
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        number = hash((number, tuple(ids[end - BLOCK : end])))
        yield number
