"""`marft-graph eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from marft_graph.cli.group import main
from marft_graph.cli.settings import merged_settings
from marft_graph.cli.tasks import FILE, FOLDER, chosen_dataset, load_task, loaded, shown
from marft_graph.config import TrainConfig
from marft_graph.errors import DatasetError

if TYPE_CHECKING:
    from marft_graph.comparison import Comparison, Price


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
@click.option("--json", "json_file", type=FILE, help="Write the comparison to this file.")
@click.option("--html", "html_file", type=FILE, help="Write it as a page.")
@click.option("--into", type=FOLDER, help="Put it into the report of this run folder.")
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
    target, load_data, reward = load_task(workflow)
    options = {"eval_examples": examples, "device": device}
    settings = merged_settings(target.settings, config_file=None, options=options)
    dataset = chosen_dataset(settings, dataset)
    config = TrainConfig.from_mapping(settings)
    held_out = loaded(load_data, dataset, workflow)[1]
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
            **target.parts(),
            against=against,
            prices=_prices(prices),
            episodes_per_example=repeat,
            greedy=bool(greedy),
            base_model=base_model,
        )
        _write_comparison(found, json_file, html_file, into)
        return

    from marft_graph.evaluation import export_episodes, summarize
    from marft_graph.rollout.inputs import AppInputs

    for choice in (False, True) if greedy is None else (greedy,):
        episodes = export_episodes(
            target.graph,
            next(iter(policies.values())),
            held_out,
            reward=reward,
            config=config,
            given=AppInputs(**target.parts()),
            greedy=choice,
            group_size=repeat,
            base_model=base_model,
        )
        evaluation = summarize(episodes, greedy=choice)
        name = "greedy" if choice else "sampled"
        click.echo(f"held-out return, {name}: {shown(evaluation)}, {evaluation.episodes} examples")


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
