"""The command line: `marft-graph train`, `trace`, `warm-start`, `eval`, `inspect` and `export`.

Owns words on the terminal and exit codes; the library does the work. The heavy imports (torch and
what stands on it) happen inside the commands, so that `--help` answers at once.

Exit codes are in `EXIT_CODES`. Text that a model may have written (it is in some error messages)
reaches the terminal with its control characters made visible.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marft_graph.cli_settings import SettingsCommand, merged_settings, settings_options
from marft_graph.config import TrainConfig, read_yaml
from marft_graph.errors import (
    ConfigError,
    DatasetError,
    GraphError,
    MarftError,
    ModelError,
    WorkflowError,
)
from marft_graph.secret import without_secrets
from marft_graph.visible import visible

if TYPE_CHECKING:
    from marft_graph.comparison import Comparison, Price
    from marft_graph.episode import Episode
    from marft_graph.evaluation import Evaluation
    from marft_graph.graph.flex_mg import FlexMG
    from marft_graph.trainer import TrainResult
    from marft_graph.workflow import Workflow

EXIT_CODES = """\b
Exit codes:
  0    done
  1    the run failed, or its folder cannot be used
  2    the input was wrong: an option, a setting, a graph, a data set, a model, a workflow
  130  stopped by SIGINT (Ctrl-C), 143 by SIGTERM. The first signal finishes the
       running step and writes a checkpoint, from which --resume continues; a
       second one stops at once, and the last checkpoint stays.
"""
_BAD_INPUT = (ConfigError, GraphError, DatasetError, ModelError, WorkflowError)
# Formats of `inspect`, with the end of a file's name that asks for them.
_SUFFIXES = {
    "text": ".txt",
    "mermaid": ".mmd",
    "dot": ".dot",
    "svg": ".svg",
    "png": ".png",
    "html": ".html",
    "json": ".json",
}
_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


class _Commands(click.Group):
    """Turns the package's own errors into one line; any other exception keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _shown_warnings():
                return super().invoke(ctx)
        except MarftError as error:
            message = visible(without_secrets(" ".join(str(error).split())))
            click.secho(f"error: {message}", fg="red", err=True)
            ctx.exit(2 if isinstance(error, _BAD_INPUT) else 1)
        except KeyboardInterrupt as error:
            click.secho("stopped", fg="red", err=True)
            ctx.exit(128 + getattr(error, "signum", signal.SIGINT))


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(without_secrets(super().format(record)))


@contextlib.contextmanager
def _shown_warnings() -> Iterator[None]:
    """The package's warnings go to stderr, whatever is in them."""
    package = logging.getLogger("marft_graph")
    handler = logging.StreamHandler()
    handler.setFormatter(_VisibleFormatter("%(message)s"))
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)


@click.group(
    cls=_Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="marft-graph")
def main() -> None:
    """Train a LangGraph app with one LoRA adapter per node, and use what was trained.

    A WORKFLOW is a folder with graph.py (the app), task.py (data and reward) and config.yaml.
    """


@main.command(cls=SettingsCommand, epilog=EXIT_CODES)
@click.argument("workflow")
@click.option("--run-dir", type=_FOLDER, required=True, help="Folder for what the run writes.")
@click.option("--dataset", help="Data set to train on: a name or path that the workflow knows.")
@click.option("--config", "config_file", type=_FILE, help="YAML file with settings.")
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
    target, load_data, reward = _load_task(workflow)
    layers = [target.settings]
    if resume and (run_dir / "config.yaml").is_file():
        layers.append(read_yaml(run_dir / "config.yaml"))
    settings = merged_settings(*layers, config_file=config_file, options=options)
    dataset = _chosen_dataset(settings, dataset)
    config = TrainConfig.from_mapping(settings)  # refuses bad settings before torch is imported
    train_data, eval_data = _loaded(load_data, dataset, workflow)

    from marft_graph.trainer import Trainer

    with Trainer(
        target.graph,
        train_dataset=train_data,
        eval_dataset=eval_data,
        reward=reward,
        config=config,
        run_dir=run_dir,
        inputs=target.inputs,
        overwrite=overwrite,
        resume=resume,
        accept_changes=accept_changes,
        extra_settings={} if dataset is None else {"dataset": dataset},
    ) as trainer:
        result = trainer.train()
    _print_result(result, workflow, dataset)


@main.command()
@click.argument("target")
@click.option("--out", type=_FILE, required=True, help="Parquet file to write.")
@click.option("--data", type=_FILE, help="Examples: .jsonl, .json or .parquet.")
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
        chosen = _chosen_dataset(dict(workflow.settings), dataset)
        rows = _loaded(workflow.load_data, chosen, target)[0]
    else:
        raise click.UsageError(f"{target} has no task.py with load_data; give --data FILE")
    listed = as_examples(rows, "the data", examples or None)
    episodes = run_episodes(
        workflow.graph,
        list(islice(iter(listed), examples or None)),
        engine=None,
        reward=workflow.reward,
        nodes=nodes,
        inputs=workflow.inputs,
        group_size=repeat,
        concurrency=concurrency,
        episode_timeout=timeout,
    )
    click.echo(f"wrote {write_traces(out, episodes, iteration=0, phase='own')}")
    _print_traced(episodes, is_rewarded=workflow.reward is not None)


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
@click.option("--out", type=_FOLDER, required=True, help="New folder for the adapters.")
@click.option("--min-return", type=float, help="Only episodes with at least this return.")
@click.option("--best", type=click.IntRange(1), help="At most so many episodes of each example.")
@click.option("--passes", type=click.IntRange(1), default=3, help="Passes over the answers.")
@click.option("--batch", type=click.IntRange(1), default=16, help="Answers in an optimizer step.")
@click.option("--config", "config_file", type=_FILE, help="YAML file with settings.")
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

    target, load_data, reward = _load_task(workflow)
    settings = merged_settings(target.settings, config_file=config_file, options=options)
    dataset = _chosen_dataset(settings, None)
    config = TrainConfig.from_mapping(settings)
    train_data, _ = _loaded(load_data, dataset, workflow)

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
            inputs=target.inputs,
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


@main.command("eval")
@click.argument("workflow")
@click.option(
    "--adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="RUN/export, or what `export` wrote; repeatable.",
)
@click.option("--base", is_flag=True, help="Measure the untrained base model.")
@click.option("--own", is_flag=True, help="Measure the app's own models (they are really asked).")
@click.option("--against", help="Compare with this one.  [default: own, else base, else the first]")
@click.option(
    "--price",
    "prices",
    multiple=True,
    metavar="NAME=READ,WRITTEN",
    help="Price of a million tokens read and written; repeatable.",
)
@click.option("--dataset", help="Data set: a name or path that the workflow knows.")
@click.option("--greedy/--sampled", default=None, help="One of the two only.  [default: both]")
@click.option(
    "--examples",
    type=int,
    help="Held-out examples; 0: all.  [default: the workflow's eval_examples]",
)
@click.option(
    "--repeat", type=click.IntRange(1), default=1, help="Episodes of each example.  [default: 1]"
)
@click.option("--base-model", help="Hub id or folder, where it is not the one in the export.")
@click.option("--device", help="Torch device of the base model.  [default: auto]")
@click.option("--json", "json_file", type=_FILE, help="Write the comparison to this file.")
@click.option("--html", "html_file", type=_FILE, help="Write it as a page.")
@click.option("--into", type=_FOLDER, help="Put it into the report of this run folder.")
def evaluate(
    workflow: str,
    adapters: tuple[str, ...],
    base: bool,
    own: bool,
    against: str | None,
    prices: tuple[str, ...],
    dataset: str | None,
    greedy: bool | None,
    examples: int | None,
    repeat: int,
    base_model: str | None,
    device: str | None,
    json_file: Path | None,
    html_file: Path | None,
    into: Path | None,
) -> None:
    """Measure policies on the held-out examples of WORKFLOW, several of them side by side.

    A policy is an export (--adapters), the untrained base (--base), or the app's own models
    (--own), each called by its name: base, own, NAME, or the name of the run's folder.
    """
    policies = _named_policies(adapters, base=base, own=own)
    is_compared = len(policies) > 1 or bool(prices or json_file or html_file or into or base or own)
    if is_compared and greedy is None:
        greedy = False
    if into is not None and not (into / "graph.json").is_file():
        raise click.UsageError(f"--into: {into} is no run folder")
    target, load_data, reward = _load_task(workflow)
    options = {"eval_examples": examples, "device": device}
    settings = merged_settings(target.settings, config_file=None, options=options)
    dataset = _chosen_dataset(settings, dataset)
    config = TrainConfig.from_mapping(settings)
    held_out = _loaded(load_data, dataset, workflow)[1]
    if held_out is None:
        raise DatasetError(f"{workflow} has no held-out examples to evaluate on")

    if is_compared:
        from marft_graph import comparison

        found = comparison.compare(
            target.graph,
            policies,
            held_out,
            reward=reward,
            config=config,
            inputs=target.inputs,
            against=against,
            prices=_prices(prices),
            episodes_per_example=repeat,
            greedy=bool(greedy),
            base_model=base_model,
        )
        _write_comparison(found, json_file, html_file, into)
        return

    from marft_graph.evaluation import export_episodes, summarize

    for choice in (False, True) if greedy is None else (greedy,):
        episodes = export_episodes(
            target.graph,
            next(iter(policies.values())),
            held_out,
            reward=reward,
            config=config,
            inputs=target.inputs,
            greedy=choice,
            group_size=repeat,
            base_model=base_model,
        )
        evaluation = summarize(episodes, greedy=choice)
        name = "greedy" if choice else "sampled"
        click.echo(f"held-out return, {name}: {_shown(evaluation)}, {evaluation.episodes} examples")


@main.command()
@click.argument("target")
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(_SUFFIXES)),
    help="What to show.  [default: text, or what the end of --output says]",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--run", type=_FOLDER, help="html: show what happened in this run folder as well.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Run a workflow folder's app on 8 examples with scripted answers first: finds agents that "
    "the code does not show, and counts calls. Its tools and other nodes do run.",
)
@click.option("--output", type=_FILE, help="Write to this file instead of the terminal.")
@click.option("--force", is_flag=True, help="Replace the output file if there is one.")
def inspect(
    target: str,
    format_: str | None,
    as_json: bool,
    run: Path | None,
    dry_run: bool,
    output: Path | None,
    force: bool,
) -> None:
    """Show what would be trained in TARGET, and who observes whom.

    TARGET is a workflow folder, a variable in a file (app.py:graph) or a langgraph.json.
    """
    if as_json and format_ not in (None, "json"):
        raise click.UsageError(f"--json and --format {format_} exclude each other")
    chosen = "json" if as_json else format_ or _format_of(output)
    if chosen == "png" and output is None:
        raise click.UsageError("a PNG is no text for a terminal; give --output FILE.png")
    if run is not None and chosen != "html":
        raise click.UsageError(f"--run goes with --format html, not {chosen}")
    if output is not None and output.exists() and not force:
        raise click.UsageError(f"{output} exists; give another --output, or --force to replace it")

    from marft_graph.graph import draw, page, picture
    from marft_graph.graph.compile import compile_graph
    from marft_graph.workflow import load_target

    loaded = load_target(target)
    flex_mg = compile_graph(
        loaded.graph, _examples_of(loaded, target) if dry_run else None, loaded.inputs
    )
    if loaded.settings and flex_mg.agents:
        flex_mg = _as_trained(flex_mg, loaded.settings)
    shown_run: dict[str, Any] = {}
    if run is not None:
        from marft_graph.run.overlay import overlays
        from marft_graph.run.report import timeline_section

        shown_run = {"overlays": overlays(flex_mg, run), "below": timeline_section(run)}
    if chosen == "png" and output is not None:
        picture.write_png(flex_mg, output)
        click.echo(f"wrote {output}")
        return
    writers: dict[str, Callable[[FlexMG], str]] = {
        "text": lambda graph: draw.summary(graph) + "\n",
        "mermaid": draw.to_mermaid,
        "dot": draw.to_dot,
        "svg": picture.to_svg,
        "html": lambda graph: page.to_html(graph, title=target, **shown_run),
        "json": lambda graph: json.dumps(graph.to_dict(), indent=2, ensure_ascii=False) + "\n",
    }
    text = writers[chosen](flex_mg)
    if output is None:
        click.echo(text, nl=False)
        return
    output.write_text(text, encoding="utf-8")
    click.echo(f"wrote {output}")


@main.command()
@click.argument("run", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.option("--merged", is_flag=True, help="Also write each base with its adapter merged in.")
@click.option(
    "--only-improved",
    metavar="WORKFLOW",
    help="Leave out adapters without which the team does not do worse on the workflow's held-out "
    "examples (the app's own models answer there, and are really asked).",
)
@click.option("--push", metavar="OWNER/NAME", help="Upload the folder to the Hugging Face hub.")
@click.option("--public", is_flag=True, help="--push: a new repository is public.")
def export(
    run: Path, out: Path, merged: bool, only_improved: str | None, push: str | None, public: bool
) -> None:
    """Write the adapters of RUN's newest checkpoint to the new folder OUT.

    With them go a manifest, a model card for each, the vLLM command and a compose file.
    """
    from marft_graph.deploy.export import export_run

    given: dict[str, Any] = {"merged": merged}
    if only_improved is not None:
        given |= _improved(run, only_improved)
    folder = export_run(run, out, **given)
    click.echo(f"adapters: {folder}\n\n{_usage(folder)}")
    if push is not None:
        from marft_graph.deploy.hub import push_to_hub

        click.echo(f"\npushed: {push_to_hub(folder, push, private=not public)}")


def _improved(run: Path, workflow: str) -> dict[str, Any]:
    """The nodes whose adapters improved the team, and the figures that say so."""
    import dataclasses
    import tempfile

    from marft_graph.deploy.export import export_run
    from marft_graph.deploy.manifest import read_manifest
    from marft_graph.deploy.prune import gain_of_each_adapter

    target, load_data, reward = _load_task(workflow)
    settings = dict(target.settings)
    dataset = _chosen_dataset(settings, None)
    held_out = _loaded(load_data, dataset, workflow)[1]
    if held_out is None:
        raise DatasetError(f"{workflow} has no held-out examples to evaluate on")
    with tempfile.TemporaryDirectory() as place:
        whole = export_run(run, Path(place) / "all")
        gains = gain_of_each_adapter(
            target.graph,
            whole,
            held_out,
            reward=reward,
            config=TrainConfig.from_mapping(settings),
            inputs=target.inputs,
        )
        nodes = read_manifest(whole).nodes
    for adapter, gain in gains.items():
        word = "kept" if gain.verdict == "better" else "left out"
        click.echo(
            f"{adapter}: {word}: with it {gain.verdict} ({gain.mean:+.3f}, 95 % interval "
            f"{gain.low:+.3f} to {gain.high:+.3f}, {gain.pairs} examples)"
        )
    kept = {adapter for adapter, gain in gains.items() if gain.verdict == "better"}
    figures = {
        adapter: dataclasses.asdict(gain) | {"verdict": gain.verdict}
        for adapter, gain in gains.items()
    }
    return {
        "nodes": [node for node, adapter in nodes.items() if adapter in kept],
        "metrics": {"gain_of_each_adapter": figures},
    }


def _as_trained(flex_mg: FlexMG, settings: dict[str, Any]) -> FlexMG:
    """The graph as a workflow's settings train it: frozen nodes, shared adapters."""
    from marft_graph.agents import adapters_of, agents_of

    config = TrainConfig.from_mapping({k: v for k, v in settings.items() if k != "dataset"})
    nodes = flex_mg.training(config.nodes).agents
    return flex_mg.training(nodes, adapters_of(agents_of(nodes, config)))


def _examples_of(workflow: Workflow, name: str) -> Any:
    if workflow.load_data is None:
        raise click.UsageError(
            f"--dry-run needs examples, and {name} has no task.py with load_data; in Python: "
            "compile_graph(graph, examples)"
        )
    return _loaded(workflow.load_data, workflow.settings.get("dataset"), name)[0]


def _format_of(output: Path | None) -> str:
    """The format that a file's name asks for; text where nothing does."""
    if output is None:
        return "text"
    found = [name for name, suffix in _SUFFIXES.items() if suffix == output.suffix.lower()]
    if not found:
        raise click.UsageError(
            f"cannot tell a format from {output.name!r}; give --format, or an end of "
            f"{', '.join(_SUFFIXES.values())}"
        )
    return found[0]


def _load_task(name: str) -> tuple[Workflow, Callable[..., Any], Callable[..., Any]]:
    """The workflow, and the two functions without which it cannot be run: data and reward.

    Raises:
        WorkflowError: it cannot be loaded, or lacks one of the two.
    """
    from marft_graph.workflow import load_target

    target = load_target(name)
    if target.load_data is None or target.reward is None:
        parts = {"load_data": target.load_data, "reward": target.reward}
        missing = " and no ".join(part for part, function in parts.items() if function is None)
        raise WorkflowError(
            f"{name} has no {missing}; this command needs a workflow folder whose task.py defines "
            "both (to train a graph of your own without one: marft_graph.Trainer)"
        )
    return target, target.load_data, target.reward


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


def _named_policies(adapters: tuple[str, ...], *, base: bool, own: bool) -> dict[str, str]:
    """What `eval` measures, by name, in the order of the table."""
    policies = {name: name for name, given in (("own", own), ("base", base)) if given}
    for text in adapters:
        name, equals, folder = text.partition("=")
        if not equals:
            path = Path(text).resolve()
            name, folder = (path.parent.name if path.name == "export" else path.name), text
        if name in policies:
            raise click.UsageError(f"two policies are called {name!r}; give --adapters NAME=DIR")
        policies[name] = folder
    if not policies:
        raise click.UsageError("give --adapters DIR, --base or --own")
    return policies


def _prices(given: tuple[str, ...]) -> dict[str, Price]:
    """`NAME=READ,WRITTEN` options as prices."""
    from marft_graph.comparison import Price

    found = {}
    for text in given:
        name, _, figures = text.partition("=")
        try:
            read, written = (float(figure) for figure in figures.split(","))
        except ValueError:
            raise click.UsageError(
                f"--price {text!r} is not NAME=READ,WRITTEN, as in own=0.15,0.60"
            ) from None
        found[name] = Price(read, written)
    return found


def _write_comparison(
    found: Comparison, json_file: Path | None, html_file: Path | None, into: Path | None
) -> None:
    """Print a comparison, and write it where it was asked for."""
    from marft_graph.run.comparison_page import COMPARISON, write_page
    from marft_graph.run.comparison_text import table
    from marft_graph.run.report import write_report
    from marft_graph.run.trajectories import to_json

    click.echo(table(found.to_dict()))
    text = to_json(found.to_dict()) + "\n"
    for path in filter(None, (json_file, into and into / COMPARISON)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        click.echo(f"wrote {path}")
    if html_file is not None:
        click.echo(f"wrote {write_page(json.loads(text), html_file)}")
    if into is not None:
        click.echo(f"wrote {write_report(into)}")


def _chosen_dataset(settings: dict[str, Any], given: str | None) -> str | None:
    """Take `dataset` out of the settings: it belongs to the workflow, not to `TrainConfig`."""
    configured = settings.pop("dataset", None)
    return configured if given is None else given


def _loaded(load_data: Callable[..., Any], dataset: str | None, workflow: str) -> tuple[Any, Any]:
    """Training and held-out examples; where no data set is named, the workflow's own choice.

    Raises:
        DatasetError: `load_data` refused, or returned something else than a pair.
    """
    asked = f"load_data({'' if dataset is None else repr(dataset)}) of {workflow}"
    try:
        loaded = load_data() if dataset is None else load_data(dataset)
    except (ValueError, OSError) as error:  # bad names and paths; other errors are bugs
        raise DatasetError(f"{asked}: {error}") from error
    if not isinstance(loaded, tuple) or len(loaded) != 2:
        raise DatasetError(
            f"{asked} returned a {type(loaded).__name__}; it must return a tuple of two data sets, "
            "to train on and held out (None where there is none)"
        )
    return loaded


def _print_result(result: TrainResult, workflow: str, dataset: str | None) -> None:
    if result.after is not None:
        rows = {
            "sampled": (result.before, result.after),
            "greedy": (result.before_greedy, result.after_greedy),
        }
        click.echo(f"Held-out return (mean ± standard error, {result.after.episodes} examples)")
        click.echo(f"  {'':8}  {'before':15}  after")
        for name, (before, after) in rows.items():
            click.echo(f"  {name:8}  {_shown(before):15}  {_shown(after)}")
        click.echo()
    data = "" if dataset is None else f" --dataset {shlex.quote(dataset)}"
    folder = shlex.quote(str(result.export))
    click.echo(
        f"report:   {result.report}\n"
        f"adapters: {result.export}\n\n"
        f"{_usage(result.export)}\n\n"
        "Measure them again:\n\n"
        f"    marft-graph eval {shlex.quote(workflow)} --adapters {folder}{data}"
    )


def _usage(folder: Path) -> str:
    return (
        "Use them in your app (`graph` is your LangGraph app, unchanged):\n\n"
        "    from marft_graph import bind\n"
        f"    app = bind(graph, {str(folder)!r})"
    )


def _shown(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "not measured"
    failed = f" ({evaluation.episodes_failed} failed)" if evaluation.episodes_failed else ""
    return f"{evaluation.return_mean:.3f} ± {evaluation.return_stderr:.3f}{failed}"
