"""The learning benchmark counts right and reads what is finished instead of repeating it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning

RUN = learning.Run("router", "group", 3)


def result(seed: int, returns: list[float]) -> dict[str, Any]:
    rows = [
        {"iteration": n, "episodes": 64 * n, "seconds": 2.0 * n, "return": value}
        for n, value in enumerate(returns)
    ]
    rows[0]["return_greedy"], rows[-1]["return_greedy"] = 0.25, 1.0
    return {"workflow": "router", "method": "group", "seed": seed, "evaluations": rows}


def test_an_evaluation_has_the_episodes_and_seconds_of_training_before_it(tmp_path: Path) -> None:
    seconds = [(1.0, 2.0), (1.5, 2.5)]
    metrics = [
        {"iteration": n, "episodes": 64, "seconds_rollout": rollout, "seconds_update": update}
        for n, (rollout, update) in enumerate(seconds, 1)
    ]
    held_out = [
        {"iteration": 0, "eval_return": 0.25, "eval_return_greedy": 0.5},
        {"iteration": 2, "eval_return": 0.75},
    ]
    for name, rows in (("metrics", metrics), ("evaluations", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    assert learning.evaluations(tmp_path) == [
        {"iteration": 0, "episodes": 0, "seconds": 0.0, "return": 0.25, "return_greedy": 0.5},
        {"iteration": 2, "episodes": 128, "seconds": 7.0, "return": 0.75, "return_greedy": None},
    ]


def test_the_table_has_mean_and_extremes_and_counts_who_reached_the_goal() -> None:
    text = learning.table([result(0, [0.2, 0.9, 0.95]), result(1, [0.3, 0.5, 0.75])])
    line = text.splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        *("router", "group", "2", "0.25 (0.25)", "0.85 (0.75 to 0.95)", "1.00"),
        *("1 of 2", "64", "2"),
    ]


def test_a_finished_run_is_read(tmp_path: Path) -> None:
    path = RUN.folder(tmp_path) / "result.json"
    path.parent.mkdir(parents=True)
    settings = {k: v for k, v in RUN.settings(4).items() if k != "base_model"}
    path.write_text(json.dumps({"settings": settings, "evaluations": []}), encoding="utf-8")
    assert learning.measure(RUN, tmp_path, 4)["evaluations"] == []
    for shorter in (3, 2):
        with pytest.raises(SystemExit, match="has other settings"):
            learning.measure(RUN, tmp_path, shorter)
