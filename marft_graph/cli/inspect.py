"""`marft-graph inspect`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marft_graph.cli.group import main
from marft_graph.cli.tasks import FILE, FOLDER, loaded
from marft_graph.config import TrainConfig

if TYPE_CHECKING:
    from marft_graph.graph.flex_mg import FlexMG
    from marft_graph.workflow import Workflow

_WITH_RUN = ("text", "html", "json")
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


@main.command()
@click.argument("target", required=False)
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(_SUFFIXES)),
    help="What to show.  [default: text, or what the end of --output says]",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--run",
    type=FOLDER,
    help="Show also what happened in this run folder: what became of each node's calls; html: its "
    "curves. TARGET may be left out then.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Run a workflow folder's app on 8 examples with scripted answers first: finds agents that "
    "the code does not show, and counts calls. Its tools and other nodes do run.",
)
@click.option("--output", type=FILE, help="Write to this file instead of the terminal.")
@click.option("--force", is_flag=True, help="Replace the output file if there is one.")
def inspect(
    target: str | None,
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
    if run is not None and chosen not in _WITH_RUN:
        raise click.UsageError(f"--run goes with --format {', '.join(_WITH_RUN)}, not {chosen}")
    if target is None and (run is None or dry_run):
        raise click.UsageError("Missing argument 'TARGET'.")
    if output is not None and output.exists() and not force:
        raise click.UsageError(f"{output} exists; give another --output, or --force to replace it")

    from marft_graph.graph import draw, page, picture

    flex_mg = _observed(_graph_of(target, run, dry_run=dry_run), run)
    told = _Run(run, flex_mg)
    if chosen == "png" and output is not None:
        picture.write_png(flex_mg, output)
        click.echo(f"wrote {output}")
        return
    writers: dict[str, Callable[[FlexMG], str]] = {
        "text": lambda graph: draw.summary(graph) + "\n" + told.text,
        "mermaid": draw.to_mermaid,
        "dot": draw.to_dot,
        "svg": picture.to_svg,
        "html": lambda graph: page.to_html(graph, title=target or str(run), **told.html),
        "json": lambda graph: (
            json.dumps(graph.to_dict() | told.values, indent=2, ensure_ascii=False) + "\n"
        ),
    }
    text = writers[chosen](flex_mg)
    if output is None:
        click.echo(text, nl=False)
        return
    output.write_text(text, encoding="utf-8")
    click.echo(f"wrote {output}")


def _graph_of(target: str | None, run: Path | None, *, dry_run: bool) -> FlexMG:
    """The graph of a target, as its settings train it; without a target, that of a run."""
    if target is None:
        from marft_graph.run.folder import read_graph

        assert run is not None  # one of the two is there
        return read_graph(run)
    from marft_graph.graph.compile import as_compiled, compile_graph
    from marft_graph.rollout.labels import labels_of
    from marft_graph.rollout.rewards import as_reward_function
    from marft_graph.workflow import load_target

    loaded = load_target(target)
    flex_mg = compile_graph(
        loaded.graph, _examples_of(loaded, target) if dry_run else None, **loaded.parts()
    )
    if loaded.settings and flex_mg.agents:
        flex_mg = _as_trained(flex_mg, loaded.settings)
    if loaded.reward is None or loaded.inputs is not None:
        return flex_mg
    labels = labels_of(as_compiled(loaded.graph), as_reward_function(loaded.reward))
    return dataclasses.replace(flex_mg, notes=(*flex_mg.notes, *labels.told()))


def _observed(flex_mg: FlexMG, run: Path | None) -> FlexMG:
    """The graph with what the newest episodes of a run show of who reads what."""
    if run is None:
        return flex_mg
    from marft_graph.episode import observations
    from marft_graph.run.overlay import newest_episodes

    return flex_mg.observed(observations(newest_episodes(run)))


class _Run:
    """What a run folder adds to what is shown; nothing where none is given."""

    def __init__(self, run: Path | None, flex_mg: FlexMG) -> None:
        self.text = ""
        self.html: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        if run is None:
            return
        from marft_graph.run.fates import fates_dict, fates_section, fates_text
        from marft_graph.run.folder import read_graph
        from marft_graph.run.overlay import overlays
        from marft_graph.run.report import timeline_section
        from marft_graph.run.tracking import read_metrics

        trained, rows = read_graph(run).agents, read_metrics(run)
        said = (
            fates_text(rows, trained) or "this run's metrics do not tell what became of its calls"
        )
        self.text = f"\n{said}\n"
        self.html = {
            "overlays": overlays(flex_mg, run),
            "below": fates_section(rows, trained) + timeline_section(run),
        }
        self.values = {"fates": fates_dict(rows)}


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
    return loaded(workflow.load_data, workflow.settings.get("dataset"), name)[0]


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
