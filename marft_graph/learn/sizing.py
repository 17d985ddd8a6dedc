"""How large micro-batches may be: found by running larger and larger ones under a memory limit.

Every size is run forward and backward on an iteration's own calls, and its peak is measured; the
next one is tried only where it should fit. Micro-batches change only the order of sums, so another
size gives the same update but for the last bits.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from marft_graph.episode import Call, Episode
from marft_graph.errors import ConfigError, OutOfMemoryError
from marft_graph.learn.batches import microbatches, score
from marft_graph.policy.rows import Row
from marft_graph.policy.team import Team
from marft_graph.ranks import Ranks

logger = logging.getLogger(__name__)

_GIB = 2**30
_MOST_TOKENS = 65_536
"""Larger micro-batches train no faster, on any device."""
_MARGIN = 0.1
"""Share of a limit that no micro-batch may use: batches of one size differ."""
_LEFT_FREE = 0.2
"""Share of the free memory that stays free where the user gives no limit."""


_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the machine has no memory left.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SIGNS)


class Memory(Protocol):
    """What the limit is about; all figures in bytes."""

    def used(self) -> int:
        """What this process uses now."""
        ...

    def free(self) -> int:
        """What it could use besides."""
        ...

    def peak_of(self, work: Callable[[], None]) -> int:
        """The most that the process used while some work ran."""
        ...


class HostMemory:
    """Resident memory of this process, as Linux counts it.

    Args:
        proc: the process's folder, and `meminfo` beside it.
        cgroups: where control groups are mounted.
    """

    def __init__(
        self, proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")
    ) -> None:
        self._proc = proc
        self._cgroups = cgroups

    def used(self) -> int:
        """Resident memory now."""
        return self._status("VmRSS")

    def free(self) -> int:
        """This process's share of what the machine, or a tighter control group, has left."""
        text = (self._proc.parent / "meminfo").read_text(encoding="ascii")
        left = [_kib(text, "MemAvailable"), *self._left_in_groups()]
        return min(left) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def peak_of(self, work: Callable[[], None]) -> int:
        """Peak resident memory."""
        (self._proc / "clear_refs").write_text("5", encoding="ascii")  # resets the peak
        work()
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        return _kib((self._proc / "status").read_text(encoding="ascii", errors="replace"), name)

    def _left_in_groups(self) -> Iterator[int]:
        """What the control groups (version 2, else 1) around this process leave, caches dropped."""
        for line in (self._proc / "cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            mount = self._cgroups / kinds
            names = ("memory.max", "memory.current", "inactive_file")
            if kinds:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            group = mount / path.lstrip("/")
            # In a container the path is often that of the host; the mount is the own group then.
            for folder in (group, *group.parents):
                yield from _left_in(folder, *names)
                if folder == mount:
                    break


class CudaMemory:
    """Memory of a CUDA device that torch has reserved for this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used(self) -> int:
        """Reserved memory that is not merely kept for later."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def free(self) -> int:
        """What the device has left."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])

    def peak_of(self, work: Callable[[], None]) -> int:
        """Most memory reserved."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        return torch.cuda.max_memory_reserved(self._device)


def memory_of(device: torch.device) -> Memory:
    """The memory that limits work on a device.

    Raises:
        ConfigError: it cannot be measured.
    """
    if device.type == "cuda":
        return CudaMemory(device)
    if device.type == "cpu" and os.access("/proc/self/clear_refs", os.W_OK):
        return HostMemory()
    raise ConfigError(
        f"microbatch_tokens is none, and memory of a {device.type} device cannot be measured here "
        "(it can with CUDA, and with a CPU under Linux); give a number such as 4096"
    )


def find_microbatch_tokens(
    team: Team,
    episodes: Sequence[Episode],
    memory: Memory,
    ranks: Ranks,
    *,
    memory_gib: float | None = None,
    is_entropy_learnt: bool = False,
    more: int = 0,
) -> int:
    """The largest micro-batch, in padded tokens, that keeps an update under a limit.

    A power of two, or the longest call's length where not even the next power of two fits.

    Args:
        team: whose adapters are to be updated; it stays as it is.
        episodes: of an iteration; failed ones are ignored.
        memory: what is limited.
        ranks: the processes that train together; all come to the same size.
        memory_gib: what the process may use in all; None: four fifths of what is free.
        is_entropy_learnt: whether the loss has an entropy term.
        more: bytes that the update will hold besides its passes.

    Raises:
        OutOfMemoryError: not even the longest call fits; the message says what it would take.
    """
    probes = [
        _Probe(team, agent, calls, is_entropy_learnt=is_entropy_learnt)
        for agent, calls in _longest_of_each_base(team, episodes)
    ]
    if not probes:
        raise OutOfMemoryError("there is no call yet to find the size of micro-batches with")
    base = memory.used()
    limit = base + (1 - _LEFT_FREE) * memory.free() if memory_gib is None else memory_gib * _GIB
    usable = (1 - _MARGIN) * limit - more
    size = max(probe.longest for probe in probes)
    refuse_what_cannot_fit(team, episodes, memory_gib=memory_gib)
    peak = _peak(memory, probes, size)
    if ranks.any(peak > usable):
        needed = f"{(peak + more) / (1 - _MARGIN) / _GIB:.2f} GiB. Set memory_gib to that or more"
        if peak == math.inf:
            needed = "more than there is. Free some"
        raise OutOfMemoryError(
            f"an update does not fit into {limit / _GIB:.2f} GiB (memory_gib): the process uses "
            f"{base / _GIB:.2f} GiB before it, and its longest call, of {size} tokens, takes it to "
            f"{needed}, or use gradient_checkpointing, a lower max_new_tokens or lora_rank, "
            "quantization, or a smaller base model"
        )
    most = min(_MOST_TOKENS, max(probe.tokens for probe in probes))
    while size < most:
        larger = 1 << size.bit_length()
        growth = max(probe.growth(size, larger) for probe in probes)
        if ranks.any(base + growth * max(0, peak - base) > usable):
            break
        peak = _peak(memory, probes, larger)
        if ranks.any(peak > usable):
            break
        size = larger
    logger.info(
        "microbatch_tokens=%d: measured under a limit of %.2f GiB, %.2f of them used before",
        size,
        limit / _GIB,
        base / _GIB,
    )
    return size


def refuse_what_cannot_fit(
    team: Team, episodes: Sequence[Episode], *, memory_gib: float | None = None
) -> None:
    """Refuse an update whose longest call alone needs more memory than there is.

    By an estimate, for on a CPU nothing is left of a process that really tries.

    Raises:
        OutOfMemoryError: with the node, its tokens, and what they need.
    """
    calls = [call for episode in episodes if episode.ok for call in episode.calls]
    for policy in team.policies:
        own = [call for call in calls if call.agent in policy.agents]
        longest = max(own, key=_tokens, default=None)
        if longest is None or policy.is_sharded:
            continue
        try:
            memory = memory_of(policy.device)
        except ConfigError:  # not where it can be measured
            continue
        needed, left = policy.pass_bytes(_tokens(longest)), memory.free()
        if memory_gib is not None:
            left = min(left, int(memory_gib * _GIB) - memory.used())
        if needed > left:
            raise OutOfMemoryError(
                f"node {longest.node!r} has a call of {_tokens(longest)} tokens, and an update of "
                f"that call alone needs about {needed / _GIB:.2f} GiB, where {left / _GIB:.2f} are "
                "left. Nothing was changed: shorten what the node is asked, lower max_new_tokens "
                "or lora_rank, raise memory_gib, or use quantization or a smaller base model"
            )


def _tokens(call: Call) -> int:
    return len(call.prompt_ids) + len(call.completion_ids)


@dataclass(frozen=True, slots=True)
class _Probe:
    """Forward and backward passes of one agent's calls, as an update makes them."""

    team: Team
    agent: str
    calls: Sequence[Call]
    is_entropy_learnt: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest call."""
        return max(len(call.prompt_ids) + len(call.completion_ids) for call in self.calls)

    @property
    def tokens(self) -> int:
        """Tokens of all calls."""
        return sum(len(call.prompt_ids) + len(call.completion_ids) for call in self.calls)

    def growth(self, size: int, larger: int) -> float:
        """How many times as much memory a larger micro-batch may need.

        It grows with the tokens, but for a base that takes no `segments`: there the masks of shared
        rows grow with the square of their length.
        """
        if self.team.of(self.agent).reads_segments:
            return larger / size
        small, large = self._rows(size), self._rows(larger)
        pairs = [len(rows) * rows[0].length ** 2 for rows in (small, large)]
        return max(larger / size, pairs[1] / pairs[0])

    def run(self, size: int) -> None:
        """Run a full micro-batch of a size; gradients are thrown away."""
        policy = self.team.of(self.agent)
        try:
            with policy.using(self.agent):
                _, logprobs_N, entropy_N = score(
                    policy, self.calls, self._rows(size), is_entropy_learnt=self.is_entropy_learnt
                )
                loss: Tensor = logprobs_N.sum() + entropy_N.sum()
                torch.autograd.backward(loss)
        finally:
            for parameter in self.team.parameters(self.agent):
                parameter.grad = None

    def _rows(self, size: int) -> list[Row]:
        """The longest rows, as often as they fit into a micro-batch."""
        quadratic = self.team.of(self.agent).attention_cost
        policy = self.team.of(self.agent)
        rows = next(
            microbatches(
                self.calls, size, quadratic=quadratic, longest_row=policy.longest_shared_row
            )
        )
        count = max(1, size // rows[0].length)
        return [rows[place % len(rows)] for place in range(count)]


def _peak(memory: Memory, probes: Sequence[_Probe], size: int) -> float:
    """Peak in bytes of a micro-batch of a size; infinity where there is not that much."""
    gc.collect()
    try:
        return max(memory.peak_of(functools.partial(probe.run, size)) for probe in probes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return math.inf


def _longest_of_each_base(
    team: Team, episodes: Sequence[Episode]
) -> Iterator[tuple[str, list[Call]]]:
    """Of each base's agents the one with the longest call, and its calls."""
    calls: dict[str, list[Call]] = {}
    for call in (call for episode in episodes if episode.ok for call in episode.calls):
        calls.setdefault(call.agent, []).append(call)
    for policy in team.policies:
        own = [agent for agent in policy.agents if agent in calls]
        if own:
            agent = max(
                own,
                key=lambda a: max(len(c.prompt_ids) + len(c.completion_ids) for c in calls[a]),
            )
            yield agent, calls[agent]


def _kib(text: str, name: str) -> int:
    """The bytes of a `name: 123 kB` line."""
    line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _left_in(folder: Path, most: str, now: str, cache: str) -> Iterator[int]:
    """What one control group has left, if it limits memory."""
    try:
        limit = (folder / most).read_text(encoding="ascii").strip()
        used = int((folder / now).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii")
    except OSError:  # not there: it has no such limit
        return
    if limit != "max":
        pages = dict(line.split() for line in stat.splitlines())
        yield max(0, int(limit) - used + int(pages.get(cache, 0)))
