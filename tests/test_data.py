"""Training data: shuffled sequences, streams of every kind, positions that can be sought."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset

from marft_graph.data import as_examples, training_data
from marft_graph.errors import DatasetError

ROWS = [{"n": n} for n in range(5)]


class Endless:
    """An iterable that begins anew each time and never ends."""

    def __iter__(self) -> Iterator[dict[str, int]]:
        return ({"n": n} for n in itertools.count())


def taken(dataset: object, count: int, seed: int = 0) -> list[int]:
    return [example["n"] for example in training_data(dataset, seed).take(count)]


def test_a_sequence_is_taken_in_shuffled_passes_that_follow_from_the_seed() -> None:
    numbers = taken(ROWS, 15)
    assert all(sorted(numbers[i : i + 5]) == [0, 1, 2, 3, 4] for i in (0, 5, 10))
    assert numbers == taken(Dataset.from_list(ROWS), 15)
    assert numbers != taken(ROWS, 15, seed=1)


@pytest.mark.parametrize(
    "stream",
    [
        lambda: (dict(row) for row in ROWS),
        lambda: Dataset.from_list(ROWS).to_iterable_dataset(),
        lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
        lambda: map(dict, ROWS),
    ],
    ids=["generator", "to_iterable_dataset", "from_generator", "map"],
)
def test_a_stream_is_taken_in_its_order_and_begun_again(stream) -> None:
    assert taken(stream(), 12) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_an_endless_stream_is_read_only_as_far_as_needed() -> None:
    assert taken(Endless(), 7) == list(range(7))


@pytest.mark.parametrize("make", [lambda: ROWS, lambda: iter(ROWS), Endless])
def test_seeking_gives_what_an_uninterrupted_run_would_have_taken(make) -> None:
    whole = training_data(make(), 0)
    first, rest = whole.take(7), whole.take(6)
    resumed = training_data(make(), 0)
    assert resumed.peek(2)  # looking does not move
    resumed.seek(7)
    assert resumed.position == 7
    assert resumed.take(6) == rest
    assert len(first) == 7


def test_a_short_stream_is_not_repeated_to_be_looked_at() -> None:
    data = training_data(iter(ROWS[:2]), 0)
    assert data.peek(8) == ROWS[:2]
    assert data.take(3) == [ROWS[0], ROWS[1], ROWS[0]]


@pytest.mark.parametrize("empty", [[], iter([]), (x for x in ())])
def test_empty_data_is_named(empty) -> None:
    with pytest.raises(DatasetError, match="train_dataset is empty"):
        training_data(empty, 0).take(1)


def test_items_that_are_no_mappings_are_named() -> None:
    with pytest.raises(DatasetError, match="holds str items"):
        training_data(["a"], 0)
    with pytest.raises(DatasetError, match="holds int items"):
        training_data(iter([1]), 0).take(1)
    with pytest.raises(DatasetError, match="is a int"):
        training_data(3, 0)


class Broken:
    """A data set whose own code fails, as a transform or a remote file does."""

    def __init__(self, *, after: int = 0) -> None:
        self._after = after

    def __len__(self) -> int:
        return 5

    def __getitem__(self, at: int) -> dict[str, int]:
        if at >= self._after:
            raise KeyError("no column n")
        return {"n": at}


def fails_after(count: int) -> Iterator[dict[str, int]]:
    yield from ROWS[:count]
    raise OSError("the disk is gone")


def test_a_data_set_that_fails_while_it_is_read_is_named() -> None:
    with pytest.raises(DatasetError, match=r"train_dataset cannot be read: KeyError.*list of"):
        training_data(Broken(), 0)
    with pytest.raises(DatasetError, match=r"train_dataset cannot be read: KeyError: 'no column"):
        training_data(Broken(after=1), 0).take(5)
    with pytest.raises(DatasetError, match="train_dataset cannot be read: OSError: the disk"):
        training_data(fails_after(2), 0).take(5)
    with pytest.raises(DatasetError, match="eval_dataset cannot be read: OSError: the disk"):
        as_examples(fails_after(2), "eval_dataset")


def test_the_rows_of_a_table_are_examples() -> None:
    frame = pd.DataFrame(ROWS)
    for table in (frame, frame.set_index(frame["n"] + 7), pa.Table.from_pylist(ROWS)):
        assert training_data(table, 0).take(5) == training_data(ROWS, 0).take(5)
        assert list(as_examples(table, "eval_dataset")) == ROWS


@pytest.mark.parametrize("columns", [[0, 1], ["n", "n"]])
def test_a_table_whose_columns_are_no_names_is_refused(columns: list[Any]) -> None:
    with pytest.raises(DatasetError, match="each needs a name of its own"):
        as_examples(pd.DataFrame([[1, 2]], columns=columns), "eval_dataset")
    with pytest.raises(DatasetError, match="train_dataset is empty"):
        training_data(pd.DataFrame({"n": []}), 0)


def test_an_item_in_the_middle_that_is_no_mapping_is_named_at_once() -> None:
    with pytest.raises(DatasetError, match="train_dataset holds str items"):
        training_data([*ROWS, "text"], 0)


@pytest.mark.parametrize("dataset", ["text", b"bytes", None, 3, object(), {"train": ROWS}, [[1]]])
def test_what_is_no_data_set_is_named(dataset) -> None:
    for name, read in (("train", training_data), ("eval", as_examples)):
        with pytest.raises(DatasetError, match=f"{name}_dataset"):
            read(dataset, 0 if name == "train" else "eval_dataset")


def test_held_out_streams_are_read_to_their_limit() -> None:
    assert len(as_examples(Endless(), "eval_dataset", 3)) == 3


@pytest.mark.parametrize("is_stream", [False, True])
def test_examples_that_are_put_back_come_again(is_stream: bool) -> None:
    examples = [{"n": n} for n in range(5)]
    data = training_data(iter(examples) if is_stream else examples, seed=1)
    data.take(2)
    first, second = data.take(2), data.take(3)
    data.put_back(second)
    data.put_back(first)
    assert data.position == 2
    assert data.take(5) == [*first, *second]
