"""`marft-graph export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from marft_graph.cli.group import main
from marft_graph.cli.tasks import FOLDER, chosen_dataset, load_task, loaded, usage
from marft_graph.config import TrainConfig
from marft_graph.errors import DatasetError


@main.command()
@click.argument("run", type=FOLDER)
@click.argument("out", type=FOLDER)
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
    from marft_graph.deploy.manifest import read_manifest

    given: dict[str, Any] = {"merged": merged}
    if only_improved is not None:
        given |= _improved(run, only_improved)
    folder = export_run(run, out, **given)
    commands = "\n".join(f"    {command}" for command in read_manifest(folder).serve)
    click.echo(
        f"adapters: {folder}\n\n{usage(folder)}\n\n"
        f"or serve them, each under its own model name:\n\n{commands}\n\n"
        "and let the app ask that server:\n\n"
        f"    app = bind(graph, {str(folder)!r}, base_url='http://localhost:8000/v1')"
    )
    if push is not None:
        from marft_graph.deploy.hub import push_to_hub

        click.echo(f"\npushed: {push_to_hub(folder, push, private=not public)}")


def _improved(run: Path, workflow: str) -> dict[str, Any]:
    """The nodes whose adapters improved the team, and the figures that say so."""
    import dataclasses
    import tempfile

    from marft_graph.deploy.export import export_run
    from marft_graph.deploy.manifest import read_manifest
    from marft_graph.prune import gain_of_each_adapter
    from marft_graph.rollout.inputs import AppInputs

    target, load_data, reward = load_task(workflow)
    settings = dict(target.settings)
    dataset = chosen_dataset(settings, None)
    held_out = loaded(load_data, dataset, workflow)[1]
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
            given=AppInputs(**target.parts()),
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
