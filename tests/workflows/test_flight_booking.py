"""Five agents book a flight: two work side by side, and a review can send the team back once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marft_graph import Episode, FakeEngine, compile_graph
from marft_graph.workflow import load_target
from tests.workflows.play import play
from workflows.flight_booking import task
from workflows.flight_booking.graph import FLIGHTS

FOLDER = Path(__file__).parents[2] / "workflows" / "flight_booking"
EXAMPLE = task.load_data()[0][0]
OTHER = next(
    flight
    for flight in FLIGHTS
    if (flight["route"], flight["day"]) == (EXAMPLE["route"], EXAMPLE["day"])
    and flight["number"] != EXAMPLE["number"]
)
ELSEWHERE = next(
    f for f in FLIGHTS if f["route"] != EXAMPLE["route"] and f["day"] == EXAMPLE["day"]
)


def run(ticket: Any, review: Any = "yes", day: str | None = None) -> Episode:
    script = {
        "orchestrator": "a flight",
        "calendar": day or EXAMPLE["day"],
        "location": EXAMPLE["route"].lower(),
        "ticket": ticket,
        "reflection": review,
    }
    return play(FOLDER, EXAMPLE, FakeEngine(script))


def test_calendar_and_location_do_not_observe_each_other() -> None:
    flex_mg = compile_graph(load_target(str(FOLDER)).graph)
    agents = {"orchestrator", "calendar", "location", "ticket", "reflection"}
    assert set(flex_mg.agents) == agents
    episode = run(EXAMPLE["number"])
    by_node = {call.node: call for call in episode.calls}
    calendar, location = by_node["calendar"], by_node["location"]
    assert calendar.index not in location.parents
    assert location.index not in calendar.parents
    assert set(by_node["ticket"].parents) >= {calendar.index, location.index}


@pytest.mark.parametrize(
    ("ticket", "expected"),
    [
        (EXAMPLE["number"], 1.0),
        (OTHER["number"], 0.5),
        (ELSEWHERE["number"], 0.25),
        ("MF999", 0.0),
    ],
)
def test_the_booked_flight_pays(ticket: str, expected: float) -> None:
    assert run(ticket).total_reward == expected


def test_the_cheapest_of_the_offers_is_right() -> None:
    offers = run("x").calls[3].messages[-2]["content"].splitlines()[1:]
    prices = {line.split(": ")[0]: int(line.split(": ")[1]) for line in offers}
    assert min(prices, key=prices.__getitem__) == EXAMPLE["number"]


def test_a_review_that_says_no_sends_the_team_back_once() -> None:
    episode = run([OTHER["number"], EXAMPLE["number"]], ["no, dearer than need be", "no"])
    assert [c.node for c in episode.calls].count("orchestrator") == 2
    second = [c for c in episode.calls if c.node == "orchestrator"][1]
    assert "Review: no, dearer" in second.messages[-2]["content"]
    assert episode.total_reward == 1.0


def test_a_day_that_is_none_finds_no_flight() -> None:
    episode = run("none", day="someday")
    assert episode.ok
    assert "no flight" in episode.calls[3].messages[-2]["content"]


def test_held_out_requests_are_never_trained_on() -> None:
    train, held_out = task.load_data()
    assert (len(train), len(held_out)) == (40, 20)
    assert not set(train["request"]) & set(held_out["request"])
