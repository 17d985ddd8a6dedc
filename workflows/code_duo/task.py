"""What code_duo is trained on: tasks for a coder and a tester, and a reward from the sandbox.

Code and tests are run nowhere but in the sandbox, one program of one implementation at a time, and
what is right is never there: outputs are compared here.
"""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[2]))

from marft_graph import Reward
from marft_graph.sandbox import run_python
from workflows.math_duo.task import calculations, story

FUNCTIONS = Path(__file__).parent / "functions"
SECONDS = 5.0
"""For one program, by the clock."""
_MOST_CHARACTERS = 4000

# What a model wrote is data to these programs. Code may be an expression, which is then what
# `solve` returns, or define `solve` itself; a fence around it does not count.
_COMMON = """
import json, sys

def unfenced(text):
    parts = text.split("```")
    if len(parts) < 3:
        return text.strip()
    first, _, rest = parts[1].partition("\\n")
    return (rest if first.strip() in ("", "python", "py") else parts[1]).strip()

def expression(text):
    try:
        return compile(text, "<expression>", "eval")
    except SyntaxError:
        return None

def solver(text):
    space = {}
    value = expression(text)
    if value is not None:
        return lambda: eval(value, space)
    exec(compile(text, "<code>", "exec"), space)
    return space["solve"]

given = json.loads(input())
solve = solver(unfenced(given["code"]))
"""
_OUTPUTS = """
print()
print(json.dumps([solve(*arguments) for arguments in given["inputs"]]))
"""
# A test is statements with asserts, a comparison, or the value that `solve()` must have.
_TEST = """
test = unfenced(given["test"])
value = expression(test)
if value is None:
    exec(compile(test, "<test>", "exec"), {"solve": solve})
else:
    found = eval(value, {"solve": solve})
    assert found if isinstance(found, bool) else found == solve()
"""


def generate(seed: int = 0, held_out: int = 128, train: int = 1024) -> tuple[Dataset, Dataset]:
    """Word problems whose code is a calculation; the held-out ones ask for other calculations."""
    rng = random.Random(seed)
    pool = calculations()
    rng.shuffle(pool)
    cut = len(pool) // 5
    splits = []
    for count, choices in ((train, pool[cut:]), (held_out, pool[:cut])):
        tasks: dict[str, dict[str, Any]] = {}
        while len(tasks) < count:
            a, operation, b = rng.choice(choices)
            text = story(a, operation, b, rng)
            other = f"{a}{'-' if operation == '+' else '+'}{b}"
            tasks[text] = {
                "task": text,
                "reference": f"{a}{operation}{b}",
                "wrong": [other],
                "inputs": "[[]]",
                "outputs": json.dumps([a + b if operation == "+" else a - b]),
            }
        splits.append(Dataset.from_list(list(tasks.values())))
    return splits[0], splits[1]


def load_data(dataset: str = "generated") -> tuple[Dataset, Dataset]:
    """Train and held-out examples: task, reference and wrong implementations, inputs and outputs.

    Args:
        dataset: `generated`, word problems whose code is a calculation; `functions`, 16 small
            functions written for this folder; or another folder with `train.jsonl` and `test.jsonl`
            in the format of that one.

    Raises:
        ValueError: there is no such folder, or its files have other columns.
    """
    if dataset == "generated":
        return generate()
    folder = FUNCTIONS if dataset == "functions" else Path(dataset).expanduser()
    return _read(folder / "train.jsonl"), _read(folder / "test.jsonl")


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> Reward:
    """Half for each agent; both have 1 in all where both did everything right.

    The coder earns the share of hidden inputs on which its code gives the right output. The tester
    earns the share of wrong implementations that its test fails, if the reference passes it.
    """
    code, test = (str(state[name])[:_MOST_CHARACTERS] for name in ("code", "test"))
    return Reward(
        nodes={
            "coder": share_right(code, example["inputs"], example["outputs"]) / 2,
            "tester": share_caught(test, example["reference"], tuple(example["wrong"])) / 2,
        }
    )


@functools.lru_cache(maxsize=10_000)
def share_right(code: str, inputs: str, outputs: str) -> float:
    """Share of the inputs (lists of arguments, as JSON) on which code gives the right output.

    >>> share_right("def solve(n): return n * n", "[[2], [3]]", "[4, 6]")
    0.5
    """
    expected = json.loads(outputs)
    given = {"code": code, "inputs": json.loads(inputs)}
    result = run_python(_COMMON + _OUTPUTS, stdin=json.dumps(given), timeout=SECONDS)
    if not result.ok:
        return 0.0
    try:
        found = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):  # the code left the program early
        return 0.0
    if not isinstance(found, list) or len(found) != len(expected):
        return 0.0
    return sum(map(_same, found, expected)) / len(expected)


@functools.lru_cache(maxsize=10_000)
def share_caught(test: str, reference: str, wrong: Sequence[str]) -> float:
    """Share of wrong implementations that a test fails; 0 if it fails the reference as well.

    >>> share_caught("assert solve() == 9", "3 * 3", ("3 + 3", "9"))
    0.5
    """
    if not _passes(test, reference):
        return 0.0
    return sum(not _passes(test, code) for code in wrong) / len(wrong)


def _passes(test: str, code: str) -> bool:
    given = json.dumps({"code": code, "test": test})
    return run_python(_COMMON + _TEST, stdin=given, timeout=SECONDS).ok


def _same(found: Any, expected: Any) -> bool:
    """Whether an output is right: of the right type too, as 1 is not True."""
    return type(found) is type(expected) and found == expected


def _read(path: Path) -> Dataset:
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; dataset is 'generated', 'functions', or a folder with "
            "train.jsonl and test.jsonl"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    for number, row in enumerate(rows, 1):
        if row.keys() != {"task", "reference", "wrong", "inputs", "outputs"} or not row["wrong"]:
            raise ValueError(
                f"{path}, line {number} has {sorted(row)}; it needs task, reference, wrong (not "
                "empty), inputs and outputs"
            )
        row |= {name: json.dumps(row[name]) for name in ("inputs", "outputs")}
    return Dataset.from_list(rows)
