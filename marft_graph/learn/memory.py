"""An update within memory: micro-batches of a size that fits, or smaller ones where it did not.

Micro-batches change only the order of sums, so a smaller one gives the same update but for
rounding. An update that runs out of memory, in any of the processes that train together, is tried
again from its start by all of them. Knows nothing of what an
update does.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marft_graph.config import MICROBATCH_TOKENS
from marft_graph.episode import Episode
from marft_graph.errors import CheckpointError, MarftError, OutOfMemoryError
from marft_graph.learn.sizing import HostMemory, is_out_of_memory
from marft_graph.learn.update import AgentStats, Learner
from marft_graph.policy.team import Team

logger = logging.getLogger(__name__)

_COPIED_SHARE = 0.1
"""Of the free memory: weights and moments that need no more are copied, larger ones written."""
_BEFORE = "before.safetensors"


def update_within_memory(
    learner: Learner, team: Team, episodes: Sequence[Episode], iteration: int
) -> dict[str, AgentStats]:
    """`learner.update`, with half of `microbatch_tokens` each time it runs out of memory.

    Where `microbatch_tokens` is None, the largest that fits is found first. What was found, or the
    smaller size, stays for later updates.

    Raises:
        CheckpointError: the disk for temporary files is full.
        OutOfMemoryError: not even single calls fit, by an estimate or when tried; the team is as
            it was before the update.
    """
    if learner.microbatch_tokens is None and any(e.calls for e in episodes if e.ok):
        learner.find_microbatch_tokens(episodes)
    learner.refuse_what_cannot_fit(episodes)
    with contextlib.closing(_Snapshot(learner, team)) as before:
        while True:
            try:
                with learner.ranks.agreed(is_out_of_memory):
                    return learner.update(episodes, iteration)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, MarftError) or not is_out_of_memory(error):
                    raise
                if learner.ranks.sharding is not None:
                    raise OutOfMemoryError(
                        f"the update of iteration {iteration} ran out of memory: {error}. The base "
                        "is divided among processes, which cannot try it again together: set "
                        f"microbatch_tokens below {learner.microbatch_tokens}"
                    ) from error
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


def _free_memory() -> int:
    """Bytes that this machine has left for this process; 0 where it does not say."""
    try:
        return HostMemory().free()
    except (OSError, ValueError, LookupError):
        return 0


class _Snapshot:
    """Weights and moments as they were: copied where they are small, else in a temporary file."""

    def __init__(self, learner: Learner, team: Team) -> None:
        weights = {
            f"weights/{agent}/{index}": parameter.detach().cpu().contiguous()
            for agent in team.agents
            for index, parameter in enumerate(team.parameters(agent))
        }
        state = {f"learner/{name}": value for name, value in learner.state().items()}
        now = weights | state
        self._copies: dict[str, Tensor] = {}
        self._folder: Path | None = None
        if sum(value.nbytes for value in now.values()) <= _COPIED_SHARE * _free_memory():
            self._copies = {name: value.clone() for name, value in now.items()}
            return
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="marft-update-"))
            save_file(now, self._folder / _BEFORE)
        except (OSError, SafetensorError) as error:
            self.close()
            raise CheckpointError(
                f"cannot write {self._folder or tempfile.gettempdir()}: {error}"
            ) from error

    def close(self) -> None:
        """Delete the file, if there is one."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @torch.no_grad()
    def put_back(self, learner: Learner, team: Team) -> None:
        # Fresh tensors each time: the optimizers keep those that they are given.
        if self._folder is None:
            saved = {name: value.clone() for name, value in self._copies.items()}
        else:
            saved = load_file(self._folder / _BEFORE)
        for agent in team.agents:
            for index, parameter in enumerate(team.parameters(agent)):
                parameter.copy_(saved[f"weights/{agent}/{index}"])
        learner.load_state(
            {k.removeprefix("learner/"): v for k, v in saved.items() if k.startswith("learner/")}
        )
