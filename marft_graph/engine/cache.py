"""The key/value cache of the local engine: a row for each running completion, of its own length.

Rows are packed to the front, so a forward pass over the running rows reads views, no copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer


class RowCacheLayer(CacheLayerMixin):
    """One layer's keys and values (rows, heads, capacity, size), written at each row's length."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: RowCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes of a first key and value."""
        cache = self._cache
        shape = (cache.rows, key_states.shape[1], cache.capacity)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token to every running row; the running rows' keys and values so far."""
        cache = self._cache
        running = key_states.shape[0]
        index = cache.row_index[:running]
        self.keys[index, :, cache.write_at] = key_states[:, :, 0]
        self.values[index, :, cache.write_at] = value_states[:, :, 0]
        return (
            self.keys[:running, :, : cache.read_to],
            self.values[:running, :, : cache.read_to],
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` returns."""
        return self._cache.read_to, 0

    def get_seq_length(self) -> int:
        """Tokens that the longest running row holds before the coming one."""
        return self._cache.read_to - 1

    def get_max_length(self) -> int:
        """Capacity of a row in tokens."""
        return self._cache.capacity


class RowCache(Cache):
    """Keys and values of up to `rows` running completions; grows by doubling, never shrinks."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.rows, self.capacity = 8, 64
        self.read_to = 0
        self.write_at = torch.empty(0, dtype=torch.long, device=device)
        self.row_index = torch.arange(self.rows, device=device)
        self._own_layers = [RowCacheLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._own_layers))

    def prepare(self, length_B: Tensor, longest: int) -> None:
        """Set where the next token of each running row goes; `longest` is the largest length."""
        self.write_at = length_B
        self.read_to = longest + 1

    def insert(self, first_row: int, prefilled: DynamicCache, source_rows: Sequence[int]) -> None:
        """Copy prefilled prompts into rows from `first_row` on; row i takes `source_rows[i]`."""
        source = torch.tensor(source_rows, device=self.row_index.device)
        last_row = first_row + len(source_rows)
        self.reserve(last_row, prefilled.get_seq_length() + 1)
        for own, (keys, values) in zip(self._own_layers, _filled(prefilled), strict=True):
            if not own.is_initialized:
                own.lazy_initialization(keys, values)
            length = keys.shape[2]
            own.keys[first_row:last_row, :, :length] = keys[source]
            own.values[first_row:last_row, :, :length] = values[source]

    def move(self, source: int, target: int) -> None:
        """Copy one row over another, to keep running rows packed."""
        for layer in self._own_layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]

    def reserve(self, rows: int, capacity: int) -> None:
        """Grow so that `rows` rows of `capacity` tokens fit."""
        while self.rows < rows:
            self.rows *= 2
        while self.capacity < capacity:
            self.capacity *= 2
        self.row_index = torch.arange(self.rows, device=self.row_index.device)
        for layer in self._own_layers:
            if layer.is_initialized and (
                layer.keys.shape[0] < self.rows or layer.keys.shape[2] < self.capacity
            ):
                layer.keys = _grown(layer.keys, self.rows, self.capacity)
                layer.values = _grown(layer.values, self.rows, self.capacity)


def _filled(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a prefilled cache's layers."""
    return [
        (layer.keys, layer.values)
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
    ]


def _grown(old: Tensor, rows: int, capacity: int) -> Tensor:
    new = old.new_zeros((rows, old.shape[1], capacity, old.shape[3]))
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
