"""Held-out returns: what an evaluation is, and how an export folder is measured.

The trainer and `evaluate_export` share seeds and summary, so that both give the same figures for
the same adapters. Trains and writes nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marft_graph.config import TrainConfig, rollout_settings
from marft_graph.data import as_examples
from marft_graph.deploy.exported import exported_team
from marft_graph.deploy.manifest import read_manifest
from marft_graph.engine.base import Engine
from marft_graph.engine.routing import local_engine
from marft_graph.episode import Episode
from marft_graph.errors import EpisodesFailedError, ExportError, UnknownNodeError
from marft_graph.graph.compile import as_compiled, compile_graph
from marft_graph.graph.flex_mg import resolve_nodes
from marft_graph.names import agent_path
from marft_graph.rollout.episodes import Rollout
from marft_graph.rollout.inputs import AppInputs, InputFunction, Reviewer
from marft_graph.rollout.rewards import Rewards

EVAL_SEED = 2**31 - 1
"""Every evaluation samples with it, so that evaluations of a run compare like with like."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Returns of the current policy on held-out examples."""

    return_mean: float
    return_stderr: float
    """Standard error of the mean: an example counts once, however many episodes it had."""
    returns: tuple[float, ...] = field(repr=False)
    episodes: int
    """Episodes started; failed ones have no return."""
    episodes_failed: int
    failed_by_reason: Mapping[str, int]
    greedy: bool


def summarize(episodes: Sequence[Episode], *, greedy: bool) -> Evaluation:
    """Mean return over the episodes that did not fail, and what failed."""
    returns = tuple(episode.total_reward for episode in episodes if episode.ok)
    if not returns:
        raise EpisodesFailedError(
            f"all {len(episodes)} evaluation episodes failed; the first: {episodes[0].error}"
        )
    by_example: dict[int, list[float]] = {}
    for episode in episodes:
        if episode.ok:
            by_example.setdefault(episode.example_index, []).append(episode.total_reward)
    return Evaluation(
        return_mean=statistics.fmean(returns),
        return_stderr=standard_error(list(by_example.values())),
        returns=returns,
        episodes=len(episodes),
        episodes_failed=len(episodes) - len(returns),
        failed_by_reason=failure_reasons(episodes),
        greedy=greedy,
    )


def standard_error(clusters: Sequence[Sequence[float]]) -> float:
    """Standard error of the mean over all values, those of one cluster being dependent.

    With e the deviations from the mean, G clusters and N values::

        sqrt(G / (G - 1) * sum over clusters of (sum of e)^2) / N

    (Cameron and Miller 2015, eq. 11, for a mean). Clusters of one value give stdev / sqrt(N), those
    of one size the standard error of their means. 0 for fewer than two clusters.

    >>> standard_error([[0.0], [1.0]]), standard_error([[0.0, 0.0], [1.0, 1.0]])
    (0.5, 0.5)
    """
    values = [value for cluster in clusters for value in cluster]
    if len(clusters) < 2:
        return 0.0
    mean = statistics.fmean(values)
    squares = [math.fsum(value - mean for value in cluster) ** 2 for cluster in clusters]
    count = len(clusters)
    return math.sqrt(count / (count - 1) * math.fsum(squares)) / len(values)


def failure_reasons(episodes: Sequence[Episode]) -> dict[str, int]:
    """How many episodes failed for each reason, the most frequent first."""
    counts = Counter(e.status.removeprefix("failed: ") for e in episodes if not e.ok)
    return dict(counts.most_common())


def failed_nodes(episodes: Sequence[Episode]) -> dict[str, int]:
    """How many episodes failed in each node, as far as an exception left one."""
    counts = Counter(agent_path(e.failed_node) for e in episodes if not e.ok and e.failed_node)
    return dict(counts.most_common())


def evaluate_export(
    graph: Any,
    export_dir: str | Path,
    dataset: Any,
    *,
    reward: Rewards,
    config: TrainConfig,
    inputs: InputFunction | None = None,
    context: Any = None,
    configurable: Any = None,
    store: Any = None,
    on_interrupt: Reviewer | None = None,
    greedy: bool = False,
    base_model: str | None = None,
) -> Evaluation:
    """Run exported adapters once on each of the first `config.eval_examples` examples (0: all).

    The app is called as in training (`inputs`, `context`, `configurable`, `store`,
    `on_interrupt`). Of `config` only the rollout's settings count; base model, precision and
    `max_new_tokens` are those of the export, unless `base_model` says where the base is now.

    Raises:
        ExportError: the folder is no intact export, or was made from another graph.
        ModelError, DatasetError, EpisodesFailedError, RewardError: as in training.
    """
    episodes = export_episodes(
        graph,
        export_dir,
        dataset,
        reward=reward,
        config=config,
        given=AppInputs(
            inputs=inputs,
            context=context,
            configurable=configurable,
            store=store,
            on_interrupt=on_interrupt,
        ),
        greedy=greedy,
        base_model=base_model,
    )
    return summarize(episodes, greedy=greedy)


def export_episodes(
    graph: Any,
    export_dir: str | Path,
    dataset: Any,
    *,
    reward: Rewards,
    config: TrainConfig,
    given: AppInputs,
    frozen: Sequence[str] = (),
    greedy: bool = False,
    group_size: int = 1,
    base_model: str | None = None,
) -> list[Episode]:
    """The episodes that `evaluate_export` sums up, `group_size` of each example.

    `frozen` names more nodes whose own models answer on purpose.

    Raises:
        As `evaluate_export`.
    """
    app = as_compiled(graph)
    manifest = read_manifest(export_dir)
    try:
        nodes = resolve_nodes(compile_graph(app), tuple(manifest.nodes), found_before=True)
    except UnknownNodeError as error:
        raise ExportError(f"{export_dir} was exported from another graph: {error}") from error
    team = exported_team(manifest, export_dir, device=config.device, base_model=base_model)
    engine = local_engine(team, config)
    settings = config.replace(**manifest.rollout)
    try:
        return held_out_episodes(
            app,
            as_examples(dataset, "dataset", config.eval_examples or None),
            engine=engine,
            nodes=nodes,
            adapters=manifest.nodes,
            frozen=(*manifest.frozen, *frozen),
            reward=reward,
            config=settings,
            given=given,
            greedy=greedy,
            group_size=group_size,
        )
    finally:
        engine.close()


def held_out_episodes(
    app: Any,
    examples: Sequence[Mapping[str, Any]],
    *,
    engine: Engine | None,
    nodes: Sequence[str],
    reward: Rewards,
    config: TrainConfig,
    given: AppInputs,
    adapters: Mapping[str, str] | None = None,
    frozen: Sequence[str] = (),
    greedy: bool = False,
    group_size: int = 1,
) -> list[Episode]:
    """Episodes of the first `config.eval_examples` examples, with the seeds of every evaluation."""
    count = min(config.eval_examples or len(examples), len(examples))
    rollout = Rollout(
        graph=app,
        engine=engine,
        reward=reward,
        nodes=nodes,
        adapters=adapters or {},
        frozen=frozen,
        given=given,
        settings=rollout_settings(config, greedy=greedy),
    )
    return rollout.run([examples[i] for i in range(count)], seed=EVAL_SEED, group_size=group_size)
