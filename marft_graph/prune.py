"""Which nodes are better for their adapter: each is taken out in turn, and the rest measured.

A node without an adapter keeps the app's own model, so that is what its adapter is measured
against: the whole team with it against the team without it, on the same examples and seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marft_graph.comparison import differences
from marft_graph.config import TrainConfig
from marft_graph.data import as_examples
from marft_graph.deploy.exported import exported_team
from marft_graph.deploy.manifest import read_manifest
from marft_graph.engine.routing import local_engine
from marft_graph.evaluation import held_out_episodes
from marft_graph.graph.compile import as_compiled
from marft_graph.rollout.inputs import AppInputs
from marft_graph.rollout.rewards import Rewards
from marft_graph.run.paired import PairedDifference


def gain_of_each_adapter(
    graph: Any,
    export_dir: str | Path,
    dataset: Any,
    *,
    reward: Rewards,
    config: TrainConfig,
    given: AppInputs,
) -> dict[str, PairedDifference]:
    """By adapter: the team's return with it, minus that with the app's own model in its nodes.

    Raises:
        ExportError, ModelError, DatasetError, EpisodesFailedError, RewardError: as in evaluation.
    """
    app = as_compiled(graph)
    manifest = read_manifest(export_dir)
    examples = as_examples(dataset, "dataset", config.eval_examples or None)
    team = exported_team(manifest, export_dir, device=config.device)
    engine = local_engine(team, config)
    settings = config.replace(**manifest.rollout)

    def episodes(nodes: list[str]) -> Any:
        return held_out_episodes(
            app,
            examples,
            engine=engine if nodes else None,
            nodes=nodes or list(manifest.nodes),
            adapters=manifest.nodes,
            reward=reward,
            config=settings,
            given=given,
        )

    try:
        whole = episodes(list(manifest.nodes))
        return {
            adapter: differences(
                episodes([node for node, own in manifest.nodes.items() if own != adapter]), whole
            )
            for adapter in manifest.adapters
        }
    finally:
        engine.close()
