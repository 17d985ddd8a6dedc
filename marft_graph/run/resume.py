"""Whether a run may go on: the same graph, base and settings, or changes that the user accepts.

Reads what the run folder says of the run; weights and optimizers are `state`'s business.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from marft_graph.config import TrainConfig, read_yaml
from marft_graph.errors import CheckpointError, ConfigError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.policy.fingerprint import differing
from marft_graph.run.folder import read_base_files

logger = logging.getLogger(__name__)

GRAPH = "graph"
"""What `accept_changes` calls a change of the graph."""
BASE = "base_model"
"""What it calls a change of a base model, in name or in content."""
# Settings that may differ when a run is continued: they change no iteration's mathematics.
_FREE = frozenset(
    {
        "iterations",
        "new_nodes",
        "eval_every",
        "eval_examples",
        "checkpoint_every",
        "keep_checkpoints",
        "stop_timeout",
        "device",
        "cache_gib",
        "cpu_threads",
        "memory_gib",
        "engine_urls",
        "engine_timeout",
        "engine_patience",
        "vllm_python",
        "vllm_args",
        "rollout_workers",
        "ray_address",
        "worker_gpus",
        "reward_concurrency",
        "max_recoveries",
        "early_stop",
        "load_best",
        "trackers",
        "tracker_project",
    }
)


def check_accepted(names: Collection[str]) -> None:
    """Refuse names that are no settings.

    Raises:
        ConfigError: names the first one.
    """
    known = {spec.name for spec in dataclasses.fields(TrainConfig)} | {GRAPH}
    for name in names:
        if name not in known:
            raise ConfigError(f"accept_changes: {name!r} is no setting; it may also be {GRAPH!r}")


def check_same_run(
    run_dir: Path,
    config: TrainConfig,
    flex_mg: FlexMG,
    base_files: Mapping[str, Mapping[str, str]],
    accepted: Collection[str] = (),
) -> None:
    """Refuse to continue a run with a graph, base or settings that change its mathematics.

    Args:
        run_dir: folder of the run.
        config: settings to go on with.
        flex_mg: graph to go on with.
        base_files: `fingerprint` of each base model to go on with. A run that recorded none
            may go on.
        accepted: settings that may change all the same, and `graph`. `base_model` stands for what
            is in the bases' files too.

    Raises:
        ConfigError: a setting differs; the message has both values of each.
        CheckpointError: the graph or a base's files differ, and how; or the run's own files
            cannot be read.
    """
    saved = read_yaml(run_dir / "config.yaml")
    free = _FREE | set(accepted)
    if config.learning_rate_schedule != "constant" and "iterations" not in accepted:
        free -= {"iterations"}  # it shapes the schedule
    # Settings that the run's version did not have yet had no effect: it ran as with the default.
    defaults = TrainConfig(base_model="-").to_dict()
    changed = {
        name: (before, value)
        for name, value in config.to_dict().items()
        if (before := saved.get(name, defaults[name])) != value
    }
    refused = {name: change for name, change in changed.items() if name not in free}
    if refused:
        lines = ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in refused.items())
        raise ConfigError(
            f"cannot resume {run_dir} with other settings: {lines} (to go on with them all the "
            f"same: accept_changes, here {' '.join(refused)})"
        )
    for name in changed.keys() & set(accepted):
        logger.warning("going on with another %s: %r -> %r", name, *changed[name])
    _check_same_graph(run_dir, flex_mg, accepted)
    _check_same_bases(run_dir, base_files, accepted)


def _check_same_graph(run_dir: Path, flex_mg: FlexMG, accepted: Collection[str]) -> None:
    try:
        graph = FlexMG.from_dict(json.loads((run_dir / "graph.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {run_dir / 'graph.json'}: {error!r}") from error
    differences = graph.difference(flex_mg)
    if differences and GRAPH not in accepted:
        raise CheckpointError(
            f"{run_dir} trained another graph: {'; '.join(differences)} (to go on with it all the "
            f"same: accept_changes, here {GRAPH})"
        )
    if differences:
        logger.warning("going on with another graph: %s", "; ".join(differences))


def _check_same_bases(
    run_dir: Path, base_files: Mapping[str, Mapping[str, str]], accepted: Collection[str]
) -> None:
    """Compare what stands under the bases' names now with what stood there."""
    before = read_base_files(run_dir)
    changed = {
        base: names
        for base, files in base_files.items()
        if (names := differing(before.get(base, {}), files))
    }
    text = "; ".join(f"{base} has another {', '.join(names)}" for base, names in changed.items())
    if changed and BASE not in accepted:
        raise CheckpointError(
            f"{run_dir} trained on another base model: {text} (put the old files back, or to go on "
            f"all the same: accept_changes, here {BASE})"
        )
    if changed:
        logger.warning("going on with another base model: %s", text)
