"""Examples: what users give as a data set, as a sequence of mappings, and their order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from marft_graph.errors import DatasetError


def as_examples(dataset: Any, name: str) -> Sequence[Mapping[str, Any]]:
    """A data set as a sequence of mappings.

    `datasets.Dataset` and other sequences are used in place; other iterables are read to their end.

    Raises:
        DatasetError: it is empty, no iterable, or its items are no mappings.
    """
    if isinstance(dataset, Mapping):
        raise DatasetError(
            f"{name} is a mapping with keys {sorted(map(str, dataset))}; give one split, "
            "a sequence of examples"
        )
    examples: Any = dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        if not isinstance(dataset, Iterable):
            raise DatasetError(
                f"{name} is a {type(dataset).__name__}; give a datasets.Dataset, a list of dicts "
                "or another finite iterable of them"
            )
        examples = list(dataset)
    if len(examples) == 0:
        raise DatasetError(f"{name} is empty; at least one example is needed")
    if not isinstance(examples[0], Mapping):
        raise DatasetError(
            f"{name} holds {type(examples[0]).__name__} items; each example must be a mapping such "
            "as {'question': ..., 'answer': ...}"
        )
    return examples  # type: ignore[no-any-return]


class ExampleOrder:
    """Which examples an iteration trains on: shuffled passes, a function of the seed alone.

    Nothing is remembered between iterations, so a resumed run sees the same order.

    >>> order = ExampleOrder(3, seed=0)
    >>> sorted(order.take(1, 3)), len(order.take(2, 4))
    ([0, 1, 2], 4)
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed

    def take(self, iteration: int, count: int) -> list[int]:
        """Indices of the `count` examples of an iteration (counted from 1)."""
        first = (iteration - 1) * count
        passes = range(first // self._size, (first + count - 1) // self._size + 1)
        stream = itertools.chain.from_iterable(
            np.random.default_rng([self._seed, number]).permutation(self._size).tolist()
            for number in passes
        )
        skip = first - passes[0] * self._size
        return list(itertools.islice(stream, skip, skip + count))
