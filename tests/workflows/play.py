"""One episode of a workflow folder with scripted answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marft_graph import Episode, FakeEngine, run_episodes
from marft_graph.workflow import load_target


def play(folder: Path, example: Mapping[str, Any], engine: FakeEngine) -> Episode:
    """Run the app once and close the engine."""
    workflow = load_target(str(folder))
    assert workflow.reward is not None
    try:
        return run_episodes(workflow.graph, [example], engine=engine, reward=workflow.reward)[0]
    finally:
        engine.close()
