"""The commands on a real workflow with a tiny random model: train, eval, export, resume, refuse."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from marft_graph.cli import main
from marft_graph.run.tracking import read_metrics
from tests.support import save_random_model

GRAPH = """
from typing import TypedDict

from langchain_core.language_models import FakeListChatModel
from langgraph.graph import END, START, StateGraph


class State(TypedDict):
    question: str
    answer: str


model = FakeListChatModel(responses=["never asked in training"])


def writer(state: State) -> dict:
    return {"answer": model.invoke(state["question"]).text}


builder = StateGraph(State)
builder.add_node("writer", writer)
builder.add_edge(START, "writer")
builder.add_edge("writer", END)
graph = builder.compile()
"""
TASK = """
def load_data(dataset="letters"):
    rows = [{"question": c} for c in "abcdefgh"]
    return rows, rows[:4]


def reward(example, state):
    return sum(map(ord, state["answer"])) % 7 / 7
"""
CONFIG = """
base_model: base
iterations: 2
examples_per_iteration: 2
group_size: 2
max_new_tokens: 4
advantage: group
eval_every: 0
"""


def marft(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("letters")
    for name, text in {"graph.py": GRAPH, "task.py": TASK, "config.yaml": CONFIG}.items():
        (folder / name).write_text(text, encoding="utf-8")
    save_random_model(folder / "base")
    return folder


@pytest.fixture(scope="module")
def run(workflow: Path) -> tuple[Path, str]:
    """A finished run and what `train` printed."""
    folder = workflow / "run"
    result = marft("train", workflow, "--run-dir", folder)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_train_writes_the_run_and_says_where(run):
    folder, printed = run
    for name in ("config.yaml", "graph.json", "metrics.jsonl", "report.html", "export"):
        assert (folder / name).exists(), name
    assert str(folder / "report.html") in printed
    assert f"bind(graph, '{folder / 'export'}')" in printed


def test_eval_reproduces_what_train_printed(workflow, run):
    folder, printed = run
    shown = marft("eval", workflow, "--adapters", folder / "export")
    assert shown.exit_code == 0, shown.output
    for name in ("sampled", "greedy"):
        trained = re.search(rf"^  {name} .* (\S+ ± \S+)$", printed, re.MULTILINE)
        evaluated = re.search(
            rf"^held-out return, {name}: (\S+ ± \S+), 4", shown.stdout, re.MULTILINE
        )
        assert trained[1] == evaluated[1]


def test_eval_takes_one_decoding_and_fewer_examples(workflow, run):
    shown = marft("eval", workflow, "--adapters", run[0] / "export", "--greedy", "--examples", 2)
    assert shown.stdout.startswith("held-out return, greedy: ")
    assert shown.stdout.endswith("2 examples\n")
    assert shown.stdout.count("\n") == 1


def test_eval_of_a_folder_that_is_no_export_says_so(workflow, tmp_path):
    shown = marft("eval", workflow, "--adapters", tmp_path)
    assert shown.exit_code == 1
    assert "no export folder" in shown.stderr


def test_export_writes_a_new_folder_and_refuses_a_used_one(run, tmp_path):
    first = marft("export", run[0], tmp_path / "out")
    assert first.exit_code == 0, first.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["serve"][0].startswith("vllm serve ")
    assert f"    {manifest['serve'][0]}\n" in first.stdout
    assert manifest["serve"][0] in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    again = marft("export", run[0], tmp_path / "out")
    assert again.exit_code == 1
    assert "not empty" in again.stderr


def test_a_used_run_folder_is_refused_and_left_alone(workflow, run):
    before = sorted(path.stat().st_mtime_ns for path in run[0].rglob("*"))
    result = marft("train", workflow, "--run-dir", run[0])
    assert result.exit_code == 1
    assert "--resume" in result.stderr
    assert sorted(path.stat().st_mtime_ns for path in run[0].rglob("*")) == before


def test_resume_continues_with_the_runs_settings(workflow, tmp_path):
    folder = tmp_path / "run"
    assert marft("train", workflow, "--run-dir", folder, "--seed", 3).exit_code == 0
    result = marft("train", workflow, "--run-dir", folder, "--resume", "--iterations", 3)
    assert result.exit_code == 0, result.output
    iterations = [row["iteration"] for row in read_metrics(folder)]
    assert iterations == [1, 2, 3]
    assert "seed: 3" in (folder / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--base-model", "./no/such/model"), "no/such/model"),
        (("--nodes", "nobody"), "nobody"),
        (("--lora-targets", "no_such_layer"), "lora_targets"),
    ],
)
def test_wrong_input_is_named_before_anything_is_written(workflow, tmp_path, options, message):
    result = marft("train", workflow, "--run-dir", tmp_path / "run", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_checkpoint_that_resumes(workflow, tmp_path, signum):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from marft_graph.cli import main; main()", "train"]
    command += [str(workflow), "--run-dir", str(folder), "--iterations", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while len(read_metrics(folder)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        intruder = marft("train", workflow, "--run-dir", folder, "--resume")
        assert intruder.exit_code == 1
        assert f"in use by process {process.pid} on" in intruder.stderr
        process.send_signal(signum)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, printed.decode()
    assert b"Traceback" not in printed
    assert b"finishing this step" in printed
    done = read_metrics(folder)[-1]["iteration"]
    assert (folder / "checkpoints" / f"step_{done}").is_dir()
    result = marft("train", workflow, "--run-dir", folder, "--resume", "--iterations", done + 1)
    assert result.exit_code == 0, result.output
    assert read_metrics(folder)[-1]["iteration"] == done + 1


def test_the_exit_codes_are_in_the_help_and_in_the_docs():
    page = (Path(__file__).parents[1] / "docs/guides/runs.md").read_text(encoding="utf-8")
    for text in (marft("--help").stdout, marft("train", "--help").stdout, page):
        for word in ("130", "143", "SIGINT", "SIGTERM"):
            assert word in text, word


def test_resume_takes_changes_that_are_accepted_by_name(workflow, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    command = ("train", workflow, "--run-dir", folder, "--resume", "--iterations", 3)
    refused = marft(*command, "--clip-ratio", 0.1)
    assert refused.exit_code == 2
    assert "clip_ratio: 0.2 -> 0.1" in refused.stderr
    accepted = marft(*command, "--clip-ratio", 0.1, "--accept-changes", "clip_ratio")
    assert accepted.exit_code == 0, accepted.output
    assert "going on with another clip_ratio" in accepted.stderr


# Pictures of a run


def test_inspect_html_lays_a_run_over_the_graph(
    workflow: Path, run: tuple[Path, Result], tmp_path: Path
) -> None:
    page = tmp_path / "graph.html"
    result = marft("inspect", workflow, "--run", run[0], "--output", page)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    for fact in ("calls per episode", "tokens per call", "episodes that failed here", "advantage"):
        assert fact in text
    assert "One episode over time" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


def test_a_run_that_is_none_is_named(workflow: Path, tmp_path: Path) -> None:
    result = marft("inspect", workflow, "--format", "svg", "--run", tmp_path)
    assert result.exit_code == 2
    assert "--run goes with --format text, html, json, not svg" in result.output


def test_inspect_shows_what_the_workflow_s_settings_train(workflow: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shared"
    shutil.copytree(workflow, copy)
    with (copy / "config.yaml").open("a") as file:
        file.write("per_node: {writer: {adapter: house style}}\n")
    result = marft("inspect", copy)
    assert result.exit_code == 0, result.output
    assert "[adapter house style]" in result.output


def test_a_dry_run_counts_the_calls(workflow: Path) -> None:
    result = marft("inspect", workflow, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "writer  observes no other agent  (1 calls a run)" in result.output
