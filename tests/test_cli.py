"""The command line: what its help promises, what it passes on, and how it fails."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import click
import pytest
from click.testing import CliRunner, Result

import marft_graph.workflow
from marft_graph import errors
from marft_graph.cli import main
from marft_graph.config import TrainConfig

APP = '''
"""Two nodes, one of which calls a model."""
from typing import TypedDict

from langchain_core.language_models import FakeListChatModel
from langgraph.graph import END, START, StateGraph


class State(TypedDict):
    question: str
    answer: str


model = FakeListChatModel(responses=["4"])


def solver(state: State) -> dict:
    return {"answer": model.invoke(state["question"]).text}


def checker(state: State) -> dict:
    return {"answer": state["answer"].strip()}


builder = StateGraph(State)
builder.add_node("solver", solver)
builder.add_node("checker", checker)
builder.add_edge(START, "solver")
builder.add_edge("solver", "checker")
builder.add_edge("checker", END)
graph = builder.compile()
'''


def marft(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def app(tmp_path: Path) -> str:
    path = tmp_path / "app.py"
    path.write_text(APP, encoding="utf-8")
    return f"{path}:graph"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Stand in for the workflow and the trainer; returns what each Trainer was given."""
    import marft_graph.trainer

    asked: list[dict] = []

    def load_data(dataset: str) -> tuple[list[dict], list[dict]]:
        asked.append({"dataset": dataset})
        return [{"question": "1+1"}], [{"question": "2+2"}]

    def trainer(graph: object, **kwargs: object) -> object:
        asked.append({"graph": graph, **kwargs})
        raise errors.EpisodesFailedError("stop here")

    target = SimpleNamespace(
        name="w",
        graph="the graph",
        load_data=load_data,
        reward=lambda example, state: 0.0,
        parts=dict,
        settings={"base_model": "m", "learning_rate": 3e-4, "seed": 5, "dataset": "own"},
    )
    monkeypatch.setattr(marft_graph.workflow, "load_target", lambda name: target)
    monkeypatch.setattr(marft_graph.trainer, "Trainer", trainer)
    return asked


# Help


@pytest.mark.parametrize("command", [(), ("train",), ("eval",), ("inspect",), ("export",)])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(command, flag):
    result = marft(*command, flag)
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize("spec", dataclasses.fields(TrainConfig), ids=lambda spec: spec.name)
def test_train_help_explains_every_setting_with_unit_and_default(spec):
    option = next(o for o in main.commands["train"].params if o.name == spec.name)
    assert "--" + spec.name.replace("_", "-") in option.opts
    assert spec.metadata["help"] in option.help
    assert spec.metadata["unit"] in option.help
    default = {None: "none", (): "none", "": "none", True: "yes", False: "no"}
    if spec.default is dataclasses.MISSING:  # made by a factory: an empty mapping
        expected = "none"
    elif isinstance(spec.default, bool) or spec.default in (None, (), ""):
        expected = default[spec.default]
    elif isinstance(spec.default, tuple):
        expected = " ".join(spec.default)
    else:
        expected = str(spec.default)
    assert f"default {expected}]" in option.help


def test_help_lists_the_settings_after_the_commands_own_options():
    output = marft("train", "--help").output
    assert output.index("--run-dir") < output.index("Settings") < output.index("--learning-rate")


def test_version_is_printed():
    assert marft("--version").output.strip().endswith("0.1.0")


@pytest.mark.slow
def test_help_answers_within_a_second():
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "marft_graph.cli", "--help"], check=True, capture_output=True
    )
    assert time.monotonic() - started < 1.0


# Settings


def test_an_option_beats_the_file_which_beats_the_workflow_which_beats_the_default(
    no_training, tmp_path
):
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1e-5\nseed: 6\n", encoding="utf-8")
    marft("train", "w", "--run-dir", tmp_path / "run", "--config", file, "--seed", 7)
    config = no_training[-1]["config"]
    assert config.base_model == "m"  # workflow
    assert config.learning_rate == 1e-5  # file
    assert config.seed == 7  # option
    assert config.gamma == 1.0  # default


def test_options_of_every_kind_reach_the_settings(no_training, tmp_path):
    marft(
        *("train", "w", "--run-dir", tmp_path / "run", "--nodes", "a", "--nodes", "b c"),
        *("--no-normalize-advantages", "--value-clip", "none", "--target-kl", "0.1"),
        *("--level", "action", "--iterations", "3", "--base-model", "org/model"),
        *("--cpu-threads", "2", "--microbatch-tokens", "none"),
    )
    config = no_training[-1]["config"]
    assert config.nodes == ("a", "b c")
    assert config.normalize_advantages is False
    assert config.value_clip is None
    assert config.target_kl == 0.1
    assert (config.cpu_threads, config.microbatch_tokens) == (2, None)
    assert (config.level, config.iterations, config.base_model) == ("action", 3, "org/model")


@pytest.mark.parametrize(
    "spec",
    [s for s in dataclasses.fields(TrainConfig) if isinstance(s.metadata["at_least"], int)],
    ids=lambda spec: spec.name,
)
def test_every_setting_with_a_least_value_takes_it_as_an_option(no_training, tmp_path, spec):
    value = spec.metadata["at_least"]
    option = "--" + spec.name.replace("_", "-")
    marft("train", "w", "--run-dir", tmp_path / "run", option, value)
    assert getattr(no_training[-1]["config"], spec.name) == value


@pytest.mark.parametrize(("option", "expected"), [((), "own"), (("--dataset", "gsm8k"), "gsm8k")])
def test_dataset_goes_to_the_workflow_and_into_the_runs_settings(
    no_training, tmp_path, option, expected
):
    marft("train", "w", "--run-dir", tmp_path / "run", *option)
    assert no_training[0] == {"dataset": expected}
    assert no_training[-1]["extra_settings"] == {"dataset": expected}


def test_resume_takes_the_runs_own_settings(no_training, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 9\ndataset: theirs\n", encoding="utf-8")
    marft("train", "w", "--run-dir", tmp_path, "--resume", "--iterations", "4")
    given = no_training[-1]
    assert (given["resume"], given["config"].seed, given["config"].iterations) == (True, 9, 4)
    assert no_training[0] == {"dataset": "theirs"}


# What is printed


def measured(mean: float, *, greedy: bool) -> object:
    from marft_graph.evaluation import Evaluation

    return Evaluation(mean, 0.01, (mean,), 200, 0, {}, greedy)


def test_train_prints_returns_report_and_how_to_use_the_adapters(
    no_training, tmp_path, monkeypatch
):
    import marft_graph.trainer

    run = tmp_path / "my run"
    result = marft_graph.trainer.TrainResult(
        run_dir=run,
        report=run / "report.html",
        export=run / "export",
        iterations=3,
        before=measured(0.21, greedy=False),
        before_greedy=measured(0.25, greedy=True),
        after=measured(0.91, greedy=False),
        after_greedy=measured(0.95, greedy=True),
    )
    trainer = MagicMock()
    trainer.__enter__.return_value.train.return_value = result
    monkeypatch.setattr(marft_graph.trainer, "Trainer", lambda graph, **kwargs: trainer)
    lines = marft("train", "w", "--run-dir", run).output.splitlines()
    assert "Held-out return (mean ± standard error, 200 examples)" in lines
    assert "  sampled   0.210 ± 0.010    0.910 ± 0.010" in lines
    assert "  greedy    0.250 ± 0.010    0.950 ± 0.010" in lines
    assert f"report:   {run / 'report.html'}" in lines
    assert f"    app = bind(graph, '{run / 'export'}')" in lines
    assert lines[-1] == f"    marft-graph eval w --adapters '{run / 'export'}' --dataset own"


# Failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--clip-ratio", "-1"), "clip_ratio is -1; it must be above 0"),
        (("--gamma", "1.5"), "gamma is 1.5; it must be between 0 and 1"),
        (("--group-size", "0"), "group_size is 0; it must be at least 1"),
        (("--group-size", "2.5"), "Invalid value for '--group-size'"),
        (("--level", "word"), "Invalid value for '--level'"),
        (("--value-clip", "some"), "'some' is neither a number nor the word none"),
        (("--cpu-threads", "1.5"), "'1.5' is neither a whole number nor the word none"),
        (("--per-node", "a.lora_rank=["), "'[' is no YAML value"),
        (("--learningrate", "1"), "No such option"),
        (("--overwrite", "--resume"), "exclude each other"),
        (("--config", "/no/such.yaml"), "/no/such.yaml"),
    ],
)
def test_bad_options_are_named_and_exit_with_2(no_training, tmp_path, options, message):
    result = marft("train", "w", "--run-dir", tmp_path / "run", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_unknown_setting_in_a_file_is_named_with_the_nearest_one(no_training, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("learing_rate: 1\n", encoding="utf-8")
    result = marft("train", "w", "--run-dir", tmp_path / "run", "--config", file)
    assert result.exit_code == 2
    assert "did you mean learning_rate?" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 2),
        (errors.UnknownNodeError, 2),
        (errors.DatasetError, 2),
        (errors.ModelError, 2),
        (errors.WorkflowError, 2),
        (errors.EpisodesFailedError, 1),
        (errors.RewardError, 1),
        (errors.CheckpointError, 1),
        (KeyboardInterrupt, 130),
    ],
)
def test_failures_become_one_line_and_an_exit_code(monkeypatch, error, code):
    @click.command()
    def fails() -> None:
        raise error("line one\nline two")

    monkeypatch.setitem(main.commands, "fails", fails)
    result = marft("fails")
    assert result.exit_code == code
    expected = "stopped" if error is KeyboardInterrupt else "error: line one line two"
    assert result.stderr == expected + "\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    @click.command()
    def fails() -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(main.commands, "fails", fails)
    assert isinstance(marft("fails").exception, ZeroDivisionError)


def test_a_graph_without_task_cannot_be_trained_and_says_why(app, tmp_path):
    result = marft("train", app, "--run-dir", tmp_path / "run", "--base-model", "m")
    assert result.exit_code == 2
    assert "task.py" in result.stderr


def test_a_target_that_does_not_exist_is_named():
    result = marft("inspect", "no/such/folder")
    assert result.exit_code == 2
    assert "no/such/folder" in result.stderr


@pytest.mark.parametrize("command", [("train", "w", "--run-dir"), ("eval", "w", "--adapters")])
@pytest.mark.parametrize(
    ("load_data", "message"),
    [
        (lambda name: [{"question": "1+1"}], "returned a list; it must return a tuple of two"),
        (lambda name: int(name), "load_data('own') of w: invalid literal"),
        (lambda name: Path("no-such-file").read_text(), "load_data('own') of w: [Errno 2]"),
        (lambda name: {}[name], "load_data('own') of w: KeyError: 'own' ("),
    ],
)
def test_a_data_set_that_cannot_be_loaded_is_named(
    no_training, monkeypatch, tmp_path, command, load_data, message
):
    target = marft_graph.workflow.load_target("w")
    monkeypatch.setattr(target, "load_data", load_data)
    result = marft(*command, tmp_path / "run")
    assert result.exit_code == 2
    assert message in result.stderr


def test_export_of_a_folder_that_is_no_run_says_so(tmp_path):
    result = marft("export", tmp_path, tmp_path / "out")
    assert result.exit_code == 1
    assert "no run folder" in result.stderr
    assert not (tmp_path / "out").exists()


# Inspect


def test_inspect_names_the_agents_of_a_graph_in_a_file(app):
    result = marft("inspect", app)
    assert result.exit_code == 0
    assert "solver" in result.output
    assert "checker" in result.output


def test_inspect_prints_json_that_parses(app):
    shown = json.loads(marft("inspect", app, "--json").output)
    assert "solver" in json.dumps(shown)


@pytest.mark.parametrize(
    ("format_", "expected"),
    [("mermaid", "flowchart TD"), ("dot", '"solver" ->'), ("svg", "<svg"), ("json", '"solver"')],
)
def test_inspect_prints_other_formats(app, format_, expected):
    result = marft("inspect", app, "--format", format_)
    assert result.exit_code == 0
    assert expected in result.output


@pytest.mark.parametrize("suffix", ["svg", "png", "dot", "mmd", "json", "txt"])
def test_inspect_writes_what_the_files_name_says_and_replaces_nothing_unasked(
    app, tmp_path, suffix
):
    output = tmp_path / f"graph.{suffix}"
    assert marft("inspect", app, "--output", output).exit_code == 0
    written = output.read_bytes()
    assert written.startswith(b"\x89PNG") if suffix == "png" else b"solver" in written
    refused = marft("inspect", app, "--output", output)
    assert refused.exit_code == 2
    assert "--force to replace it" in refused.stderr
    assert marft("inspect", app, "--output", output, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "--format", "svg"], "exclude each other"),
        (["--format", "png"], "give --output FILE.png"),
        (["--output", "graph.gif"], "cannot tell a format from 'graph.gif'"),
        (["--format", "gif"], "'gif' is not one of"),
    ],
)
def test_inspect_refuses_what_it_cannot_do(app, options, message):
    result = marft("inspect", app, *options)
    assert result.exit_code == 2
    assert message in result.stderr
