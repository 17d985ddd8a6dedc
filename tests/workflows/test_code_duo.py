"""code_duo runs what models write in the sandbox only, and pays each agent for its own work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marft_graph import FakeEngine, compile_graph
from marft_graph.sandbox import SandboxResult
from marft_graph.workflow import load_target
from tests.workflows.play import play
from workflows.code_duo import task

FOLDER = task.FUNCTIONS.parent
SUM = {
    "task": "Ann has 7 eggs and buys 5. How many?",
    "reference": "7+5",
    "wrong": ["7-5", "7"],
    "inputs": "[[]]",
    "outputs": "[12]",
}
SQUARE = {"inputs": "[[2], [3]]", "outputs": "[4, 9]"}
TWICE = "def solve(n):\n    return 2 * n"


@pytest.mark.parametrize(
    ("code", "share"),
    [
        ("7+5", 1.0),
        (" 12\n", 1.0),
        ("```python\n7 + 5\n```", 1.0),
        ("def solve():\n    print('hm')\n    return 12", 1.0),
        ("+ 7 5", 0.0),
        ("seven plus five", 0.0),
        ("7-5", 0.0),
        ("12.0", 0.0),
        ("'12'", 0.0),
        ("", 0.0),
        ("def other(): return 12", 0.0),
        ("import os; print('[12]', flush=True); os._exit(1)", 0.0),
        ("(" * 3000, 0.0),
    ],
)
def test_the_coder_is_paid_for_right_outputs(code: str, share: float) -> None:
    assert task.share_right(code, SUM["inputs"], SUM["outputs"]) == share


def test_the_coder_is_paid_for_each_input() -> None:
    assert task.share_right("def solve(n): return n ** 2", **SQUARE) == 1.0
    assert task.share_right(TWICE, **SQUARE) == 0.5
    assert task.share_right("def solve(n): return 1 / 0", **SQUARE) == 0.0


def test_the_right_outputs_are_never_in_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def run(program: str, *, stdin: str, timeout: float) -> SandboxResult:
        given.append(program + stdin)
        return SandboxResult("exit", 0, "[4, 9]", "")

    monkeypatch.setattr(task, "run_python", run)
    assert task.share_right("def solve(n): return n * n * 1", **SQUARE) == 1.0
    assert SQUARE["inputs"] in given[0]
    assert "[4, 9]" not in given[0]


@pytest.mark.parametrize(
    ("test", "share"),
    [
        ("12", 1.0),
        ("assert solve() == 12", 1.0),
        ("solve() == 12", 1.0),
        ("assert solve() > 9", 1.0),
        ("assert solve() > 5", 0.5),  # does not catch the code that returns 7
        ("assert True", 0.0),
        ("solve()", 0.0),
        ("assert False", 0.0),  # fails right code
        ("13", 0.0),
        ("twelve", 0.0),
        ("", 0.0),
        ("import os; os._exit(0)", 0.0),
    ],
)
def test_the_tester_is_paid_for_telling_right_code_from_wrong(test: str, share: float) -> None:
    assert task.share_caught(test, SUM["reference"], tuple(SUM["wrong"])) == share


def test_code_that_never_ends_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "SECONDS", 1.0)
    assert task.share_right("while True: pass", SUM["inputs"], SUM["outputs"]) == 0.0


@pytest.mark.parametrize(
    ("code", "test", "rewards"),
    [("7+5", "12", (0.5, 0.5)), ("+ 7 5", "12", (0.0, 0.5)), ("7+5", "twelve", (0.5, 0.0))],
)
def test_each_agent_has_a_reward_of_its_own(
    code: str, test: str, rewards: tuple[float, float]
) -> None:
    episode = play(FOLDER, SUM, FakeEngine({"coder": code, "tester": test}))
    assert episode.ok, episode.error
    assert tuple(call.reward for call in episode.calls) == rewards


def test_the_tester_sees_the_code() -> None:
    flex_mg = compile_graph(load_target(str(FOLDER)).graph)
    assert flex_mg.agents == ("coder", "tester")
    assert flex_mg.dependency("tester", "coder") == "always"


def test_held_out_tasks_ask_for_calculations_that_are_never_trained() -> None:
    train, held_out = task.load_data()
    assert (len(train), len(held_out)) == (1024, 128)
    assert not set(train["reference"]) & set(held_out["reference"])


@pytest.mark.slow
def test_our_functions_are_right_and_their_wrong_ones_wrong() -> None:
    for row in [row for split in task.load_data("functions") for row in split]:
        assert task.share_right(row["reference"], row["inputs"], row["outputs"]) == 1.0, row
        for code in row["wrong"]:
            assert task.share_right(code, row["inputs"], row["outputs"]) < 1.0, code
        cases = zip(json.loads(row["inputs"]), json.loads(row["outputs"]), strict=True)
        test = "\n".join(
            f"assert solve({', '.join(map(repr, arguments))}) == {output!r}"
            for arguments, output in cases
        )
        assert task.share_caught(test, row["reference"], tuple(row["wrong"])) == 1.0, row


@pytest.mark.parametrize("lacking", ["", "wrong"])
def test_a_folder_that_has_no_tasks_is_named(lacking: str, tmp_path: Path) -> None:
    row: dict[str, Any] = {**SUM, "inputs": [[]], "outputs": [12]}
    message = "does not exist; dataset is 'generated', 'functions', or a folder"
    if lacking:
        del row[lacking]
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
        message = "line 1 has .*; it needs task, reference, wrong"
    with pytest.raises(ValueError, match=message):
        task.load_data(str(tmp_path))
