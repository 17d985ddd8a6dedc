"""The duo is a plain LangGraph app with data and a reward; the same folder takes GSM8K."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from marft_graph.graph.compile import compile_graph
from marft_graph.workflow import load_target
from workflows.math_duo import task

FOLDER = Path(__file__).parents[2] / "workflows" / "math_duo"
ROWS = [
    {"question": f"What is {n} plus 1,000?", "answer": f"{n}+1000\n#### 1,{n:03d}"}
    for n in range(20)
]


def test_the_app_never_imports_marft_graph() -> None:
    assert "marft" not in (FOLDER / "graph.py").read_text(encoding="utf-8").lower()
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print('marft_graph' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(FOLDER / "graph.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.strip() == "False"


def test_the_app_holds_an_api_model_made_at_import() -> None:
    workflow = load_target(str(FOLDER))
    flex_mg = compile_graph(workflow.graph)
    assert flex_mg.agents == ("reasoner", "actor")
    assert flex_mg.dependency("actor", "reasoner") != "never"
    assert flex_mg.dependency("reasoner", "actor") == "never"


def test_held_out_problems_ask_for_calculations_that_are_never_trained() -> None:
    train, held_out = task.generate()
    assert (len(train), len(held_out)) == (2048, 256)

    def asked(data: Dataset) -> set[tuple[str, ...]]:
        return {
            (*(w.strip(".") for w in row["question"].split() if w[0].isdigit()), row["answer"])
            for row in data
        }

    assert not asked(train) & asked(held_out)
    assert len(set(held_out["question"])) == 256


def test_the_data_follow_their_seed() -> None:
    assert task.generate(seed=1)[0].to_list() == task.generate(seed=1)[0].to_list()
    assert task.generate(seed=1)[0].to_list() != task.generate(seed=2)[0].to_list()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("12", 1.0),
        ("7+5 is 12", 1.0),
        ("The answer is 12.", 1.0),
        ("12.0", 1.0),
        ("12 or 13", 0.0),
        ("twelve", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_counts_in_digits(answer: str, expected: float) -> None:
    assert task.reward({"answer": "12"}, {"answer": answer}) == expected


def test_thousands_may_have_commas() -> None:
    assert task.reward({"answer": "1200"}, {"answer": "It costs $1,200"}) == 1.0


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "gsm8k_train.parquet")
    with (tmp_path / "gsm8k_test.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS[:5])
    return tmp_path


def test_a_folder_of_gsm8k_gives_its_two_splits(gsm8k: Path) -> None:
    (gsm8k / "gsm8k_test.jsonl").unlink()
    Dataset.from_list(ROWS[:5]).to_parquet(gsm8k / "gsm8k_test.parquet")
    train, held_out = task.load_data(str(gsm8k))
    assert (len(train), len(held_out)) == (20, 5)
    assert train[7]["answer"] == "1007"
    assert train[7]["solution"] == "7+1000"


def test_the_two_files_may_have_different_formats(gsm8k: Path) -> None:
    train, held_out = task.load_data(str(gsm8k))
    assert (len(train), len(held_out)) == (20, 5)


def test_of_a_single_file_every_tenth_row_is_held_out(gsm8k: Path) -> None:
    train, held_out = task.load_data(str(gsm8k / "gsm8k_train.parquet"))
    assert (len(train), len(held_out)) == (18, 2)
    assert held_out["answer"][:] == ["1000", "1010"]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            "genrated",
            "neither one of this workflow's own, a file or folder that exists, nor a hub id",
        ),
        ("./gone", "neither one of this workflow's own, a file or folder"),
    ],
)
def test_a_data_set_that_is_not_there_is_named(dataset: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.load_data(dataset)


def test_files_that_are_not_gsm8k_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with 'train' and 'test' in their names; it holds none"):
        task.load_data(str(tmp_path))
    Dataset.from_list([{"problem": "x", "answer": "1"}] * 20).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"columns \['problem', 'answer'\]; it needs question"):
        task.load_data(str(tmp_path / "a.parquet"))
