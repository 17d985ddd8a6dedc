"""`marft-graph train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marft_graph.cli.group import EXIT_CODES, main
from marft_graph.cli.settings import SettingsCommand, merged_settings, settings_options
from marft_graph.cli.tasks import FILE, FOLDER, chosen_dataset, load_task, loaded, shown, usage
from marft_graph.config import TrainConfig, read_yaml

if TYPE_CHECKING:
    from marft_graph.trainer import TrainResult


@main.command(cls=SettingsCommand, epilog=EXIT_CODES)
@click.argument("workflow")
@click.option("--run-dir", type=FOLDER, required=True, help="Folder for what the run writes.")
@click.option("--dataset", help="Data set to train on: a name or path that the workflow knows.")
@click.option("--config", "config_file", type=FILE, help="YAML file with settings.")
@click.option("--overwrite", is_flag=True, help="Delete the run that is in the folder first.")
@click.option("--resume", is_flag=True, help="Continue the run in the folder, with its settings.")
@click.option(
    "--accept-changes",
    metavar="NAME",
    multiple=True,
    help="With --resume: a setting that may differ though it changes the mathematics, or `graph` "
    "for the graph; may be given several times.",
)
@settings_options
def train(
    workflow: str,
    run_dir: Path,
    dataset: str | None,
    config_file: Path | None,
    overwrite: bool,
    resume: bool,
    accept_changes: tuple[str, ...],
    **options: Any,
) -> None:
    """Train the agents of WORKFLOW.

    A setting comes from the last of these that names it: its default, the workflow's config.yaml,
    the file given with --config, an option given here. Ctrl-C ends with a checkpoint, from which
    --resume continues.
    """
    if accept_changes and not resume:
        raise click.UsageError("--accept-changes goes with --resume")
    if overwrite and resume:
        raise click.UsageError("--overwrite and --resume exclude each other")
    target, load_data, reward = load_task(workflow)
    layers = [target.settings]
    if resume and (run_dir / "config.yaml").is_file():
        layers.append(read_yaml(run_dir / "config.yaml"))
    settings = merged_settings(*layers, config_file=config_file, options=options)
    dataset = chosen_dataset(settings, dataset)
    config = TrainConfig.from_mapping(settings)  # refuses bad settings before torch is imported
    train_data, eval_data = loaded(load_data, dataset, workflow)

    from marft_graph.trainer import Trainer

    with Trainer(
        target.graph,
        train_dataset=train_data,
        eval_dataset=eval_data,
        reward=reward,
        config=config,
        run_dir=run_dir,
        **target.parts(),
        overwrite=overwrite,
        resume=resume,
        accept_changes=accept_changes,
        extra_settings={} if dataset is None else {"dataset": dataset},
        target=workflow,
    ) as trainer:
        result = trainer.train()
    _print_result(result, workflow, dataset)


def _print_result(result: TrainResult, workflow: str, dataset: str | None) -> None:
    if result.after is not None:
        rows = {
            "sampled": (result.before, result.after),
            "greedy": (result.before_greedy, result.after_greedy),
        }
        click.echo(f"Held-out return (mean ± standard error, {result.after.episodes} examples)")
        click.echo(f"  {'':8}  {'before':15}  after")
        for name, (before, after) in rows.items():
            click.echo(f"  {name:8}  {shown(before):15}  {shown(after)}")
        click.echo()
    data = "" if dataset is None else f" --dataset {shlex.quote(dataset)}"
    folder = shlex.quote(str(result.export))
    click.echo(
        f"report:   {result.report}\n"
        f"adapters: {result.export}\n\n"
        f"{usage(result.export)}\n\n"
        "Measure them again:\n\n"
        f"    marft-graph eval {shlex.quote(workflow)} --adapters {folder}{data}"
    )
