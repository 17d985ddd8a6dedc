"""What a checkpoint holds of a run: weights, optimizers, and how far the run has come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from marft_graph.config import TrainConfig
from marft_graph.errors import CheckpointError
from marft_graph.learn.update import Learner
from marft_graph.policy.team import Team, Weights

_PLANS = "sampling.safetensors"


@dataclass(slots=True)
class RunState:
    """How far a run has come."""

    iteration: int = 0
    examples_taken: int = 0
    """Position in the training data."""
    rate_scale: float = 1.0
    """Share of the learning rates that is left after collapses."""
    recoveries: int = 0
    eval_return: float | None = None
    """Held-out return, sampled, of this very state, where it was measured."""
    best_iteration: int | None = None
    best_return: float | None = None
    evaluations_since_best: int = 0
    evaluated_iteration: int | None = None
    """The last one that `note_evaluation` has counted."""

    microbatch_tokens: int | None = None
    """Size that the learner found or fell back to; the same sizes give the same bits."""
    microbatch_settings: list[float | None] = field(default_factory=list)
    """`microbatch_tokens` and `memory_gib` of the settings that it belongs to."""

    def note_microbatches(self, config: TrainConfig, tokens: int | None) -> None:
        """Take down the size of micro-batches in use."""
        self.microbatch_tokens = tokens
        self.microbatch_settings = [config.microbatch_tokens, config.memory_gib]

    def microbatches(self, config: TrainConfig) -> int | None:
        """The size to go on with: what was in use, unless the user now says otherwise."""
        settings = [config.microbatch_tokens, config.memory_gib]
        is_same = self.microbatch_settings == settings
        return self.microbatch_tokens if is_same else config.microbatch_tokens

    def note_evaluation(self, eval_return: float) -> None:
        """Take the held-out return of the present iteration into account, measured again or not."""
        if self.iteration in (self.best_iteration, self.evaluated_iteration):
            return
        self.evaluated_iteration = self.iteration
        if self.best_return is None or eval_return > self.best_return:
            self.best_iteration, self.best_return = self.iteration, eval_return
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1


def write_state(
    folder: Path,
    team: Team,
    learner: Learner,
    state: RunState,
    plans: Mapping[int, Weights] | None = None,
) -> None:
    """Write adapters, value heads, optimizers and the run's state into a checkpoint's folder.

    `plans` has the older weights that are to sample coming iterations.
    """
    for agent in team.agents:
        team.of(agent).save_adapter(agent, folder / "adapters" / agent)
    save_file(learner.state(), folder / "learner.safetensors")
    text = json.dumps(dataclasses.asdict(state), indent=2)
    (folder / "state.json").write_text(text + "\n", encoding="utf-8")
    if plans:
        _write_plans(folder / _PLANS, team, plans)


def load_weights(folder: Path, team: Team, learner: Learner) -> None:
    """Put adapters, value heads and optimizers of a checkpoint back.

    Raises:
        ModelError: its adapters have another shape.
        CheckpointError: the learner's part cannot be read, or is of another learner.
    """
    for agent in team.agents:
        team.of(agent).load_adapter(agent, folder / "adapters" / agent)
    path = folder / "learner.safetensors"
    try:
        learner.load_state(load_file(path))
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        raise CheckpointError(f"cannot continue the learner from {path}: {error}") from error


def read_state(folder: Path) -> RunState:
    """The run's state in a checkpoint.

    Raises:
        CheckpointError: the file is missing or another version's.
    """
    path = folder / "state.json"
    try:
        state = RunState(**json.loads(path.read_text(encoding="utf-8")))
        counts = (state.iteration, state.examples_taken, state.recoveries)
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"not all of {counts} are counts")
        tokens = state.microbatch_tokens
        if tokens is not None and not (isinstance(tokens, int) and tokens > 0):
            raise ValueError(f"microbatch_tokens is {tokens!r}")
        return state
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"cannot read the run's state from {path} (did another version write it?): {error}"
        ) from error


def _write_plans(path: Path, team: Team, plans: Mapping[int, Weights]) -> None:
    """Older versions of all adapters, and which of them samples which iteration."""
    tensors = {
        f"{weights.version}/{agent}/{index}": (weights.values or {})[parameter].cpu().contiguous()
        for weights in plans.values()
        for agent in team.agents
        for index, parameter in enumerate(team.parameters(agent))
    }
    versions = {str(iteration): weights.version for iteration, weights in plans.items()}
    save_file(tensors, path, metadata={"versions": json.dumps(versions)})


def read_plans(folder: Path, team: Team) -> dict[int, Weights]:
    """Which weights are to sample coming iterations, as a checkpoint says; empty: none but its own.

    Raises:
        CheckpointError: the file cannot be read, or is of another team.
    """
    path = folder / _PLANS
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as saved:
            versions: dict[str, int] = json.loads(saved.metadata()["versions"])
            found = {
                version: Weights(
                    version,
                    {
                        parameter: saved.get_tensor(f"{version}/{agent}/{index}").to(parameter)
                        for agent in team.agents
                        for index, parameter in enumerate(team.parameters(agent))
                    },
                )
                for version in set(versions.values())
            }
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        raise CheckpointError(f"cannot read older weights from {path}: {error}") from error
    return {int(iteration): found[version] for iteration, version in versions.items()}
