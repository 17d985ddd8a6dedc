"""The shop does what commands say, survives others, and pays for what was bought."""

from __future__ import annotations

from pathlib import Path

import pytest

from marft_graph import Episode, FakeEngine, compile_graph
from marft_graph.workflow import load_target
from tests.workflows.play import play
from workflows.shop import task
from workflows.shop.graph import CATALOGUE, MOST_STEPS

FOLDER = Path(__file__).parents[2] / "workflows" / "shop"
PLACE = next(n for n, i in enumerate(CATALOGUE) if i["thing"] == "cup" and i["colour"] == "red")
ITEM = CATALOGUE[PLACE]
EXAMPLE = {
    "request": f"a {ITEM['size']} red cup for at most {ITEM['price']}",
    "item": PLACE,
    "budget": ITEM["price"],
}


def run(*commands: str) -> Episode:
    return play(FOLDER, EXAMPLE, FakeEngine({"planner": "go on", "shopper": list(commands)}))


def test_shop_is_no_agent_and_the_two_others_are() -> None:
    flex_mg = compile_graph(load_target(str(FOLDER)).graph)
    assert set(flex_mg.agents) == {"planner", "shopper"}
    assert flex_mg.dependency("shopper", "planner") != "never"
    assert flex_mg.dependency("planner", "shopper") != "never"  # by way of the shop


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        ([f"search[{ITEM['size']} red cup]", "click[1]", "buy"], 1.0),
        (["Search[RED cup]", "click[1]", "back", "click[1]", "buy"], 1.0),
        ([f"search[{ITEM['size']} blue cup]", "click[1]", "buy"], 0.75),  # another colour
        (["search[large blue cup]", "click[1]", "buy"], 0.5),
        (["search[bag]", "click[1]", "buy"], 0.0),
        (["buy"], 0.0),
        (["search[elephant]", "click[1]"], 0.0),
        (["hello", "click[999]", "click[x]", "back", "search[]"], 0.0),
    ],
)
def test_commands_lead_to_what_is_bought(commands: list[str], expected: float) -> None:
    episode = run(*commands)
    assert episode.ok, episode.error
    assert episode.total_reward == expected
    assert len(episode.calls) <= 2 * MOST_STEPS


def test_pages_show_results_items_and_mistakes() -> None:
    episode = run("search[red cup]", "click[2]", "fly", "buy")
    pages = [c.messages[-2]["content"] for c in episode.calls if c.node == "shopper"]
    assert pages[0].startswith("Shop. You can: search[words]")
    assert "1: small red cup" in pages[1]
    assert "2: large red cup" in pages[1]
    assert pages[2].startswith("large red cup, ")
    assert "(there was no 'fly' here)" in pages[3]
    assert "(there was no 'buy' here)" in pages[4]  # the mistake led back to the start


def test_held_out_items_are_never_trained_on() -> None:
    train, held_out = task.load_data()
    assert (len(train), len(held_out)) == (24, 24)
    assert sorted([*train["item"], *held_out["item"]]) == list(range(48))
