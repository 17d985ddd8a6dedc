"""What flight_booking is trained on: requests made from a seed, and the reward."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[2]))

from workflows.flight_booking.graph import CITIES, DAYS, FLIGHTS

HELD_OUT = 20


def generate(seed: int = 0) -> tuple[Dataset, Dataset]:
    """A request for every route and day (request, route, day, number); 20 of 60 are held out."""
    rows = []
    for start, first in CITIES.items():
        for end, second in CITIES.items():
            for day in DAYS if start != end else ():
                route = f"{first}-{second}"
                offers = [f for f in FLIGHTS if (f["route"], f["day"]) == (route, day)]
                cheapest = min(offers, key=lambda flight: flight["price"])
                request = f"the cheapest flight from {start} to {end} on {day}"
                row = {"request": request, "route": route, "day": day}
                rows.append({**row, "number": cheapest["number"]})
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows[HELD_OUT:]), Dataset.from_list(rows[:HELD_OUT])


def load_data(dataset: str = "generated") -> tuple[Dataset, Dataset]:
    """Train and held-out examples, with columns request, route, day and number.

    Raises:
        ValueError: `dataset` is not `generated`, the only one there is.
    """
    if dataset != "generated":
        raise ValueError(f"dataset is {dataset!r}; this workflow has 'generated' only")
    return generate()


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """1 for the right flight; else a quarter each for one of the right day and the right route."""
    if state["booked"] == example["number"]:
        return 1.0
    booked = [flight for flight in FLIGHTS if flight["number"] == state["booked"]]
    return sum(
        0.25 * (flight[name] == example[name]) for flight in booked for name in ("day", "route")
    )
