"""What math is trained on: competition problems in the format of MATH, graded by math-verify."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[2]))

from marft_graph.rewards import math_equal
from workflows.math_duo.task import load_splits

OWN = Path(__file__).parent / "own"
_BOXED = re.compile(r"\\f?box(?:ed)?\s*(\{|\d)")
_WORDS = re.compile(r"(?:\\text(?:bf|rm|it)?\s*\{)?\s*([A-Za-z][A-Za-z' -]+?)\s*\}?")


def load_data(dataset: str = "own") -> tuple[Dataset, Dataset]:
    r"""Train and held-out examples, with columns problem, answer, solution, level and type.

    Args:
        dataset: `own`, 24 problems that were written for this folder; a hub id such as
            `EleutherAI/hendrycks_math`, all of whose configurations are put together; a folder with
            parquet or JSON-lines files that have `train` and `test` in their names; or one such
            file, of which every tenth example is held out. The answer is what a solution has in its
            last `\boxed{}`.

    Raises:
        ValueError: nothing is found there, or the rows are not those of MATH.
    """
    train, held_out = load_splits(str(OWN) if dataset == "own" else dataset)
    return _answered(train, dataset), _answered(held_out, dataset)


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    r"""1 if the last `\boxed{}` is mathematically the example's answer, else 0."""
    return float(is_right(str(state["answer"]), str(example["answer"])))


def is_right(text: str, expected: str) -> bool:
    r"""Whether what a model wrote has the expected answer in its last `\boxed{}`.

    Both are compared as text first; what then differs, and is no word, by math-verify.

    >>> is_right(r"Hence $x = \boxed{\frac{2}{4}}$.", r"\frac12"), is_right("It is 0.5.", "0.5")
    (True, False)
    >>> is_right(r"The winner is \boxed{Eve}.", r"\text{Eve}")
    True
    """
    answer = boxed(text)
    if answer is None or not answer.strip():
        return False
    if _bare(answer) == _bare(expected):
        return True
    if _WORDS.fullmatch(expected.strip()) and len(_bare(expected)) > 1:
        return False
    return math_equal(f"${answer}$", f"${expected}$")


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` or `\fbox{}` of a text holds; None where there is none.

    >>> boxed(r"\boxed{1} or rather \boxed{\frac{1}{2}}."), boxed(r"\boxed 7"), boxed("7")
    ('\\frac{1}{2}', '7', None)
    """
    found = list(_BOXED.finditer(text))
    if not found:
        return None
    if found[-1][1] != "{":
        return found[-1][1]
    depth = 1
    start = found[-1].end()
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start:place]
    return None  # cut off


def _bare(answer: str) -> str:
    """An answer without spaces and the marks of plain text."""
    words = _WORDS.fullmatch(answer.strip())
    return re.sub(r"\s+", "", words[1] if words else answer)


def _answered(data: Dataset, source: str) -> Dataset:
    """MATH's rows with the boxed answer of the solution."""
    missing = {"problem", "solution"} - set(data.column_names)
    if missing:
        raise ValueError(
            f"dataset {source!r} has columns {data.column_names}; it needs problem and solution"
        )

    def answer(row: dict[str, Any]) -> dict[str, str]:
        found = boxed(row["solution"])
        if not (found or "").strip():
            raise ValueError(
                f"dataset {source!r}: the solution of {row['problem'][:60]!r} boxes no answer"
            )
        return {"answer": str(found)}

    return data.map(answer, load_from_cache_file=False)
