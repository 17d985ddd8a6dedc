"""Why a node is learning or not: in the metrics, on the console, in reports and by `inspect`."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest
from click.testing import CliRunner
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph
from langgraph.types import RetryPolicy

from marft_graph import FakeEngine, Trainer, run_episodes
from marft_graph.cli import main
from marft_graph.episode import SetAside
from marft_graph.learn.fate import Fate
from marft_graph.run.fates import fates_text, idle_lines
from marft_graph.run.tracking import read_metrics
from tests.apps import _careful, duo, model
from tests.docs_blocks import ROOT
from tests.training import config, reward


class State(TypedDict):
    question: str
    plan: str
    answer: str


def everything() -> tuple[Any, Counter[str]]:
    """An app whose calls come to many fates, and how often each node has called its model."""
    made: Counter[str] = Counter()
    lock = threading.Lock()
    own = GenericFakeChatModel(messages=iter([AIMessage("own words")] * 10_000))

    def asking(name: str, llm: Any, *, streams: bool = False) -> Callable[[State], str]:
        def ask(state: State) -> str:
            with lock:  # nodes run in threads
                made[name] += 1
            if streams:
                return "".join(chunk.text for chunk in llm.stream(state["question"]))
            return str(llm.invoke(f"{name} {state['question']}").text)

        return ask

    plan, check, judge = (
        asking("planner", model),
        asking("checker", _careful()),
        asking("judge", own),
    )
    say, act, attempts = asking("speaker", own, streams=True), asking("actor", model), Counter()

    def planner(state: State) -> dict[str, str]:
        return {"plan": plan(state) + plan(state)}

    def speaker(state: State) -> dict[str, str]:
        return {"plan": say(state)}

    def checker(state: State) -> dict[str, str]:
        return {"plan": check(state)}

    def actor(state: State) -> dict[str, str]:
        said = act(state)
        with lock:
            attempts[state["question"]] += 1
            turn = attempts[state["question"]] % 3
        if turn == 1:
            raise ConnectionError("try again")
        if turn == 2 and len(state["question"]) == 2:
            raise ValueError("a bad question")
        return {"answer": said}

    builder = StateGraph(State)
    builder.add_node("planner", planner)
    builder.add_node("judge", lambda state: {"plan": judge(state)})
    builder.add_node("speaker", speaker)
    builder.add_node("checker", checker)
    policy = RetryPolicy(max_attempts=3, initial_interval=0.001, retry_on=ConnectionError)
    builder.add_node("actor", actor, retry_policy=policy)
    names = ["planner", "judge", "speaker", "checker", "actor"]
    for before, after in zip([START, *names], [*names, END], strict=True):
        builder.add_edge(before, after)
    return builder.compile(), made


def test_every_call_that_an_app_makes_has_one_fate(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    graph, made = everything()
    settings = config(
        tiny_model,
        nodes=("planner", "checker", "actor"),
        max_failed_share=1.0,
        examples_per_iteration=5,
        filter_rounds=1,
    )
    with make(graph, config=settings, eval_dataset=None) as trainer:
        made.clear()
        rows = read_metrics(trainer.train(progress=False).run_dir)
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for node, own in row["fates"].items():
            counts.setdefault(node, Counter()).update(own)
    assert {node: own.total() for node, own in counts.items()} == made
    assert set(counts["judge"]) == set(counts["speaker"]) == {Fate.FROZEN}
    assert set(counts["checker"]) <= {Fate.GREEDY, Fate.FAILED}
    assert {Fate.RETRIED, Fate.FAILED} < set(counts["actor"])
    assert Fate.RETRIED not in counts["planner"]
    assert counts["planner"][Fate.TRUNCATED] > 0
    assert [row["never_called"] for row in rows] == [[], []]


@pytest.mark.filterwarnings("ignore:The v3 streaming protocol")
@pytest.mark.parametrize("how", ["invoke", "stream", "events", "graph's events"])
def test_a_call_of_a_node_that_keeps_its_model_counts_once_however_it_is_asked(how: str) -> None:
    own = GenericFakeChatModel(messages=iter([AIMessage("own words")]))
    inner = StateGraph(State).add_node("deep", lambda state: {"plan": own.invoke("x").text})
    inner_graph = inner.add_edge(START, "deep").compile()
    ways: dict[str, Callable[[], Any]] = {
        "invoke": lambda: own.invoke("x"),
        "stream": lambda: list(own.stream("x")),
        "events": lambda: list(own.stream_events("x", version="v3")),
        "graph's events": lambda: list(inner_graph.stream_events({"question": "x"}, version="v3")),
    }

    def judge(state: State) -> dict[str, str]:
        ways[how]()
        return {"plan": "x"}

    builder = StateGraph(State).add_node("judge", judge)
    builder.add_node("actor", lambda state: {"answer": model.invoke("y").text})
    builder.add_edge(START, "judge").add_edge("judge", "actor")
    examples = [{"question": "q"}]
    (found,) = run_episodes(builder.compile(), examples, engine=FakeEngine("a"), nodes=["actor"])
    assert [why for _, why in found.set_aside] == [SetAside.OWN_MODEL], found.error
    assert len(found.calls) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"update_order": "alternating"}, [("planner", "actor"), ("actor", "planner")]),
        ({"advantage": "gae", "critic_warmup": 1}, [("", "warm"), ("both", "")]),
    ],
)
def test_agents_whose_turn_it_is_not_are_told_from_others(
    make: Callable[..., Trainer],
    tiny_model: Path,
    changes: dict[str, Any],
    expected: list[tuple[str, str]],
) -> None:
    with make(config=config(tiny_model, **changes), eval_dataset=None) as trainer:
        rows = read_metrics(trainer.train(progress=False).run_dir)
    for row, (learns, waits) in zip(rows, expected, strict=True):
        fates = {node: set(own) for node, own in row["fates"].items()}
        if waits == "warm":
            assert fates == {"planner": {"warm_up"}, "actor": {"warm_up"}}
        elif waits:
            assert fates[waits] == {"frozen_turn"}
        for node in ("planner", "actor") if learns == "both" else [learns] * bool(learns):
            assert fates[node] & {"trained", "truncated"}


def test_equal_returns_and_examples_that_are_left_out_are_told(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    for run, rounds, fate in (("a", 0, Fate.EQUAL_GROUP), ("b", 1, Fate.FILTERED)):
        settings = config(tiny_model, iterations=1, filter_rounds=rounds)
        with make(
            run=run, config=settings, reward=lambda example, state: 0.5, eval_dataset=None
        ) as trainer:
            (row,) = read_metrics(trainer.train(progress=False).run_dir)
        calls = 8 * (1 + rounds)
        assert row["fates"] == {node: {fate: calls} for node in ("planner", "actor")}


def test_a_collapse_undoes_what_an_iteration_learnt(
    make: Callable[..., Trainer], tiny_model: Path
) -> None:
    settings = config(tiny_model, iterations=1, entropy_floor=100.0, max_recoveries=1)
    with make(config=settings, eval_dataset=None) as trainer:
        rows = read_metrics(trainer.train(progress=False).run_dir)
    assert all(set(own) == {Fate.UNDONE} for row in rows for own in row["fates"].values())


def test_rewards_that_fail_drop_their_calls(make: Callable[..., Trainer], tiny_model: Path) -> None:
    def fails_at_times(example: Any, state: Any) -> float:
        if len(example["question"]) > 2:
            raise KeyError("no such answer")
        return reward(example, state)

    settings = config(
        tiny_model,
        reward_errors="drop",
        max_failed_share=1.0,
        examples_per_iteration=5,
        iterations=1,
    )
    with make(config=settings, reward=fails_at_times, eval_dataset=None) as trainer:
        (row,) = read_metrics(trainer.train(progress=False).run_dir)
    assert row["episodes_failed"] > 0
    assert all(own[Fate.DROPPED] == row["episodes_failed"] for own in row["fates"].values())


# Trained, but never called


def routed(to: str) -> Any:
    """A graph whose second agent is called for some questions only."""

    def asks(state: State) -> dict[str, str]:
        return {"answer": model.invoke(state["question"]).text}

    builder = StateGraph(State)
    builder.add_node("writer", asks)
    builder.add_node("editor", asks)
    builder.add_edge(START, "writer")
    builder.add_conditional_edges(
        "writer", lambda state: "editor" if to in state["question"] else END, ["editor", END]
    )
    builder.add_edge("editor", END)
    return builder.compile()


def test_a_trained_node_that_is_never_called_is_said_everywhere(
    make: Callable[..., Trainer], tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tiny_model, iterations=3)
    with make(routed("z"), config=settings, eval_dataset=None) as trainer:
        assert trainer.nodes == ("writer", "editor")
        with caplog.at_level(logging.WARNING):
            result = trainer.train(progress=False)
    assert [row["never_called"] for row in read_metrics(result.run_dir)] == [["editor"]] * 3
    assert caplog.text.count("never called editor") == 1
    assert caplog.text.count("editor is trained, but no iteration of the run ever called it") == 1
    page = result.report.read_text()
    assert "Why is a node (not) learning?" in page
    assert "editor is trained, but no iteration of the run ever called it" in page
    said = CliRunner().invoke(main, ["inspect", "--run", str(result.run_dir)])
    assert said.exit_code == 0, said.output
    assert "editor: it was never called" in said.output
    assert "calls were learnt from" in said.output


def test_a_node_that_some_iterations_do_not_call_is_counted() -> None:
    rows = [{"iteration": i, "never_called": ["editor"] * (i < 3)} for i in range(1, 6)]
    assert idle_lines(rows, ("writer", "editor")) == [
        "editor is trained, but 2 of 5 iterations never called it"
    ]
    assert idle_lines([{"iteration": 1}], ("writer",)) == []  # of an older version


# Shown


def test_inspect_shows_the_fates_of_a_run_in_every_format(
    make: Callable[..., Trainer], tmp_path: Path
) -> None:
    with make(eval_dataset=None) as trainer:
        run = str(trainer.train(progress=False).run_dir)
    counts = [row["fates"]["actor"] for row in read_metrics(run)]
    total = sum(sum(own.values()) for own in counts)
    text = CliRunner().invoke(main, ["inspect", "--run", run]).output
    assert "2 agents" in text
    assert f"of {total} calls were learnt from" in text
    found = json.loads(CliRunner().invoke(main, ["inspect", "--run", run, "--json"]).output)
    assert sum(found["fates"]["actor"].values()) == total
    page = CliRunner().invoke(main, ["inspect", "--run", run, "--format", "html"]).output
    assert "Why is a node (not) learning?" in page
    for wrong, said in (
        (["inspect"], "Missing argument 'TARGET'"),
        (["inspect", "--run", run, "--format", "dot"], "--run goes with"),
        (["inspect", "--run", str(tmp_path)], "no run folder"),
    ):
        result = CliRunner().invoke(main, wrong)
        assert result.exit_code != 0
        assert said in result.output


def test_a_run_whose_metrics_have_no_fates_is_told_as_such() -> None:
    assert fates_text([{"iteration": 1, "agents": {}}], ("actor",)) == ""


def test_a_graph_that_is_trained_whole_calls_every_node(make: Callable[..., Trainer]) -> None:
    with make(duo(), eval_dataset=None) as trainer:
        rows = read_metrics(trainer.train(progress=False).run_dir)
    assert all(row["never_called"] == [] for row in rows)


def test_the_page_on_troubles_has_every_fate_with_its_words() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for fate in Fate:
        assert f"| `{fate.value}` | {fate.words} | {fate.remedy} |" in page
