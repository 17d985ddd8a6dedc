from __future__ import annotations

import pytest
import torch

from marft_graph.engine.prefixes import SHORTEST, Prefixes

LAYERS = [(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))]


def ids(first: int, count: int = 100) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def test_what_begins_alike_is_found_with_what_is_shared() -> None:
    prefixes = Prefixes(1000)
    prefixes.put("a", ids(0), LAYERS)
    found = prefixes.find("a", (*ids(0, 90), 7, 8))
    assert found is not None
    assert (found[0].ids, found[1]) == (ids(0), 90)
    assert prefixes.find("b", ids(0)) is None
    assert prefixes.find("a", ids(500)) is None


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    prefixes = Prefixes(1000)
    prefixes.put("a", ids(0), LAYERS)
    found = prefixes.find("a", ids(0))
    assert found is not None
    assert found[1] == 99


def test_less_than_half_is_not_worth_it() -> None:
    prefixes = Prefixes(1000)
    prefixes.put("a", ids(0), LAYERS)
    assert prefixes.find("a", (*ids(0, 40), *ids(500, 41))) is None
    assert prefixes.find("a", (*ids(0, 40), *ids(500, 40))) is not None


def test_a_conversation_is_kept_once() -> None:
    prefixes = Prefixes(1000)
    prefixes.put("a", ids(0, 80), LAYERS)
    prefixes.put("a", ids(0, 150), LAYERS)
    prefixes.put("a", ids(0, 100), LAYERS)
    assert (len(prefixes), prefixes.tokens) == (1, 150)


def test_what_was_used_least_recently_goes_first() -> None:
    prefixes = Prefixes(250)
    prefixes.put("a", ids(0), LAYERS)
    prefixes.put("a", ids(1000), LAYERS)
    assert prefixes.find("a", ids(0)) is not None
    prefixes.put("a", ids(2000), LAYERS)
    assert prefixes.tokens == 200
    assert prefixes.find("a", ids(0)) is not None
    assert prefixes.find("a", ids(1000)) is None


@pytest.mark.parametrize(
    ("length", "is_wanted"), [(SHORTEST - 1, False), (250, True), (251, False)]
)
def test_only_what_is_long_enough_and_fits_is_wanted(length: int, is_wanted: bool) -> None:
    assert Prefixes(250).wants(ids(0, length)) is is_wanted


def test_nothing_is_found_after_the_adapters_changed() -> None:
    prefixes = Prefixes(1000)
    prefixes.put("a", ids(0), LAYERS)
    prefixes.clear()
    assert prefixes.find("a", ids(0)) is None
    assert (len(prefixes), prefixes.tokens) == (0, 0)
