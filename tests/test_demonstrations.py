"""Demonstrations from traces, runs, LangSmith exports and rows: what is kept and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.load import dumpd
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

from marft_graph.demonstrations import read_demonstrations
from marft_graph.episode import Call, Episode
from marft_graph.errors import DatasetError
from marft_graph.run.trajectories import write_traces

USER = {"role": "user", "content": "7 and 5?"}


def call(text: str, node: str = "actor", index: int = 0, **more: Any) -> Call:
    given: dict[str, Any] = {
        "agent": node,
        "node": node,
        "index": index,
        "parents": (),
        "prompt_ids": (),
        "completion_ids": (),
        "logprobs": (),
        "finish_reason": "stop",
        "adapter_version": 0,
        "messages": (USER, {"role": "assistant", "content": text}),
    }
    return Call(**{**given, **more})


def episode(question: int, outcome: float, *calls: Call, status: str = "ok") -> Episode:
    return Episode({"q": question}, calls, outcome_reward=outcome, status=status)


def answers(found: Any) -> list[str]:
    return [one.answer.text for one in found]


def test_traces_keep_tools_ids_and_tool_messages(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    asked = {"name": "add", "args": {"a": 1}, "id": "c1"}
    messages = (
        USER,
        {"role": "assistant", "content": "", "tool_calls": [asked]},
        {"role": "tool", "content": "12", "tool_call_id": "c1"},
        {"role": "assistant", "content": "12"},
    )
    own = call("", "team/agent", messages=messages, tools=(tool,), usage=(9, 2))
    path = write_traces(tmp_path / "t.parquet", [episode(0, 1.0, own)], 0, "own")
    (found,) = read_demonstrations(path)
    assert found.node == "team"
    assert found.tools == (tool,)
    assert found.prompt[1].tool_calls[0]["args"] == {"a": 1}
    assert isinstance(found.prompt[2], ToolMessage)
    assert found.prompt[2].tool_call_id == "c1"
    assert found.answer.text == "12"


def test_failed_episodes_and_answers_cut_off_are_left_out() -> None:
    found = read_demonstrations(
        [
            episode(0, 1.0, call("good"), call("cut", index=1, finish_reason="length")),
            episode(0, 1.0, call("crashed"), status="failed: timeout"),
        ]
    )
    assert answers(found) == ["good"]


def test_only_the_best_episodes_of_an_example_are_kept() -> None:
    episodes = [
        episode(0, 0.2, call("a")),
        episode(0, 0.9, call("b")),
        episode(0, 0.5, call("c")),
        episode(1, 0.0, call("all")),
        episode(1, 0.0, call("equal")),
        episode(2, 0.4, call("single")),
    ]
    assert answers(read_demonstrations(episodes, best=1)) == ["b", "single"]
    assert answers(read_demonstrations(episodes, best=2)) == ["b", "c", "single"]
    assert answers(read_demonstrations(episodes, min_return=0.45)) == ["b", "c"]
    assert answers(read_demonstrations(episodes, min_return=0.45, best=1)) == ["b"]
    with pytest.raises(DatasetError, match=r"no demonstration is left .* at least 2"):
        read_demonstrations(episodes, min_return=2)


def test_a_run_folder_gives_all_that_it_was_trained_on(tmp_path: Path) -> None:
    for number, text in ((1, "first"), (2, "second")):
        path = tmp_path / "traces" / f"iter_{number:06d}.parquet"
        write_traces(path, [episode(0, 1.0, call(text))], number, "train")
    evaluated = tmp_path / "traces" / "eval_after.parquet"
    write_traces(evaluated, [episode(0, 1.0, call("held out"))], 2, "eval")
    assert answers(read_demonstrations(tmp_path)) == ["first", "second"]


@pytest.mark.parametrize("form", ["rows", "jsonl", "json", "parquet"])
def test_every_answer_of_rows_with_a_node_is_learnt(form: str, tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "And 1?"},
        {"role": "assistant", "content": "13"},
    ]
    rows: Any = [{"node": "actor", "messages": turns}]
    if form == "jsonl":
        rows = tmp_path / "d.jsonl"
        rows.write_text(json.dumps({"node": "actor", "messages": turns}) + "\n\n")
    elif form == "json":
        rows = tmp_path / "d.json"
        rows.write_text(json.dumps([{"node": "actor", "messages": turns}]))
    elif form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
        rows = tmp_path / "d.parquet"
    first, second = read_demonstrations(rows)
    assert answers([first, second]) == ["12", "13"]
    assert [m.text for m in second.prompt] == ["Be brief.", "7 and 5?", "12", "And 1?"]


def langsmith_run(**changes: Any) -> dict[str, Any]:
    """As LangSmith's exports have a chat model's run."""
    asked = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 7, "b": 5}, "id": "x"}])
    prompt = [SystemMessage("Use a tool."), HumanMessage("7 and 5?"), asked]
    prompt.append(ToolMessage("12", tool_call_id="x"))
    run = {
        "id": "r1",
        "run_type": "llm",
        "error": None,
        "inputs": {"messages": [[dumpd(message) for message in prompt]]},
        "outputs": {"generations": [[{"text": "12", "message": dumpd(AIMessage("It is 12."))}]]},
        "extra": {
            "metadata": {
                "langgraph_node": "agent",
                "langgraph_checkpoint_ns": "helper:1f-a|agent:2b-c",
            },
            "invocation_params": {
                "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}]
            },
        },
    }
    return {**run, **changes}


def test_a_langsmith_export_is_read_by_node(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    runs = [
        langsmith_run(),
        langsmith_run(error="RateLimitError"),
        langsmith_run(run_type="chain"),
        langsmith_run(extra={"metadata": {}}),
    ]
    path.write_text("\n".join(json.dumps(run) for run in runs))
    (found,) = read_demonstrations(path)
    assert found.node == "helper"
    assert [m.type for m in found.prompt] == ["system", "human", "ai", "tool"]
    assert found.prompt[2].tool_calls[0]["args"] == {"a": 7, "b": 5}
    assert found.answer.text == "It is 12."
    assert found.tools[0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"text": "x"}], "row 1 has the keys text; it needs `node` and `messages`"),
        ([{"node": "a", "messages": [USER]}], "no message with the role assistant"),
        ([{"node": "a", "messages": [{"content": "x"}]}], "holds what is no message"),
        ([{"node": "a", "messages": "{"}], "neither a list nor JSON"),
        ([3], "row 1 is a int"),
        ([], "no demonstration is left"),
        ("missing.jsonl", "does not exist"),
    ],
)
def test_what_is_no_demonstration_is_named(rows: Any, why: str) -> None:
    with pytest.raises(DatasetError, match=why):
        read_demonstrations(rows)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "d.csv"
    other.write_text("a,b")
    with pytest.raises(DatasetError, match=r"neither \.parquet nor"):
        read_demonstrations(other)
    broken = tmp_path / "d.json"
    broken.write_text("{")
    with pytest.raises(DatasetError, match="cannot read"):
        read_demonstrations(broken)
    with pytest.raises(DatasetError, match="is no run folder"):
        read_demonstrations(tmp_path)
