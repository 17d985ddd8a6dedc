"""The key/value cache of the local engine: a row for each running completion, of its own length.

Rows are packed to the front, so a forward pass over the running rows reads views, no copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

_FIRST = 8, 64
"""Rows, and tokens of each, to begin with."""
_DOUBLED_TOKENS = 2**14
"""Up to so many tokens in all rows a cache grows by doubling; a larger one by what is asked for."""
_BLOCK = 64


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

    def forget(self) -> None:
        """Drop keys and values."""
        if self.is_initialized:
            del self.keys, self.values
            self.is_initialized = False

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
    """Keys and values of running completions; grows by doubling while memory allows.

    Args:
        config: of the model.
        max_tokens: rows times capacity never exceed this, unless what is asked for does.
    """

    def __init__(self, config: Any, device: torch.device, max_tokens: int) -> None:
        self.rows, self.capacity = _FIRST
        self._max_tokens = max_tokens
        self.read_to = 0
        self.write_at = torch.empty(0, dtype=torch.long, device=device)
        self.row_index = torch.arange(self.rows, device=device)
        self._own_layers = [RowCacheLayer(self) for _ in range(int(config.num_hidden_layers))]
        super().__init__(layers=list(self._own_layers))

    def prepare(self, length_B: Tensor, longest: int) -> None:
        """Set where the next token of each running row goes; `longest` is the largest length."""
        self.write_at = length_B
        self.read_to = longest + 1

    def insert(
        self,
        first_row: int,
        prefilled: DynamicCache,
        source_rows: Sequence[int],
        paths: Sequence[np.ndarray],
    ) -> None:
        """Copy prefilled prompts into reserved rows from `first_row` on.

        The i-th of them takes the columns `paths[i]` of row `source_rows[i]`.
        """
        device = self.row_index.device
        source_M = torch.tensor(source_rows, device=device)
        length = max(map(len, paths))
        last_row = first_row + len(source_rows)
        path_ML = np.zeros((len(paths), length), dtype=np.int64)
        for place, path in enumerate(paths):
            path_ML[place, : len(path)] = path
        is_plain = bool((path_ML <= np.arange(length)).all())  # padding aside, column i is token i
        column_ML = torch.from_numpy(path_ML).to(device)
        for own, (keys, values) in zip(self._own_layers, _filled(prefilled), strict=True):
            if not own.is_initialized:
                own.lazy_initialization(keys, values)
            for target, source in ((own.keys, keys), (own.values, values)):
                if is_plain:
                    part = source[source_M, :, :length]
                else:
                    part = source[source_M.unsqueeze(-1), :, column_ML].transpose(1, 2)
                target[first_row:last_row, :, :length] = part

    def copy(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (heads, length, size) of a row, by layer."""
        return [
            (layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone())
            for layer in self._own_layers
        ]

    def move(self, source: int, target: int) -> None:
        """Copy one row over another, to keep running rows packed."""
        for layer in self._own_layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]

    def reserve(self, rows: int, capacity: int) -> None:
        """Make room for `rows` rows of `capacity` tokens; what those hold stays."""
        if rows <= self.rows and capacity <= self.capacity:
            return
        new_rows, new_capacity = self.rows, self.capacity
        while new_rows < rows:
            new_rows *= 2
        while new_capacity < capacity:
            new_capacity *= 2
        if new_rows * new_capacity > min(self._max_tokens, _DOUBLED_TOKENS):
            # Where rows are long, doubling would take gigabytes that nobody may ever write to.
            longest = min(new_capacity, capacity + max(_BLOCK, capacity // 8))
            new_rows = max(rows, self.rows if self._is_used else 0)
            new_capacity = max(longest, self.capacity if self._is_used else 0)
            if new_rows * new_capacity > self._max_tokens:
                new_rows, new_capacity = rows, capacity
        self._resize(new_rows, new_capacity)

    def release(self) -> None:
        """Forget all rows where they take much memory: none is running."""
        if self.rows * self.capacity > _DOUBLED_TOKENS:
            for layer in self._own_layers:
                layer.forget()
            self._resize(*_FIRST)

    @property
    def _is_used(self) -> bool:
        return any(layer.is_initialized for layer in self._own_layers)

    def _resize(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.row_index = torch.arange(self.rows, device=self.row_index.device)
        for layer in self._own_layers:
            if layer.is_initialized:
                layer.keys = _resized(layer.keys, self.rows, self.capacity)
                layer.values = _resized(layer.values, self.rows, self.capacity)


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Memory of one token's keys and values in all layers."""
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    size = int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 2 * int(config.num_hidden_layers) * heads * size * dtype.itemsize


def _filled(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a prefilled cache's layers."""
    return [
        (layer.keys, layer.values)
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
    ]


def _resized(old: Tensor, rows: int, capacity: int) -> Tensor:
    new = old.new_zeros((rows, old.shape[1], capacity, old.shape[3]))
    kept_rows, kept = min(rows, old.shape[0]), min(capacity, old.shape[2])
    new[:kept_rows, :, :kept] = old[:kept_rows, :, :kept]
    return new
