"""Traces: what is written comes back, and `datasets` can read it."""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from marft_graph.episode import Call, Episode
from marft_graph.errors import CheckpointError
from marft_graph.run.trajectories import read_traces, write_traces


def call(index: int = 0, text: str = "seven", **changes: object) -> Call:
    own = Call(
        agent="Bull-20Researcher",
        node="Bull Researcher",
        index=index,
        parents=tuple(range(index)),
        prompt_ids=(1, 2, 3),
        completion_ids=(4, 5),
        logprobs=(-0.1, -1 / 3),
        finish_reason="stop",
        adapter_version=7,
        temperature=0.5,
        reward=0.25,
        messages=({"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": text}),
        task_id="1f-a",
        step=2,
        seed=2**63 - 1,
        grammar='{"type": "integer"}',
        started=0.5,
        seconds=0.125,
    )
    return dataclasses.replace(own, **changes)  # type: ignore[arg-type]


EPISODES = [
    Episode(
        example={"question": "3 + 4?", "options": [7, 8], "meta": {"level": None}},
        calls=(call(0), call(1)),
        outcome_reward=1.0,
        node_rewards={"Bull Researcher": 0.25},
        reward_parts={"correct": 1.0, "brevity": -0.5},
        seed=2**63 - 1,
        example_index=3,
        seconds=1.5,
    ),
    Episode(example={"question": "?"}, calls=(), status="failed: timeout", error="node 'x' hung"),
    # The same example and seed again: episodes are told apart by position.
    Episode(example={"question": "?"}, calls=(call(0),), status="failed: timeout", error="later"),
]


def test_episodes_come_back_but_for_their_state(tmp_path: Path) -> None:
    with_state = dataclasses.replace(EPISODES[0], state={"answer": object()})
    path = write_traces(tmp_path / "traces" / "a.parquet", [with_state, *EPISODES[1:]], 4, "train")
    assert read_traces(path) == EPISODES
    assert [entry.name for entry in path.parent.iterdir()] == ["a.parquet"]


def test_no_episodes_come_back_as_none(tmp_path: Path) -> None:
    assert read_traces(write_traces(tmp_path / "a.parquet", [], 0, "eval")) == []


def test_datasets_loads_one_row_for_each_call(tmp_path: Path) -> None:
    path = write_traces(tmp_path / "a.parquet", EPISODES, 4, "eval")
    rows = load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows["index"][:] == [0, 1, -1, 0]
    assert rows["episode"][:] == [0, 0, 1, 2]
    assert set(rows["iteration"]) == {4}
    assert set(rows["phase"]) == {"eval"}
    assert rows[1]["parents"] == [0]
    assert rows[0]["seed"] == 2**63 - 1
    assert json.loads(rows[0]["messages"])[1] == {"role": "assistant", "content": "seven"}
    assert rows[2]["agent"] is None
    assert rows[2]["status"] == "failed: timeout"


@pytest.mark.parametrize(
    "text",
    ["\ud800 alone", "a\0b", "x" * 2**20, "</script><b>", "é漢🙂", "line\r\n\u2028", "\\ud800"],
    ids=["surrogate", "nul", "megabyte", "html", "unicode", "lines", "literal escape"],
)
def test_hostile_text_survives(tmp_path: Path, text: str) -> None:
    episode = Episode(example={text[:50]: text}, calls=(call(text=text),))
    assert read_traces(write_traces(tmp_path / "a.parquet", [episode], 0, "eval")) == [episode]


def test_a_lone_surrogate_in_an_error_is_escaped(tmp_path: Path) -> None:
    episode = Episode(example={}, calls=(), status="failed: x", error="bad \udcff byte")
    (back,) = read_traces(write_traces(tmp_path / "a.parquet", [episode], 0, "eval"))
    assert back.error == "bad \\udcff byte"


def test_values_that_json_does_not_know_are_kept_as_text(tmp_path: Path) -> None:
    example = {"n": np.int64(3), "row": np.arange(2), "day": date(2026, 1, 2), "set": {1}, 5: "k"}
    episode = Episode(example=example, calls=())
    (back,) = read_traces(write_traces(tmp_path / "a.parquet", [episode], 0, "eval"))
    assert back.example == {
        "n": 3,
        "row": [0, 1],
        "day": "datetime.date(2026, 1, 2)",
        "set": "{1}",
        "5": "k",
    }


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.parquet"):
        read_traces(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no parquet", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"text\.parquet"):
        read_traces(tmp_path / "text.parquet")
