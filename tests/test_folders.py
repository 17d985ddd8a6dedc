"""Folders that are not what was asked for: each is named, whoever is given it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marft_graph import TrainConfig, Trainer, bind
from marft_graph.demonstrations import read_demonstrations
from marft_graph.deploy.export import export_run
from marft_graph.deploy.manifest import digest_of, files_of, read_manifest, sealed
from marft_graph.errors import CheckpointError, ConfigError, ExportError, MarftError
from marft_graph.evaluation import evaluate_export
from marft_graph.run.checkpoint import write_folder_atomically
from marft_graph.run.lock import LOCK
from marft_graph.run.report import write_report
from marft_graph.run.state import read_state
from tests.apps import duo
from tests.training import EXAMPLES, config, reward


def a_file(folder: Path) -> None:
    folder.write_text("a file")


def empty(folder: Path) -> None:
    folder.mkdir()


def of_something_else(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    (folder / "manifest.json").write_text(json.dumps({"name": "a web app"}))


def of_text_that_is_none(folder: Path) -> None:
    folder.mkdir()
    for name in ("manifest.json", "graph.json", "config.yaml", "metrics.jsonl"):
        (folder / name).write_bytes(b"\xff\xfe\0")


def folders_for_files(folder: Path) -> None:
    for name in ("manifest.json", "graph.json", "config.yaml", "metrics.jsonl"):
        (folder / name).mkdir(parents=True)


FOLDERS = [lambda folder: None, a_file, empty, of_something_else, of_text_that_is_none,
           folders_for_files]  # fmt: skip
IDS = ["missing", *(make.__name__ for make in FOLDERS[1:])]


def resume(folder: Path, settings: TrainConfig) -> None:
    Trainer(duo(), train_dataset=EXAMPLES, reward=reward, config=settings, run_dir=folder,
            resume=True)  # fmt: skip


def start_from(folder: Path, settings: TrainConfig) -> None:
    settings = settings.replace(start_from=str(folder))
    Trainer(duo(), train_dataset=EXAMPLES, reward=reward, config=settings,
            run_dir=folder.parent / "new")  # fmt: skip


def evaluate(folder: Path, settings: TrainConfig) -> None:
    evaluate_export(duo(), folder, EXAMPLES, reward=reward, config=settings)


def export(folder: Path, settings: TrainConfig) -> None:
    export_run(folder, folder.parent / "new")


VERBS: list[Callable[[Path, TrainConfig], Any]] = [
    *(resume, start_from, evaluate, export),
    lambda folder, settings: bind(duo(), folder),
    lambda folder, settings: read_demonstrations(folder),
    lambda folder, settings: write_report(folder),
]
VERB_IDS = ["resume", "start_from", "evaluate", "export", "bind", "demonstrations", "report"]


@pytest.mark.parametrize("make_folder", FOLDERS, ids=IDS)
@pytest.mark.parametrize(
    "verb",
    VERBS,
    ids=VERB_IDS,
)
def test_a_folder_that_is_not_what_was_asked_for_is_named_and_left_as_it_is(
    tmp_path: Path,
    tiny_model: Path,
    make_folder: Callable[[Path], None],
    verb: Callable[[Path, TrainConfig], Any],
) -> None:
    folder = tmp_path / "given"
    make_folder(folder)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(MarftError, match=str(folder)):
        verb(folder, config(tiny_model))
    left = [path for path in tmp_path.rglob("*") if path.name != LOCK]
    assert sorted(map(str, left)) == before


def begin(folder: Path, settings: TrainConfig) -> None:
    with Trainer(duo(), train_dataset=EXAMPLES, reward=reward, config=settings,
                 run_dir=folder) as trainer:  # fmt: skip
        trainer.train(progress=False)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300], ids=["null", "too long"])
@pytest.mark.parametrize("verb", [begin, *VERBS], ids=["begin", *VERB_IDS])
def test_a_name_that_no_folder_can_have_is_refused(
    tmp_path: Path, tiny_model: Path, verb: Callable[[Path, TrainConfig], Any], name: str
) -> None:
    with pytest.raises(MarftError):
        verb(tmp_path / name, config(tiny_model))


@pytest.mark.parametrize("setting", ["base_model", "start_from"])
def test_a_home_that_nobody_has_is_named(tiny_model: Path, tmp_path: Path, setting: str) -> None:
    settings = config(tiny_model).replace(**{setting: "~nobody-has-this-name/model"})
    with pytest.raises(MarftError, match=f"{setting}.*~nobody-has-this-name"):
        begin(tmp_path / "run", settings)


def test_an_export_of_another_format_says_which(tmp_path: Path) -> None:
    for format_ in (1, 3, "2"):
        manifest: dict[str, Any] = {"format": format_, "new": "field"}
        manifest["sha256"] = {name: digest_of(tmp_path / name) for name in files_of(tmp_path)}
        (tmp_path / "manifest.json").write_bytes(sealed(manifest))
        with pytest.raises(ExportError, match=f"has format {format_!r} of exports.*reads 2"):
            read_manifest(tmp_path)


def test_what_a_newer_version_wrote_is_refused_by_name(make: Any, tmp_path: Path) -> None:
    trainer = make()
    result = trainer.train(progress=False)
    settings = result.run_dir / "config.yaml"
    written = settings.read_text()
    settings.write_text(written + "entropy_target: 3\n")
    with pytest.raises(ConfigError, match="unknown setting 'entropy_target'"):
        export_run(result.run_dir, tmp_path / "out")
    settings.write_text(written)

    def newer(folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps({"iteration": 3, "phase": "moon"}))

    checkpoint = write_folder_atomically(result.run_dir / "checkpoints" / "step_3", newer)
    for read in (lambda: read_state(checkpoint), lambda: make(resume=True)):
        with pytest.raises(CheckpointError, match=r"another version.*'phase'"):
            read()
