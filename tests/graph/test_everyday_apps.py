"""Apps as other people write them: every agent found, every call met, parents as the text tells.

The oracle for parents knows nothing of graphs: each scripted answer carries a mark of its own. A
call's parents are the calls whose marks its prompt shows, and those of its own task that had been
answered before it; of another task's calls, one after the other, the last stands for the rest.
"""

from __future__ import annotations

import functools
import itertools
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from pydantic import BaseModel

from marft_graph import Call, Episode, FakeEngine, compile_graph, run_episodes
from marft_graph.graph.draw import summary
from marft_graph.learn.fate import Fate, UpdateFacts, count_fates, fates
from marft_graph.names import agent_path
from tests.graph import public_apps, real_apps

MESSAGES = {"messages": [("user", "hello")]}
_MARK = re.compile(r"<<(\d+)>>")


@dataclass(frozen=True)
class App:
    """An app, what it is run on, what its agents are, and what scripted answers choose."""

    build: Callable[[], Any]
    example: Mapping[str, Any]
    agents: set[str]
    choices: Mapping[str, list[Any]] = field(default_factory=dict)
    """Values of fields that decide where the app goes, in turn; the last one stays."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """More for `run_episodes`."""


def agree(example: Any, state: Any, interrupt: Any) -> str:
    """A person who agrees to everything."""
    return "sent"


APPS = {
    "research_team": App(
        public_apps.research_team,
        {"question": "why?"},
        {"write_brief", "supervisor", "supervisor_tools/researcher", "supervisor_tools/compress"}
        | {"final_report"},
    ),
    "email_assistant": App(
        public_apps.email_assistant,
        {"email": "Can we meet?"},
        {"triage_router", "response_agent"},
        {"classification": ["respond"]},
        {"on_interrupt": agree},
    ),
    "memory_agent": App(public_apps.memory_agent, MESSAGES, {"call_model", "store_memory"}),
    "rag": App(public_apps.rag, {"question": "why?"}, {"generate"}),
    "adaptive_rag": App(
        public_apps.adaptive_rag,
        {"question": "why?"},
        {"route_question", "generate"},
        {"source": ["web"], "binary_score": ["no", "yes"]},
    ),
    "corrective_rag": App(
        public_apps.corrective_rag,
        {"question": "why?"},
        {"grade_documents", "transform_query", "generate"},
        {"binary_score": ["no", "no", "yes"]},
    ),
    "code_agent": App(public_apps.code_agent, {"task": "sort"}, {"generate", "reflect"}),
    "sql_agent": App(public_apps.sql_agent, MESSAGES, {"generate_query", "check_query"}),
    "plan_and_execute": App(
        public_apps.plan_and_execute, {"goal": "a house"}, {"planner", "agent", "replan"}
    ),
    "map_reduce": App(
        public_apps.map_reduce,
        {"topic": "animals"},
        {"generate_topics", "generate_joke", "best_joke"},
    ),
    "thread_pool_essay": App(
        public_apps.thread_pool_essay, {"topic": "rain"}, {"write_sections", "join"}
    ),
    "functional_essay": App(
        public_apps.functional_essay,
        {"topic": "rain"},
        {"essay", "essay/outline", "essay/section"},
        run={"inputs": lambda example: example["topic"]},
    ),
    "subagents_as_tools": App(
        public_apps.subagents_as_tools,
        MESSAGES,
        {"model", "tools/calendar_agent", "tools/mail_agent"},
    ),
    "deep_agent": App(
        public_apps.deep_agent,
        MESSAGES,
        {"model", "tools/researcher", "tools/critic"},
        {"subagent_type": ["researcher", "critic"]},
    ),
    "summarizing_chat": App(
        public_apps.summarizing_chat,
        {"messages": [("user", f"turn {n}") for n in range(6)]},
        {"model", "SummarizationMiddleware.before_model"},
    ),
    "handoffs": App(public_apps.handoffs, MESSAGES, {"sales desk/work", "support desk/work"}),
    "evaluator_optimizer": App(
        public_apps.evaluator_optimizer,
        {"idea": "a dragon"},
        {"write", "judge"},
        {"passed": [False, True]},
    ),
    "supervisor_team": App(real_apps.supervisor_team, MESSAGES, {"supervisor", "adder", "reader"}),
    "swarm": App(real_apps.swarm, MESSAGES, {"alice", "bob"}),
    "trading_team": App(
        real_apps.trading_team,
        {"ticker": "ACME"},
        {*real_apps.ANALYSTS, *real_apps.DEBATERS, "Bull Researcher", "Bear Researcher"}
        | {"Research Manager", "Trader", "Portfolio Manager"},
    ),
}
EVERY_APP = pytest.mark.parametrize("name", APPS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a connection was opened: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class MarkedAnswers:
    """Answers with a mark each: tools in turn and each once, structure where it is asked for."""

    def __init__(self, choices: Mapping[str, list[Any]]) -> None:
        self._number = itertools.count()
        self._choices = {name: iter(values) for name, values in choices.items()}
        self._last = {name: values[-1] for name, values in choices.items()}

    def __call__(self, request: Any) -> str | AIMessage:
        mark = f"<<{next(self._number)}>>"
        schema = request.response_format
        if schema is not None:
            if isinstance(schema, type) and issubclass(schema, BaseModel):
                schema = schema.model_json_schema()
            schema = schema.get("json_schema", schema)
            return _json(self._value(schema.get("schema", schema), mark))
        called = {
            call["name"]
            for message in request.messages
            if isinstance(message, AIMessage)
            for call in message.tool_calls
        }
        tools = [tool["function"] for tool in request.tools]
        if request.tool_choice in (None, "auto", "none"):
            tools = [tool for tool in tools if tool["name"] not in called]
        if not tools:
            return f"text {mark}"
        chosen = tools[0]
        again = chosen["name"] == "task" and "critic" not in str(called)
        args = self._value(chosen["parameters"], mark)
        calls = [{"name": chosen["name"], "args": args, "id": f"id{mark}"}]
        if again and "subagent_type" in args:
            other = self._value(chosen["parameters"], mark)
            calls.append({"name": chosen["name"], "args": other, "id": f"other{mark}"})
        return AIMessage(f"calling {mark}", tool_calls=calls)

    def _value(self, schema: Mapping[str, Any], mark: str, name: str = "") -> Any:
        if name in self._choices:
            self._last[name] = next(self._choices[name], self._last[name])
            return self._last[name]
        kind = schema.get("type", "string")
        if "enum" in schema:
            return schema["enum"][0]
        if kind == "object":
            parts = schema.get("properties", {})
            return {key: self._value(part, mark, key) for key, part in parts.items()}
        if kind == "array":
            return [self._value(schema.get("items", {}), mark)]
        return {"integer": 1, "number": 1.0, "boolean": True}.get(kind, f"{name} {mark}")


def _json(value: Any) -> str:
    import json

    return json.dumps(value)


@functools.cache
def run(name: str) -> tuple[Episode, int]:
    """One episode of an app with marked answers, and how many answers it asked for."""
    app = APPS[name]
    if name in ("supervisor_team", "swarm"):
        pytest.importorskip(f"langgraph_{name.partition('_')[0]}")
    engine = FakeEngine(MarkedAnswers(app.choices))
    (episode,) = run_episodes(
        app.build(), [app.example], engine=engine, episode_timeout=60, **app.run
    )
    engine.close()
    assert episode.status == "ok", episode.error
    return episode, len(engine.requests)


def text_of(ids: tuple[int, ...]) -> str:
    """Bytes of the fake engine as text."""
    return bytes(i for i in ids if i < 256).decode()


def parents_by_text(episode: Episode) -> list[tuple[int, ...]]:
    """Which answers each prompt shows, and the earlier calls of the same task."""
    by_mark = {
        _MARK.search(text_of(call.completion_ids)).group(1): call.index  # type: ignore[union-attr]
        for call in episode.calls
        if _MARK.search(text_of(call.completion_ids))
    }
    found = []
    for call in episode.calls:
        shown = {by_mark[mark] for mark in _MARK.findall(text_of(call.prompt_ids))}
        before = {c.index for c in episode.calls if is_before(c, call)}
        shown -= {
            p
            for p in shown - before
            for q in shown
            if is_before(episode.calls[p], episode.calls[q])
        }
        found.append(tuple(sorted(shown | before)))
    return found


def is_before(one: Call, other: Call) -> bool:
    """Whether one call of a task had been answered when another began."""
    return one.task_id == other.task_id and one.started + one.seconds < other.started


@EVERY_APP
def test_the_dry_run_finds_the_agents_that_a_person_would_list(name: str) -> None:
    app = APPS[name]
    inputs = app.run.get("inputs")
    flex_mg = compile_graph(app.build(), [app.example], inputs)
    assert set(flex_mg.agents) == app.agents, flex_mg.notes


@EVERY_APP
def test_every_call_is_met_by_its_agent(name: str) -> None:
    episode, _ = run(name)
    assert {agent_path(call.node) for call in episode.calls} == APPS[name].agents


@EVERY_APP
def test_every_answer_that_was_asked_for_has_one_fate(name: str) -> None:
    episode, asked = run(name)
    facts = UpdateFacts(updated=frozenset(call.agent for call in episode.calls))
    counts = count_fates(fates([episode], [episode], facts))
    assert set(counts) == APPS[name].agents
    assert sum(sum(of_node.values()) for of_node in counts.values()) == asked
    assert {fate for of_node in counts.values() for fate in of_node} == {Fate.TRAINED.value}


@EVERY_APP
def test_parents_are_the_calls_whose_answers_a_prompt_shows(name: str) -> None:
    episode, _ = run(name)
    assert [call.parents for call in episode.calls] == parents_by_text(episode)


@EVERY_APP
def test_no_traced_parent_is_never_and_no_always_is_refuted(name: str) -> None:
    flex_mg = compile_graph(APPS[name].build())
    episode, _ = run(name)
    agents = [agent_path(call.node) for call in episode.calls]
    seen = {(agents[c.index], agents[p]) for c in episode.calls for p in c.parents}
    known = set(flex_mg.agents)
    for i, j in seen:
        if {i, j} <= known:
            assert flex_mg.dependency(i, j) != "never", flex_mg.explain(i, j)
    for i, j in itertools.permutations(known & set(agents), 2):
        if flex_mg.dependency(i, j) == "always":
            assert (i, j) in seen, flex_mg.explain(i, j)
    assert "can never run" not in summary(flex_mg)
