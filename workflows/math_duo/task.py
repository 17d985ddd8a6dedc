"""What math_duo is trained on: word problems made from a seed, or GSM8K, and the reward."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset,
)

NAMES = ("Ann", "Ben", "Eva", "Ida", "Kim", "Leo", "Mia", "Tom")
THINGS = ("eggs", "figs", "hats", "keys", "nuts", "pens", "pins", "toys")
STORIES = {
    "+": (
        "{name} has {a} {things} and buys {b}. How many?",
        "{name} has {a} {things}. Then {b} more. How many?",
        "{a} {things} here, {b} there. How many does {name} see?",
    ),
    "-": (
        "{name} has {a} {things} and sells {b}. How many?",
        "{name} had {a} {things}. Then {b} got lost. How many?",
        "Of {a} {things} {name} hides {b}. How many are left?",
    ),
}
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def calculations() -> list[tuple[int, str, int]]:
    """Every calculation (a, operation, b) that a generated story can ask for."""
    sums = [(a, "+", b) for a in range(1, 13) for b in range(1, 13)]
    differences = [(a, "-", b) for a in range(2, 21) for b in range(1, a)]
    return sums + differences


def story(a: int, operation: str, b: int, rng: random.Random) -> str:
    """A word problem that asks for a calculation."""
    template = rng.choice(STORIES[operation])
    return template.format(a=a, b=b, name=rng.choice(NAMES), things=rng.choice(THINGS))


def generate(seed: int = 0, held_out: int = 256, train: int = 2048) -> tuple[Dataset, Dataset]:
    """Word problems (question, answer); the held-out ones ask for other calculations."""
    rng = random.Random(seed)
    pool = calculations()
    rng.shuffle(pool)
    cut = len(pool) // 5
    splits = []
    for count, choices in ((train, pool[cut:]), (held_out, pool[:cut])):
        questions: dict[str, str] = {}
        while len(questions) < count:
            a, operation, b = rng.choice(choices)
            result = a + b if operation == "+" else a - b
            questions[story(a, operation, b, rng)] = str(result)
        rows = [{"question": q, "answer": answer} for q, answer in questions.items()]
        splits.append(Dataset.from_list(rows))
    return splits[0], splits[1]


def load_data(dataset: str = "generated") -> tuple[Dataset, Dataset]:
    """Train and held-out examples, with columns question and answer (a number as text).

    Args:
        dataset: `generated`; a hub id such as `openai/gsm8k`; a folder with parquet or JSON-lines
            files that have `train` and `test` in their names; or one such file, of which every
            tenth example is held out.

    Raises:
        ValueError: nothing is found there, or the columns are not those of GSM8K.
    """
    if dataset == "generated":
        return generate()
    return load_gsm8k(dataset)


def load_gsm8k(dataset: str) -> tuple[Dataset, Dataset]:
    """GSM8K's examples (question, answer, solution) from a hub id, a folder or a file.

    Raises:
        ValueError: nothing is found there, or the columns are not those of GSM8K.
    """
    train, held_out = load_splits(dataset, "main")
    return _normalized(train, dataset), _normalized(held_out, dataset)


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """1 if the last number in the answer is the right one, else 0; numbers must be in digits."""
    found = _NUMBER.findall(str(state.get("answer", "")))
    return float(bool(found) and _value(found[-1]) == _value(str(example["answer"])))


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def load_splits(dataset: str, *configurations: str) -> tuple[Dataset, Dataset]:
    """Train and held-out rows as they are, from a hub id, a folder or a file.

    Args:
        dataset: as `load_data` takes it.
        configurations: those of a data set on the hub that are put together; none: all.

    Raises:
        ValueError: nothing is found there.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        split = load_dataset(_format(path), data_files=str(path), split="train")
        indices = range(len(split))
        return split.select([i for i in indices if i % 10]), split.select(list(indices)[::10])
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".parquet", ".jsonl", ".json"))
        parts = [[f for f in files if word in f.name] for word in ("train", "test")]
        if not all(parts):
            raise ValueError(
                f"{dataset} must hold .parquet or .jsonl files with 'train' and 'test' in their "
                f"names; it holds {[f.name for f in files] or 'none'}"
            )
        train, held_out = (
            load_dataset(_format(p[0]), data_files=[str(f) for f in p], split="train")
            for p in parts
        )
        return train, held_out
    if dataset.startswith((".", "/", "~")) or dataset.count("/") != 1:
        raise ValueError(
            f"dataset {dataset!r} is neither one of this workflow's own, a file or folder that "
            "exists, nor a hub id such as openai/gsm8k"
        )
    names = configurations or get_dataset_config_names(dataset)
    parts = [load_dataset(dataset, name) for name in names]
    if not all(isinstance(p, DatasetDict) and {"train", "test"} <= set(p) for p in parts):
        raise ValueError(f"dataset {dataset!r} has no splits 'train' and 'test'")
    train, held_out = (
        concatenate_datasets([p[split] for p in parts]) for split in ("train", "test")
    )
    return train, held_out


def _format(path: Path) -> str:
    return "parquet" if path.suffix == ".parquet" else "json"


def _normalized(data: Dataset, source: str) -> Dataset:
    """GSM8K's rows with the final number as the answer, its working as the solution."""
    missing = {"question", "answer"} - set(data.column_names)
    if missing:
        raise ValueError(
            f"dataset {source!r} has columns {data.column_names}; it needs question and answer"
        )

    def split(row: dict[str, Any]) -> dict[str, str]:
        solution, _, final = str(row["answer"]).rpartition("####")
        found = _NUMBER.findall(final)
        if not found:
            raise ValueError(f"dataset {source!r}: the answer {row['answer']!r} has no number")
        return {"answer": found[-1].replace(",", ""), "solution": solution.strip()}

    return data.map(split, load_from_cache_file=False)
