"""One episode as a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from marft_graph.episode import Call, Episode
from marft_graph.run.timeline import to_timeline

SVG = "{http://www.w3.org/2000/svg}"


def call(index: int, node: str, parents: tuple[int, ...], started: float, seconds: float) -> Call:
    return Call(
        agent=node,
        node=node,
        index=index,
        parents=parents,
        prompt_ids=(1,),
        completion_ids=(2, 3),
        logprobs=(-1.0, -1.0),
        finish_reason="stop",
        adapter_version=0,
        started=started,
        seconds=seconds,
    )


def drawn(*calls: Call) -> tuple[list[Any], ET.Element]:
    tree = ET.fromstring(to_timeline(Episode({}, calls)))
    return [r for r in tree.iter(f"{SVG}rect") if r.get("class") == "bar"], tree


def test_bars_stand_where_and_as_long_as_the_calls_ran() -> None:
    bars, _ = drawn(
        call(0, "a", (), 0.0, 2.0), call(1, "b", (0,), 2.0, 1.0), call(2, "c", (0,), 2.0, 2.0)
    )
    lefts = [float(bar.get("x")) for bar in bars]
    widths = [float(bar.get("width")) for bar in bars]
    assert lefts[1] == lefts[2] == lefts[0] + widths[0]  # b and c begin together, after a
    assert abs(widths[2] - 2 * widths[1]) < 0.2
    assert len({bar.get("y") for bar in bars}) == 3  # a row for each node


def test_calls_of_one_node_share_its_row() -> None:
    bars, tree = drawn(call(0, "a", (), 0.0, 1.0), call(1, "a", (0,), 1.0, 1.0))
    assert len({bar.get("y") for bar in bars}) == 1
    assert len([line for line in tree.iter(f"{SVG}line") if line.get("class") == "row"]) == 1


def test_a_bar_says_who_fed_its_call() -> None:
    bars, tree = drawn(call(0, "a", (), 0.0, 1.0), call(1, "b", (0,), 1.0, 1.0))
    titles = [bar.find(f"{SVG}title").text for bar in bars]
    assert "depends on no call" in titles[0]
    assert titles[1].endswith("depends on 0 (a)")
    assert len([p for p in tree.iter(f"{SVG}path") if p.get("class") == "feeds"]) == 1


def test_names_that_look_like_markup_are_text() -> None:
    _, tree = drawn(call(0, "<b>&", (), 0.0, 1.0))
    assert any("<b>&" in (text.text or "") for text in tree.iter(f"{SVG}text"))


def test_an_episode_without_calls_has_no_picture() -> None:
    assert to_timeline(Episode({}, ())) == ""
