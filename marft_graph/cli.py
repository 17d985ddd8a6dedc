"""The command line: `marft-graph train`, `eval`, `inspect` and `export`.

Owns words on the terminal and exit codes. Everything else is done by the library, which writes
every file and prints nothing. The heavy imports (torch and what stands on it) happen inside the
commands, so that `--help` answers at once.

Exit codes: 0 done; 1 the run failed; 2 the input was wrong (an option, a setting, a graph, a data
set, a model, a workflow); 130 stopped with Ctrl-C after writing a checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from marft_graph.cli_progress import training_progress
from marft_graph.cli_settings import SettingsCommand, merged_settings, settings_options
from marft_graph.config import TrainConfig
from marft_graph.errors import (
    ConfigError,
    DatasetError,
    GraphError,
    MarftError,
    ModelError,
    WorkflowError,
)

if TYPE_CHECKING:
    from marft_graph.trainer import Evaluation, Trainer
    from marft_graph.workflow import Workflow

_BAD_INPUT = (ConfigError, GraphError, DatasetError, ModelError, WorkflowError)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


class _Commands(click.Group):
    """Turns the package's own errors into one line; any other exception keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MarftError as error:
            message = " ".join(str(error).split())
            click.secho(f"error: {message}", fg="red", err=True)
            ctx.exit(2 if isinstance(error, _BAD_INPUT) else 1)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="marft-graph")
def main() -> None:
    """Train a LangGraph app with one LoRA adapter per node, and use what was trained.

    A WORKFLOW is a folder with graph.py (the app), task.py (data and reward) and config.yaml.
    """


@main.command(cls=SettingsCommand)
@click.argument("workflow")
@click.option("--run-dir", type=_FOLDER, required=True, help="Folder for everything the run writes.")
@click.option("--dataset", help="Data set that the workflow loads: a name or path it understands.")
@click.option("--config", "config_file", type=_FILE, help="YAML file with settings.")
@click.option("--overwrite", is_flag=True, help="Replace a run that is already in the folder.")
@click.option("--resume", is_flag=True, help="Continue the run in the folder.")
@settings_options
def train(
    workflow: str,
    run_dir: Path,
    dataset: str | None,
    config_file: Path | None,
    overwrite: bool,
    resume: bool,
    **options: Any,
) -> None:
    """Train the agents of WORKFLOW.

    A setting comes from the last of these that names it: its default, the workflow's config.yaml,
    the file given with --config, an option given here. Ctrl-C ends with a checkpoint.
    """
    if overwrite and resume:
        raise click.UsageError("--overwrite and --resume exclude each other")
    target = _load(workflow)
    settings = merged_settings(target.settings, config_file=config_file, options=options)
    trainer = _trainer(
        target, settings, dataset, run_dir=run_dir, overwrite=overwrite, resume=resume
    )
