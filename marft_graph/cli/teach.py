"""`marft-graph trace` and `warm-start`: record what the app's own models say, and imitate it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marft_graph.cli.group import main
from marft_graph.cli.settings import merged_settings, settings_options
from marft_graph.cli.tasks import FILE, FOLDER, chosen_dataset, load_task, loaded
from marft_graph.config import TrainConfig

if TYPE_CHECKING:
    from marft_graph.episode import Episode


@main.command()
@click.argument("target")
@click.option("--out", type=FILE, required=True, help="Parquet file to write.")
@click.option("--data", type=FILE, help="Examples: .jsonl, .json or .parquet.")
@click.option("--dataset", help="Data set to run on, where TARGET is a workflow.")
@click.option("--examples", type=click.IntRange(0), default=0, help="Most examples; 0: all.")
@click.option(
    "--repeat", type=click.IntRange(1), default=1, help="Episodes of each example.  [default: 1]"
)
@click.option("--node", "nodes", multiple=True, help="Record this node only; repeatable.")
@click.option(
    "--concurrency", type=click.IntRange(1), default=16, help="Episodes that run at once."
)
@click.option("--timeout", type=float, default=600.0, help="Deadline of an episode, in seconds.")
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
def trace(
    target: str,
    out: Path,
    data: Path | None,
    dataset: str | None,
    examples: int,
    repeat: int,
    nodes: tuple[str, ...],
    concurrency: int,
    timeout: float,
    force: bool,
) -> None:
    """Run TARGET with its own models and record every model call, node by node.

    The models are really asked, and cost what they cost. `warm-start` learns from the file. The
    examples are those of --data, or a workflow's training examples; a workflow's reward is kept.
    """
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists; give another --out, or --force to replace it")

    from itertools import islice

    from marft_graph.data import as_examples, read_rows
    from marft_graph.rollout.runner import run_episodes
    from marft_graph.run.trajectories import write_traces
    from marft_graph.workflow import load_target

    workflow = load_target(target)
    rows: Any
    if data is not None:
        rows = read_rows(data)
    elif workflow.load_data is not None:
        chosen = chosen_dataset(dict(workflow.settings), dataset)
        rows = loaded(workflow.load_data, chosen, target)[0]
    else:
        raise click.UsageError(f"{target} has no task.py with load_data; give --data FILE")
    listed = as_examples(rows, "the data", examples or None)
    episodes = run_episodes(
        workflow.graph,
        list(islice(iter(listed), examples or None)),
        engine=None,
        reward=workflow.reward,
        nodes=nodes,
        **workflow.parts(),
        group_size=repeat,
        concurrency=concurrency,
        episode_timeout=timeout,
    )
    click.echo(f"wrote {write_traces(out, episodes, iteration=0, phase='own')}")
    _print_traced(episodes, is_rewarded=workflow.reward is not None)


def _print_traced(episodes: list[Episode], *, is_rewarded: bool) -> None:
    """How many calls of which node were recorded, what failed, and the mean return."""
    from collections import Counter

    from marft_graph.evaluation import failure_reasons
    from marft_graph.names import agent_path

    calls = Counter(agent_path(call.node) for episode in episodes for call in episode.calls)
    for node, count in calls.most_common():
        click.echo(f"  {node}: {count} calls")
    for reason, count in failure_reasons(episodes).items():
        click.echo(f"  {count} of {len(episodes)} episodes failed: {reason}")
    returns = [episode.total_reward for episode in episodes if episode.ok]
    if is_rewarded and returns:
        click.echo(f"  mean return {sum(returns) / len(returns):.3f}, {len(returns)} episodes")


@main.command("warm-start")
@click.argument("workflow")
@click.option(
    "--from",
    "sources",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    required=True,
    help="What `trace` wrote, a run folder, a LangSmith export, or rows with `node` and "
    "`messages`; repeatable.",
)
@click.option("--out", type=FOLDER, required=True, help="New folder for the adapters.")
@click.option("--min-return", type=float, help="Only episodes with at least this return.")
@click.option("--best", type=click.IntRange(1), help="At most so many episodes of each example.")
@click.option("--passes", type=click.IntRange(1), default=3, help="Passes over the answers.")
@click.option("--batch", type=click.IntRange(1), default=16, help="Answers in an optimizer step.")
@click.option("--config", "config_file", type=FILE, help="YAML file with settings.")
@settings_options
def warm_start(
    workflow: str,
    sources: tuple[Path, ...],
    out: Path,
    min_return: float | None,
    best: int | None,
    passes: int,
    batch: int,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Fine-tune the adapters of WORKFLOW on recorded answers, before training or instead of it.

    `marft-graph train WORKFLOW --start-from OUT` goes on from there.
    """
    import tempfile

    target, load_data, reward = load_task(workflow)
    settings = merged_settings(target.settings, config_file=config_file, options=options)
    dataset = chosen_dataset(settings, None)
    config = TrainConfig.from_mapping(settings)
    train_data, _ = loaded(load_data, dataset, workflow)

    from marft_graph.demonstrations import read_demonstrations
    from marft_graph.trainer import Trainer

    found = [
        one
        for source in sources
        for one in read_demonstrations(source, min_return=min_return, best=best)
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        Trainer(
            target.graph,
            train_dataset=train_data,
            reward=reward,
            config=config,
            run_dir=Path(folder) / "run",
            **target.parts(),
        ) as trainer,
    ):
        stats = trainer.warm_start(found, epochs=passes, batch_size=batch)
        trainer.export(out)
    for agent, own in stats.items():
        long = f", {own['too_long']:.0f} too long" if own["too_long"] else ""
        click.echo(
            f"{agent}: {own['demonstrations']:.0f} answers{long}, "
            f"loss {own['loss_first']:.3f} -> {own['loss_last']:.3f} per token"
        )
    place = shlex.quote(str(out))
    click.echo(
        f"adapters: {out}\n\nTrain on from them:\n\n"
        f"    marft-graph train {shlex.quote(workflow)} --run-dir DIR --start-from {place}"
    )
