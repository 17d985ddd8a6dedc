"""What gsm8k is trained on: grade-school word problems, and a reward for the final answer."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[2]))

from marft_graph.rewards import math_equal
from workflows.math_duo.task import load_gsm8k

SAMPLE = Path(__file__).parent / "sample"
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?<![\d)%])-\s?)?[$€£]?(?P<minus>-)?"
    r"(?P<value>\d[\d,]*(?:\.\d+)?(?:\s+\d+/\d+|\s?/\s?\d+)?|\.\d+)(?P<percent>\s?%)?"
)
_CUES = re.compile(r"answer\b[^\n\d]{0,20}?(?:\bis\b|:|=)", re.IGNORECASE)
_UNITS = (
    ("second", "minute", "hour", "day", "week", "month", "year", "decade"),
    ("cent", "dollar"),
    ("inch", "foot", "yard", "mile"),
    ("millimeter", "centimeter", "meter", "kilometer"),
    ("ounce", "pound", "ton"),
    ("gram", "kilogram"),
    ("milliliter", "liter"),
    ("cup", "pint", "quart", "gallon"),
)
"""Units that can be taken for each other."""
_SPELLINGS = (
    {unit: unit for family in _UNITS for unit in family}
    | {f"{unit}s": unit for family in _UNITS for unit in family}
    | {"inches": "inch", "feet": "foot", "ft": "foot", "buck": "dollar", "bucks": "dollar"}
    | {"min": "minute", "mins": "minute", "sec": "second", "secs": "second", "hr": "hour"}
    | {"hrs": "hour", "km": "kilometer", "cm": "centimeter", "kg": "kilogram", "lb": "pound"}
    | {"lbs": "pound", "oz": "ounce", "¢": "cent"}
)
_ASKED = re.compile(r"how (?:many|much)(?: more| fewer| less| total)? ([a-z]+)|\bin ([a-z]+)\s*\?")


def load_data(dataset: str = "sample") -> tuple[Dataset, Dataset]:
    """Train and held-out examples, with columns question, answer (a number) and solution.

    Args:
        dataset: `sample`, 48 problems of GSM8K that are in this folder; a hub id such as
            `openai/gsm8k`; a folder or a file, as math_duo takes them.

    Raises:
        ValueError: nothing is found there, or the columns are not those of GSM8K.
    """
    return load_gsm8k(str(SAMPLE) if dataset == "sample" else dataset)


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """1 if the final answer is the right number, and in no other unit than asked for; else 0."""
    return float(is_right(str(state["answer"]), str(example["answer"]), str(example["question"])))


def is_right(text: str, expected: str, question: str = "") -> bool:
    r"""Whether what a model wrote ends in the expected number.

    Args:
        text: its words; the final answer is what `final_answer` finds.
        expected: the number.
        question: if it asks for a unit, an answer in another one of its kind is wrong.

    >>> is_right("She has 3 * 6 = 18 eggs.\n#### 18", "18")
    True
    >>> is_right("The answer is 18 hours.", "18", "How many minutes does it take?")
    False
    """
    found = final_answer(text)
    if found is None:
        return False
    answer, unit = found
    asked = _asked_unit(question)
    if unit != asked and any({unit, asked} <= set(family) for family in _UNITS):
        return False
    return math_equal(answer, expected)


def final_answer(text: str) -> tuple[str, str] | None:
    r"""The number that a text gives as its answer, and the word after it if that is a unit.

    The first of these that is there: what follows the last `####`; what is in the last `\boxed{}`;
    what follows the last "answer is" or the like, in its sentence, after its last equals sign; the
    text's last number. Two numbers with an "or" between them are no answer.

    >>> final_answer("He pays 5 * 3 dollars. The answer is $15.00."), final_answer("I do not know")
    (('15.00', ''), None)
    >>> final_answer(r"So it is \boxed{\frac{1}{2}} of 8 cups.")
    ('\\boxed{\\frac{1}{2}}', '')
    """
    if "####" in text:
        return _first(text.rpartition("####")[2].strip().partition("\n")[0])
    if "\\boxed{" in text:
        return _first("\\boxed{" + _braced(text.rpartition("\\boxed{")[2]) + "}")
    cues = list(_CUES.finditer(text))
    if cues:
        sentence = re.split(r"[.!?;](?:\s|$)|\n(?=.*\S)", text[cues[-1].end() :].lstrip(" \n*"))[0]
        found = _first(sentence.rpartition("=")[2]) or _first(sentence)
        if found is not None:
            return found
    numbers = list(_NUMBER.finditer(text))
    return _with_unit(text, numbers, len(numbers) - 1) if numbers else None


def _first(text: str) -> tuple[str, str] | None:
    """The first number of a text that begins with the answer."""
    if re.search(r"\\d?frac|\\sqrt|\\pi", text):  # a formula: math-verify reads it as it is
        return text, ""
    text = text.replace("\\$", "$").replace("\\%", "%").replace("\\!", "")
    numbers = list(_NUMBER.finditer(text))
    return _with_unit(text, numbers, 0) if numbers else None


def _with_unit(text: str, numbers: list[re.Match[str]], chosen: int) -> tuple[str, str] | None:
    for a, b in zip(numbers[max(0, chosen - 1) :], numbers[chosen : chosen + 2], strict=False):
        if a is not b and re.fullmatch(r"\W*\bor\b\W*", text[a.end() : b.start()]):
            return None
    number = numbers[chosen]
    sign = "-" if number["sign"] or number["minus"] else ""
    value = number["value"].replace(",", "")
    if " " in value and "/" in value and not re.fullmatch(r"\d+\s?/\s?\d+", value):
        whole, part = value.split(maxsplit=1)  # a mixed number
        value = f"({whole}+{part})"
    after = re.match(r"[\s*\\]*(?:text|mathrm)?[{\s]*([a-zA-Z¢]+)", text[number.end() :])
    unit = _SPELLINGS.get(after[1].lower(), "") if after else ""
    return sign + value + ("%" if number["percent"] else ""), unit


def _braced(text: str) -> str:
    """A text up to the brace that closes it."""
    depth = 1
    for place, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:place]
    return text


def _asked_unit(question: str) -> str:
    """The unit that a question asks for; empty where it names none."""
    words = [a or b for a, b in _ASKED.findall(question.lower())]
    return _SPELLINGS.get(words[-1], "") if words else ""
