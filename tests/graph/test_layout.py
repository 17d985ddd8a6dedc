"""Where nodes stand: downward, apart from each other, and the same every time."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest

from marft_graph import compile_graph
from marft_graph.graph.flex_mg import END, START, FlexMG
from marft_graph.graph.layout import layout
from tests.apps import duo, voters
from tests.graph import real_apps

APPS = {
    "duo": duo,
    "voters": voters,
    "trading_team": real_apps.trading_team,
    "sixty": real_apps.sixty,
}


@pytest.fixture(params=APPS)
def flex_mg(request: pytest.FixtureRequest) -> FlexMG:
    return compile_graph(APPS[request.param]())


def test_no_two_boxes_overlap_and_all_are_inside(flex_mg: FlexMG) -> None:
    found = layout(flex_mg)
    assert set(found.places) == set(flex_mg.graph)
    for a, b in itertools.combinations(found.places.values(), 2):
        apart_x = abs(a.x - b.x) >= a.half_width + b.half_width
        apart_y = abs(a.y - b.y) >= a.half_height + b.half_height
        assert apart_x or apart_y
    for place in found.places.values():
        assert place.half_width <= place.x <= found.width - place.half_width
        assert place.half_height <= place.y <= found.height - place.half_height


def test_edges_lead_downward_but_for_those_that_close_a_loop(flex_mg: FlexMG) -> None:
    places = layout(flex_mg).places
    condensed = nx.condensation(flex_mg.control).graph["mapping"]
    for a, b in flex_mg.control.edges:
        if condensed[a] != condensed[b]:
            assert places[a].y < places[b].y
    assert places[START].y == min(place.y for place in places.values())
    assert places[END].y == max(place.y for place in places.values())


def test_the_same_graph_is_drawn_the_same(flex_mg: FlexMG) -> None:
    again = FlexMG.from_dict(flex_mg.to_dict())
    assert layout(flex_mg).places == layout(again).places
