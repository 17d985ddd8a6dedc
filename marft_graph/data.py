"""Examples: what users give as a data set, and the order in which training takes them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from marft_graph.errors import DatasetError

Example = Mapping[str, Any]


class TrainingData(Protocol):
    """An endless supply of training examples, with a position that a resumed run goes back to."""

    position: int
    """Examples taken so far."""

    def take(self, count: int) -> list[Example]:
        """The next `count` examples."""
        ...

    def peek(self, count: int) -> list[Example]:
        """Some examples to look at, at most `count`; the position stays."""
        ...

    def put_back(self, examples: Sequence[Example]) -> None:
        """Take the examples that were taken last again; the position goes back with them."""
        ...

    def seek(self, position: int) -> None:
        """Go on after the first `position` examples."""
        ...


def training_data(dataset: Any, seed: int) -> TrainingData:
    """A user's training set: sequences are shuffled, streams are taken in their own order.

    Args:
        dataset: a `datasets.Dataset`, a list of dicts or another sequence, a DataFrame; or a
            stream: a `datasets.IterableDataset`, a generator, any other iterable.
        seed: of the shuffled order.

    Raises:
        DatasetError: it is empty, no iterable, cannot be read, or its items are no mappings.
    """
    dataset = rows_of_table(dataset, "train_dataset")
    if _is_sequence(dataset):
        return ShuffledExamples(as_examples(dataset, "train_dataset"), seed)
    _refuse_non_iterable(dataset, "train_dataset")
    return StreamedExamples(dataset)


def as_examples(dataset: Any, name: str, limit: int | None = None) -> Sequence[Example]:
    """A data set as a sequence of mappings.

    The rows of a table of pandas, polars or Arrow are its examples. `datasets.Dataset` and other
    sequences are used in place; other iterables are read to their end, or to `limit` examples.

    Raises:
        DatasetError: it is empty, no iterable, cannot be read, or its items are no mappings.
    """
    if isinstance(dataset, Mapping):
        raise DatasetError(
            f"{name} is a mapping with keys {sorted(map(str, dataset))}; give one split, "
            "a sequence of examples"
        )
    dataset = rows_of_table(dataset, name)
    examples: Any = dataset
    with _reading(name):
        if not _is_sequence(dataset):
            _refuse_non_iterable(dataset, name)
            examples = list(itertools.islice(dataset, limit))
        if len(examples) == 0:
            raise DatasetError(f"{name} is empty; at least one example is needed")
        for example in examples if isinstance(examples, list | tuple) else [examples[0]]:
            _refuse_non_mapping(example, name)
    return examples  # type: ignore[no-any-return]


def read_rows(path: str | Path) -> list[Any]:
    """The rows of a .parquet, .jsonl or .json file; the last holds a list, or one under `runs`.

    Raises:
        DatasetError: there is no such file, or it cannot be read.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise DatasetError(f"{file} does not exist")
    try:
        if file.suffix == ".parquet":
            return list(pq.read_table(file, partitioning=None).to_pylist())
        if file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.strip()]
        if file.suffix == ".json":
            found = json.loads(file.read_text(encoding="utf-8"))
            found = found.get("runs", found) if isinstance(found, dict) else found
            return found if isinstance(found, list) else [found]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DatasetError(f"cannot read {file}: {error}") from error
    raise DatasetError(f"{file} is neither .parquet nor .jsonl nor .json")


class ShuffledExamples:
    """Shuffled passes over a sequence; the order is a function of the seed alone.

    >>> data = ShuffledExamples([{"n": 0}, {"n": 1}, {"n": 2}], seed=0)
    >>> sorted(example["n"] for example in data.take(3)), len(data.take(4)), data.position
    ([0, 1, 2], 4, 7)
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self.position = 0

    def take(self, count: int) -> list[Example]:
        """The next `count` examples."""
        first, size = self.position, len(self._examples)
        self.position += count
        passes = range(first // size, (first + count - 1) // size + 1)
        stream = itertools.chain.from_iterable(
            np.random.default_rng([self._seed, number]).permutation(size).tolist()
            for number in passes
        )
        skip = first - passes[0] * size
        with _reading("train_dataset"):
            return [self._examples[i] for i in itertools.islice(stream, skip, skip + count)]

    def peek(self, count: int) -> list[Example]:
        """The first examples of the sequence."""
        with _reading("train_dataset"):
            return [self._examples[i] for i in range(min(count, len(self._examples)))]

    def put_back(self, examples: Sequence[Example]) -> None:
        """Take the examples that were taken last again."""
        self.position -= len(examples)

    def seek(self, position: int) -> None:
        """Go on after the first `position` examples."""
        self.position = position


class StreamedExamples:
    """A stream in its own order, begun again when it ends.

    An iterator that can be read only once is remembered as it is read, so that it can be repeated.

    >>> data = StreamedExamples({"n": n} for n in range(3))
    >>> [example["n"] for example in data.take(4)]
    [0, 1, 2, 0]
    """

    def __init__(self, source: Iterable[Example]) -> None:
        with _reading("train_dataset"):
            self._iterator = iter(source)
        self._memory: list[Example] | None = [] if self._iterator is source else None
        self._source = source
        self._ahead: list[Example] = []
        self.position = 0

    def take(self, count: int) -> list[Example]:
        """The next `count` examples."""
        self._read_ahead(count)
        taken, self._ahead = self._ahead[:count], self._ahead[count:]
        self.position += count
        return taken

    def peek(self, count: int) -> list[Example]:
        """The next examples; a short stream is not repeated for them."""
        self._read_ahead(count, is_repeated=False)
        return self._ahead[:count]

    def put_back(self, examples: Sequence[Example]) -> None:
        """Take the examples that were taken last again."""
        self._ahead = [*examples, *self._ahead]
        self.position -= len(examples)

    def seek(self, position: int) -> None:
        """Read and drop what was taken before."""
        while self.position < position:
            self.take(min(1024, position - self.position))

    def _read_ahead(self, count: int, *, is_repeated: bool = True) -> None:
        while len(self._ahead) < count:
            with _reading("train_dataset"):
                found = list(itertools.islice(self._iterator, count - len(self._ahead)))
            if found:
                _refuse_non_mapping(found[0], "train_dataset")
                if self._memory is not None:
                    self._memory += found
                self._ahead += found
                continue
            if not is_repeated and self._ahead:
                return
            with _reading("train_dataset"):
                self._iterator = self._again()

    def _again(self) -> Iterator[Example]:
        if self._memory is not None:
            self._source, self._memory = self._memory, None
        first = next(iter(self._source), None)
        if first is None:
            raise DatasetError("train_dataset is empty; at least one example is needed")
        return iter(self._source)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Name the data set whose own code fails: a generator, a transform, a file that is gone."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(
            f"{name} cannot be read: {type(error).__name__}: {error} (give a datasets.Dataset, a "
            "list of dicts or another iterable of them)"
        ) from error


def rows_of_table(dataset: Any, name: str) -> Any:
    """The rows of a data frame or an Arrow table as dicts; anything else as it is."""
    # Whoever has a frame has imported its library; here nothing needs it.
    pandas, polars = sys.modules.get("pandas"), sys.modules.get("polars")
    if pandas is not None and isinstance(dataset, pandas.DataFrame):
        columns = list(dataset.columns)
        if not all(isinstance(c, str) for c in columns) or len(set(columns)) < len(columns):
            raise DatasetError(
                f"{name} is a DataFrame with columns {columns}; each needs a name of its own, as "
                "rows become examples with these keys"
            )
        return dataset.to_dict("records")
    if polars is not None and isinstance(dataset, polars.DataFrame):
        return dataset.to_dicts()
    return dataset.to_pylist() if isinstance(dataset, pa.Table) else dataset


def _is_sequence(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _refuse_non_iterable(dataset: Any, name: str) -> None:
    if not isinstance(dataset, Iterable):
        raise DatasetError(
            f"{name} is a {type(dataset).__name__}; give a datasets.Dataset, a list of dicts or "
            "another iterable of them"
        )


def _refuse_non_mapping(example: Any, name: str) -> None:
    if not isinstance(example, Mapping):
        raise DatasetError(
            f"{name} holds {type(example).__name__} items; each example must be a mapping such as "
            "{'question': ..., 'answer': ...}"
        )
