"""Every workflow's app is plain LangGraph, as a user's is."""

from __future__ import annotations

from pathlib import Path

import pytest

GRAPHS = sorted((Path(__file__).parents[2] / "workflows").glob("*/graph.py"))


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.parent.name)
def test_the_app_never_imports_marft_graph(graph: Path) -> None:
    assert len(GRAPHS) >= 4
    assert "marft" not in graph.read_text(encoding="utf-8").lower()
