"""An update within memory: micro-batches of a size that fits, or smaller ones where it did not.

Micro-batches change only the order of sums, so a smaller one gives the same update but for
rounding. An update that runs out of memory is tried again from its start. Knows nothing of what an
update does.
"""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from marft_graph.config import MICROBATCH_TOKENS
from marft_graph.episode import Episode
from marft_graph.errors import CheckpointError, OutOfMemoryError
from marft_graph.learn.sizing import is_out_of_memory
from marft_graph.learn.update import AgentStats, Learner
from marft_graph.policy.team import Team

logger = logging.getLogger(__name__)


def update_within_memory(
    learner: Learner, team: Team, episodes: Sequence[Episode], iteration: int
) -> dict[str, AgentStats]:
    """`learner.update`, with half of `microbatch_tokens` each time it runs out of memory.

    Where `microbatch_tokens` is None, the largest that fits is found first. What was found, or the
    smaller size, stays for later updates.

    Raises:
        CheckpointError: the disk for temporary files is full.
        OutOfMemoryError: not even single calls fit; the team is as it was before the update.
    """
    if learner.microbatch_tokens is None and any(e.calls for e in episodes if e.ok):
        learner.find_microbatch_tokens(episodes)
    with tempfile.TemporaryDirectory(prefix="marft-update-") as folder:
        before = _Snapshot(Path(folder), learner, team)
        while True:
            try:
                return learner.update(episodes, iteration)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error).strip().partition("\n")[0] or type(error).__name__
            # Outside the handler: its traceback holds the tensors that must go first.
            before.put_back(learner, team)
            _release(learner)
            _halve(learner, episodes, iteration, problem)


def _halve(learner: Learner, episodes: Sequence[Episode], iteration: int, problem: str) -> None:
    tokens = learner.microbatch_tokens or MICROBATCH_TOKENS
    longest = max(
        (len(c.prompt_ids) + len(c.completion_ids) for e in episodes if e.ok for c in e.calls),
        default=1,
    )
    if tokens <= 1 or tokens < longest:
        raise OutOfMemoryError(
            f"the update of iteration {iteration} has no memory left even for one call at a time "
            f"(the longest has {longest} tokens): {problem}. Use gradient_checkpointing, a lower "
            "max_new_tokens or lora_rank, quantization, or a smaller base model"
        )
    learner.microbatch_tokens = tokens // 2
    learner.out_of_memory += 1
    logger.warning(
        "the update of iteration %d ran out of memory (%s); trying again with microbatch_tokens=%d",
        iteration,
        problem,
        tokens // 2,
    )


def _release(learner: Learner) -> None:
    for optimizer in (*learner.optimizers.values(), *learner.critic_optimizers.values()):
        optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Snapshot:
    """Weights and moments in a temporary file: memory is what may be short."""

    def __init__(self, folder: Path, learner: Learner, team: Team) -> None:
        self._path = folder / "before.safetensors"
        weights = {
            f"weights/{agent}/{index}": parameter.detach().cpu().contiguous()
            for agent in team.agents
            for index, parameter in enumerate(team.parameters(agent))
        }
        state = {f"learner/{name}": value for name, value in learner.state().items()}
        try:
            save_file(weights | state, self._path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write {self._path}: {error}") from error

    @torch.no_grad()
    def put_back(self, learner: Learner, team: Team) -> None:
        saved = load_file(self._path)
        for agent in team.agents:
            for index, parameter in enumerate(team.parameters(agent)):
                parameter.copy_(saved[f"weights/{agent}/{index}"])
        learner.load_state(
            {k.removeprefix("learner/"): v for k, v in saved.items() if k.startswith("learner/")}
        )
