"""Published multi-agent packages, and apps of real size: compile, draw, run, compare."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
from langchain_core.messages import AIMessage

from marft_graph import FakeEngine, compile_graph, run_episodes
from marft_graph.graph.draw import summary, to_dot, to_mermaid
from marft_graph.graph.page import to_html
from marft_graph.graph.picture import to_svg
from marft_graph.names import agent_path
from marft_graph.rollout.dry_run import Script
from tests.graph import real_apps

_marks = itertools.count()
_script = Script()
MESSAGES = {"messages": [("user", "hello")]}
APPS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "tool_agent": (MESSAGES, {"model"}),
    "supervisor_team": (MESSAGES, {"supervisor", "adder", "reader"}),
    "swarm": (MESSAGES, {"alice", "bob"}),
    "reflection": (MESSAGES, {"graph/writer", "reflection/judge"}),
    "trading_team": (
        {"ticker": "ACME"},
        {*real_apps.ANALYSTS, *real_apps.DEBATERS, "Bull Researcher", "Bear Researcher"}
        | {"Research Manager", "Trader", "Portfolio Manager"},
    ),
    "deep_research": (
        {"question": "why?"},
        {"brief", "report", "team/supervisor", "team/researcher/compress"}
        | {"team/researcher/search"},
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", APPS)
def test_it_compiles_draws_and_runs(name: str) -> None:
    example, agents = APPS[name]
    if name in ("supervisor_team", "swarm", "reflection"):
        pytest.importorskip(f"langgraph_{name.partition('_')[0]}")
    make: Callable[[], Any] = getattr(real_apps, name)
    app = make()
    flex_mg = compile_graph(app)
    assert set(flex_mg.agents) == agents
    ElementTree.fromstring(to_svg(flex_mg))
    for text in (summary(flex_mg), to_mermaid(flex_mg), to_dot(flex_mg), to_html(flex_mg)):
        assert all(agent in text for agent in agents)
    episodes = run_episodes(app, [example] * 2, engine=FakeEngine(Script()), episode_timeout=60)
    for episode in episodes:
        assert episode.status == "ok", episode.error
        assert {agent_path(call.node) for call in episode.calls} == agents
        for call in episode.calls:
            for parent in call.parents:
                i, j = agent_path(call.node), agent_path(episode.calls[parent].node)
                assert flex_mg.dependency(i, j) != "never", flex_mg.explain(i, j)


def marked(request: Any) -> Any:
    """A scripted answer with a mark of its own, in its text and in what it asks tools for."""
    made, mark = _script(request), f"<{next(_marks)}>"
    if isinstance(made, AIMessage):
        for call in made.tool_calls:
            call["args"] = {
                k: v + mark if isinstance(v, str) else v for k, v in call["args"].items()
            }
        made.content = mark
        return made
    return made if made.startswith("{") else made + mark


def marks_in(messages: Any) -> set[str]:
    return set(re.findall(r"<\d+>", json.dumps(messages)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["tool_agent", "supervisor_team", "swarm", "reflection", "trading_team"]
)
def test_parents_are_the_calls_whose_marks_a_prompt_shows(name: str) -> None:
    if name in ("supervisor_team", "swarm", "reflection"):
        pytest.importorskip(f"langgraph_{name.partition('_')[0]}")
    app = getattr(real_apps, name)()
    (episode,) = run_episodes(app, [APPS[name][0]], engine=FakeEngine(marked), episode_timeout=60)
    assert episode.status == "ok", episode.error
    own = {call.index: marks_in(call.messages[-1]) for call in episode.calls}
    for call in episode.calls:
        shown = marks_in(call.messages[:-1])
        earlier = {c.index for c in episode.calls[: call.index] if c.task_id == call.task_id}
        expected = earlier | {index for index, marks in own.items() if marks & shown}
        plain = {index for index, marks in own.items() if not marks}
        assert set(call.parents) - plain == expected - plain, (call.index, call.node)


def test_the_debates_of_the_trading_team_are_loops_and_the_analysts_are_parallel() -> None:
    flex_mg = compile_graph(real_apps.trading_team())
    assert flex_mg.loops == (("Bull Researcher", "Bear Researcher"), real_apps.DEBATERS)
    assert flex_mg.parallel_groups == (tuple(sorted(real_apps.ANALYSTS)),)
    assert flex_mg.dependency("Research Manager", "Trader") == "never"
    assert flex_mg.dependency("Trader", "Bull Researcher") == "never"  # reads the plan alone
    assert flex_mg.dependency("Trader", "Research Manager") == "always"
    assert flex_mg.dependency("Research Manager", "Bull Researcher") == "always"


def test_researchers_side_by_side_do_not_observe_each_other_in_a_run() -> None:
    app = real_apps.deep_research()
    (episode,) = run_episodes(app, [{"question": "why?"}], engine=FakeEngine(Script()))
    calls = episode.calls
    first = [c for c in calls if agent_path(c.node) == "team/researcher/compress"][:2]
    assert first[1].index not in first[0].parents
    assert first[0].index not in first[1].parents


def test_a_picture_of_sixty_nodes_has_no_overlaps() -> None:
    from marft_graph.graph.layout import layout

    places = list(layout(compile_graph(real_apps.sixty())).places.values())
    assert len(places) == 62
    for i, a in enumerate(places):
        for b in places[i + 1 :]:
            apart_x = abs(a.x - b.x) >= a.half_width + b.half_width
            assert apart_x or abs(a.y - b.y) >= a.half_height + b.half_height
