"""Nodes that first ask their model while a run trains: what a run needs to train them from then on.

The run's other adapters, value heads and optimizers go on as they are; the new node begins with a
fresh adapter. A checkpoint is written at once, so that resume and export know it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from marft_graph.config import TrainConfig
from marft_graph.errors import CheckpointError, ConfigError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.learn.update import Learner
from marft_graph.policy.team import Team
from marft_graph.ranks import Ranks


def check_can_add(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse to add an agent where others would not hear of it.

    Raises:
        ConfigError: several processes train together, or Ray workers sample.
    """
    if ranks.count > 1 or config.rollout_workers:
        raise ConfigError(
            "new_nodes is 'train', and a new node showed up; with several processes or "
            "rollout_workers no agent can be added to a run. Name the node in `nodes`, or set "
            "new_nodes to 'freeze' or 'stop'"
        )


def agents_added(run_dir: str | Path | None, flex_mg: FlexMG) -> tuple[str, ...]:
    """Agents that an earlier part of a run has added, by its `graph.json`.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if run_dir is None:
        return ()
    path = Path(run_dir) / "graph.json"
    try:
        saved = FlexMG.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: {error!r}") from error
    known = {*flex_mg.agents, *flex_mg.frozen}
    return tuple(node for node in saved.agents if node not in known)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a team has learnt, while it is made anew."""

    folder: Path
    agents: Sequence[str]
    learner: Mapping[str, Tensor]
    rate_scale: float
    microbatch_tokens: int | None

    @classmethod
    def of(cls, team: Team, learner: Learner, run_dir: Path) -> Kept:
        """Take it down; adapters go to a folder of the run for the time."""
        folder = run_dir / ".kept-adapters"
        shutil.rmtree(folder, ignore_errors=True)
        for agent in team.agents:
            team.of(agent).save_adapter(agent, folder / agent)
        return cls(
            folder,
            tuple(team.agents),
            learner.state(),
            learner.rate_scale,
            learner.microbatch_tokens,
        )

    def put_back(self, team: Team, learner: Learner) -> None:
        """Give it to a team with more agents."""
        for agent in self.agents:
            team.of(agent).load_adapter(agent, self.folder / agent)
        learner.load_state({**learner.state(), **self.learner})
        learner.rate_scale = self.rate_scale
        learner.microbatch_tokens = self.microbatch_tokens
        shutil.rmtree(self.folder, ignore_errors=True)
