"""The garbage collector is left alone by and by, and as it was found."""

from __future__ import annotations

import gc

import pytest

from marft_graph.rollout.collector import fewer_collections


def test_thresholds_come_back_with_the_last_user() -> None:
    usual = gc.get_threshold()
    with fewer_collections():
        raised = gc.get_threshold()
        with fewer_collections():
            assert gc.get_threshold() == raised
        assert gc.get_threshold() == raised
    assert raised[0] > usual[0]
    assert gc.get_threshold() == usual


def test_thresholds_come_back_after_an_error() -> None:
    usual = gc.get_threshold()
    with pytest.raises(RuntimeError), fewer_collections():
        raise RuntimeError
    assert gc.get_threshold() == usual


@pytest.mark.parametrize("own", [(0, 10, 10), (10**6, 10, 10)])
def test_a_process_with_rarer_collections_keeps_them(own: tuple[int, int, int]) -> None:
    usual = gc.get_threshold()
    gc.set_threshold(*own)
    try:
        with fewer_collections():
            assert gc.get_threshold() == own
        assert gc.get_threshold() == own
    finally:
        gc.set_threshold(*usual)
