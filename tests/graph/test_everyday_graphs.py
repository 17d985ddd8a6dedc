"""Graphs as people write them: what `inspect` says of them is what runs show, no more, no less.

Runs with several scripts look for a parent that D calls `never`, for an `always` that a call
refutes, and for a step or an end that has no edge.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langgraph.graph import END

from marft_graph import FakeEngine, FlexMG, compile_graph, run_episodes
from marft_graph.engine.base import GenerationRequest
from marft_graph.episode import Episode
from marft_graph.graph.draw import summary
from marft_graph.names import agent_path
from marft_graph.rollout.answers import schema_of
from marft_graph.rollout.dry_run import Script, example_of
from tests.graph.everyday_apps import EVERYDAY

NAMES = list(EVERYDAY)


def last_choice(request: GenerationRequest) -> str | AIMessage:
    """As the dry run, but the last value of every choice, and no tool."""
    schema = schema_of(request.response_format)
    return json.dumps(_last(schema, schema)) if schema is not None else "dry run"


def _last(schema: Any, root: Any) -> Any:
    if schema.get("type") == "object":
        return {name: _last(part, root) for name, part in schema["properties"].items()}
    return schema["enum"][-1] if schema.get("enum") else example_of(schema, root)


def alternating() -> Callable[[GenerationRequest], str | AIMessage]:
    """Now as the dry run, now as `last_choice`."""
    turns = itertools.count()
    script = Script()
    return lambda request: (script, last_choice)[next(turns) % 2](request)


def episodes_of(name: str, app: Any) -> list[Episode]:
    example = EVERYDAY[name].example
    found = []
    for script in (Script(), last_choice, alternating(), "plain text"):
        engine = FakeEngine(script)
        app = app.with_config(recursion_limit=25)
        found += run_episodes(app, [example], engine=engine, episode_timeout=30)
        engine.close()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_agents_ends_and_loops_are_those_that_a_person_reads_off_the_code(name: str) -> None:
    everyday = EVERYDAY[name]
    flex_mg = compile_graph(everyday.make())
    assert set(flex_mg.agents) == everyday.agents
    assert flex_mg.uncertain == ()
    ends = {a for a, b, _ in flex_mg.control_edges if b == END}
    assert ends == everyday.ends
    if everyday.loops:
        assert set(flex_mg.cycles) == everyday.loops
    assert "can never run" not in summary(flex_mg)


@pytest.mark.parametrize("name", NAMES)
def test_every_loop_in_words_is_a_way_along_edges(name: str) -> None:
    flex_mg = compile_graph(EVERYDAY[name].make())
    control = flex_mg.control
    for cycle in flex_mg.cycles:
        for a, b in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
            assert control.has_edge(a, b)
        assert f"loop: {' -> '.join([*cycle, cycle[0]])}" in summary(flex_mg)
    inside = {node for loop in flex_mg.loops for node in loop}
    assert inside == {node for cycle in flex_mg.cycles for node in cycle}


@pytest.mark.parametrize("name", NAMES)
def test_no_run_contradicts_never_or_always(name: str) -> None:
    app = EVERYDAY[name].make()
    flex_mg = compile_graph(app)
    found = episodes_of(name, app)
    calls = [(episode, call) for episode in found for call in episode.calls]
    assert calls
    for episode, call in calls:
        here = agent_path(call.node)
        assert here in flex_mg.agents
        seen = {agent_path(episode.calls[p].node) for p in call.parents}
        assert not [j for j in seen if flex_mg.dependency(here, j) == "never"], (here, seen)
        is_first = not any(episode.calls[p].task_id == call.task_id for p in call.parents)
        if is_first:
            assert not missing(flex_mg, here, seen), (here, seen)


def missing(flex_mg: FlexMG, agent: str, seen: set[str]) -> list[str]:
    """Agents that one is said to observe always, and did not."""
    return [j for j in flex_mg.agents if flex_mg.dependency(agent, j) == "always" and j not in seen]
