"""What shop is trained on: requests made from a seed, and the reward."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[2]))

from workflows.shop.graph import CATALOGUE

HELD_OUT = 24


def generate(seed: int = 0) -> tuple[Dataset, Dataset]:
    """A request for each item of the catalogue (request, item, budget); half of them held out."""
    rng = random.Random(seed)
    places = list(range(len(CATALOGUE)))
    rng.shuffle(places)
    rows = []
    for place in places:
        item = CATALOGUE[place]
        budget = item["price"] + rng.randrange(6)
        text = f"a {item['size']} {item['colour']} {item['thing']} for at most {budget}"
        rows.append({"request": text, "item": place, "budget": budget})
    return Dataset.from_list(rows[HELD_OUT:]), Dataset.from_list(rows[:HELD_OUT])


def load_data(dataset: str = "generated") -> tuple[Dataset, Dataset]:
    """Train and held-out examples, with columns request, item (its place) and budget.

    Raises:
        ValueError: `dataset` is not `generated`, the only one there is.
    """
    if dataset != "generated":
        raise ValueError(f"dataset is {dataset!r}; this workflow has 'generated' only")
    return generate()


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """A quarter each for the right thing, colour and size, and for a price within the budget.

    Nothing bought is 0; so is a thing of another kind, whatever its colour.
    """
    if state.get("bought") is None:
        return 0.0
    bought, wanted = CATALOGUE[state["bought"]], CATALOGUE[example["item"]]
    if bought["thing"] != wanted["thing"]:
        return 0.0
    right = [bought[name] == wanted[name] for name in ("thing", "colour", "size")]
    return (sum(right) + (bought["price"] <= example["budget"])) / 4
