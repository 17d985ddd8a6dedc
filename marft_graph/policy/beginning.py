"""Attention of rows that begin alike: common keys are read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SHARED_TOKENS = 64
"""Shorter beginnings are read as fast by each row."""


class SharedBeginning:
    """The first tokens of rows with equal prompts, whose keys are read once for all of them.

    Rows with the same beginning have the same keys and values there, each in its own part of the
    cache; scores of all their queries come from one product with one row's.

    Args:
        groups: places of rows; those of a group have the first `length` tokens and their adapter in
            common. Each row is in one.
        length: of what is shared, in tokens; the shortest of all groups'.
    """

    def __init__(self, groups: Sequence[Sequence[int]], length: int, device: torch.device) -> None:
        self.length = length
        most = max(map(len, groups))
        self._groups, self._most = len(groups), most
        padded = [[*group, *[group[0]] * (most - len(group))] for group in groups]
        self._row_M = torch.tensor(padded, device=device).flatten()  # groups times `most`
        self._first = torch.tensor([group[0] for group in groups], device=device)
        place = {row: g * most + n for g, group in enumerate(groups) for n, row in enumerate(group)}
        self._place_B = torch.tensor([place[row] for row in range(len(place))], device=device)
        self._read: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values of each layer, once for each group."""

    @staticmethod
    def pays(groups: int, rows: int, length: int) -> bool:
        """Whether the reading that is saved is worth the moving of queries and scores.

        >>> SharedBeginning.pays(8, 64, 256), SharedBeginning.pays(60, 64, 256)
        (True, False)
        """
        return length >= _SHARED_TOKENS and 2 * groups <= rows

    def attend(
        self,
        number: int,
        q_BKGS: Tensor,
        k_BKLS: Tensor,
        v_BKLS: Tensor,
        hidden_B1L: Tensor,
        scale: float,
    ) -> Tensor:
        """What the queries of each row (G for each of K key heads) read in layer `number`."""
        _, keys, queries, _ = q_BKGS.shape
        cut = self.length

        def by_group(x: Tensor) -> Tensor:  # (B, K, G, n) to (groups K, most G, n)
            x = x.index_select(0, self._row_M).view(self._groups, self._most, keys, queries, -1)
            return x.transpose(1, 2).reshape(self._groups * keys, self._most * queries, -1)

        def by_row(x: Tensor) -> Tensor:
            x = x.view(self._groups, keys, self._most, queries, -1).transpose(1, 2)
            return x.reshape(self._groups * self._most, keys, queries, -1).index_select(
                0, self._place_B
            )

        if number not in self._read:
            first = (x[:, :, :cut].index_select(0, self._first) for x in (k_BKLS, v_BKLS))
            shared_k, shared_v = (x.flatten(0, 1) for x in first)
            self._read[number] = shared_k, shared_v
        shared_k, shared_v = self._read[number]
        shared = by_row(torch.bmm(by_group(q_BKGS), shared_k.transpose(1, 2)))
        own = torch.matmul(q_BKGS, k_BKLS[:, :, cut:].transpose(2, 3))
        own = own.mul_(scale).add_(hidden_B1L[:, :, cut:].unsqueeze(1))
        weights = torch.cat((shared.mul_(scale), own), -1).softmax(-1)
        read = by_row(torch.bmm(by_group(weights[..., :cut]), shared_v))
        return read.add_(torch.matmul(weights[..., cut:], v_BKLS[:, :, cut:]))
