"""Processes that train together, as `accelerate launch` starts them: data parallelism.

Every process has the models, or with FSDP a part of their layers, and comes to the same decisions.
Each runs a share of the episodes and of every step's calls; episodes are exchanged, gradients added
up. One process is the same with nothing to exchange.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
    patch_environment,
)
from torch import Tensor, nn

from marft_graph.config import TrainConfig
from marft_graph.errors import CheckpointError, ConfigError, DistributedError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, who may have the longer episodes."""


_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_OTHERS = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""What accelerate can also be told to use, by the variable that tells it."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How accelerate's settings divide the frozen base among the processes (by FSDP2)."""

    device: torch.device
    """Where this process computes."""
    count: int
    """Processes."""
    is_resharded: bool
    """Whether a layer's weights go again once it has run forward (`fsdp_reshard_after_forward`)."""
    is_offloaded: bool
    """Whether a process keeps its part in host memory (`fsdp_offload_params`, or DeepSpeed's
    `offload_param_device`)."""


_WELL, _SHORT, _FAILED = range(3)
"""What a process says of itself: well, out of memory, failed otherwise."""


class _OtherFailed(Exception):
    """Another process has said that it failed."""

    def __init__(self, problem: str, *, is_memory: bool) -> None:
        super().__init__(problem)
        self.is_memory = is_memory

    def seen_here(self) -> Exception:
        """The error that this process raises for it."""
        return MemoryError(str(self)) if self.is_memory else DistributedError(str(self))


class Ranks:
    """This process among those that train together.

    Raises:
        ConfigError: accelerate is told to use what this package cannot.
    """

    _is_agreed = False
    """Whether the processes tell each other how they are, before each exchange."""

    def __init__(self) -> None:
        _refuse_others()
        # Only when it is told so does accelerate connect processes that have no accelerator.
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        with patch_environment(**{_DEEPSPEED: "false"}):  # its engine is not used: see `_zero`
            state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self._device = state.device
        self.sharding = _sharding(state.device, self.count) if self.count > 1 else None
        """How the base is divided among the processes; None: each has all of it."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what the run leaves behind."""
        return self.index == 0

    def share(self, count: int) -> range:
        """This process's part of so many things: neighbours, sizes that differ by one at most."""
        return range(
            self.index * count // self.count,
            (self.index + 1) * count // self.count,
        )

    def together(self, work: Callable[[], Sequence[T]]) -> list[T]:
        """What all processes made, that of the first one first; an error of one is raised in all.

        Raises:
            DistributedError: another process failed; the message has its error.
            Exception: this process failed: what `work` has raised.
        """
        if self.count == 1:
            return list(work())
        own: tuple[list[T], str | None] = ([], None)
        failure: Exception | None = None
        try:
            own = (list(work()), None)
        except Exception as error:  # noqa: BLE001 - raised below, once the others know of it
            failure, own = error, ([], f"{type(error).__name__}: {error}")
        self._go_on()
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, own)
        if failure is not None:
            raise failure
        for rank, (_, problem) in enumerate(parts):
            if problem is not None:
                raise DistributedError(f"process {rank} failed: {problem}")
        return [item for items, _ in parts for item in items]

    def by_first(self, work: Callable[[], T]) -> T:
        """What the first process makes, known to all.

        Raises:
            As `together`.
        """
        return self.together(lambda: [work()] if self.is_main else [])[0]

    def any(self, is_true: bool) -> bool:
        """Whether something is so in any process."""
        return any(self.together(lambda: [is_true]))

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.count == 1:
            return tensor
        total = tensor.to(self._device, copy=True)
        self._go_on()
        dist.all_reduce(total)
        return total.to(tensor.device)

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every parameter the sum of its gradients over all processes."""
        if self.count == 1:
            return
        owned = list(parameters)
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in owned]
        )
        self._go_on()
        dist.all_reduce(flat)
        parts = torch.split(flat, [p.numel() for p in owned])
        for parameter, total in zip(owned, parts, strict=True):
            parameter.grad = total.view_as(parameter).clone()

    @contextlib.contextmanager
    def agreed(self, is_memory: Callable[[BaseException], bool]) -> Iterator[None]:
        """Work that all processes finish or none: what fails in one fails in all, without a wait.

        Before each exchange inside, and at the end, the processes tell each other whether they are
        well. One that has failed says so in its next turn, so that none waits for what it will not
        send. Where the base is divided, a failing process cannot: others may be inside a layer's
        own exchange. It ends then, which breaks the others' connections.

        Args:
            is_memory: whether an exception says that memory is short.

        Raises:
            MemoryError: another process ran out of memory; all of them may try again.
            DistributedError: another process failed otherwise.
        """
        if self.count == 1:
            yield
            return
        self._is_agreed = True
        try:
            yield
            self._go_on()
        except _OtherFailed as other:
            raise other.seen_here() from None
        except Exception as error:
            if self.sharding is None:
                self._tell(error, is_memory=is_memory(error))
            raise
        finally:
            self._is_agreed = False

    def _tell(self, error: Exception, *, is_memory: bool) -> None:
        """Say in this process's turn that it has failed."""
        try:
            self._exchange(
                _SHORT if is_memory else _FAILED, f"{type(error).__name__}: {error}".strip()
            )
        except _OtherFailed as other:  # and in a worse way
            raise other.seen_here() from error

    def _go_on(self) -> None:
        """Inside of `agreed`: go on where all processes are well.

        Raises:
            _OtherFailed: one is not.
        """
        if self._is_agreed:
            self._exchange(_WELL, "")

    def _exchange(self, state: int, problem: str) -> None:
        worst = torch.tensor([state], device=self._device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if int(worst) == _WELL:
            return
        told: list[Any] = [None] * self.count
        dist.all_gather_object(told, (state, problem))
        if state == int(worst):
            return  # its own error is raised
        rank = next(r for r, (other, _) in enumerate(told) if other == int(worst))
        text = f"process {rank} failed: {told[rank][1]}"
        raise _OtherFailed(text, is_memory=int(worst) == _SHORT)

    def one_after_another(self, work: Callable[[], T]) -> T:
        """What this process makes, the first process last; an error of one is raised in all.

        Raises:
            As `together`.
        """
        found: list[T] = []

        def do() -> Sequence[None]:
            found.append(work())
            return ()

        for rank in reversed(range(self.count)):
            self.together(do if rank == self.index else tuple)
        return found[0]


def check_ranks(ranks: Ranks, config: TrainConfig) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        ConfigError: names the setting.
    """
    if ranks.count == 1:
        return
    if config.engine != "local" and not config.engine_urls:
        raise ConfigError(
            f"engine is {config.engine!r}, with {ranks.count} processes, and there are no "
            "engine_urls; several processes use servers that run already, or engine local"
        )
    if config.staleness:
        raise ConfigError(
            f"staleness is {config.staleness}, with {ranks.count} processes; rollouts run beside "
            "updates in a single process only: set staleness to 0, or use one process with many "
            "servers (engine vllm)"
        )
    if ranks.sharding is not None and config.quantization != "none":
        raise ConfigError(
            f"quantization is {config.quantization}, and the base is divided among processes "
            "(FSDP, or ZeRO stage 3); use one of the two"
        )


def _refuse_others() -> None:
    for variable, name in _OTHERS.items():
        if parse_flag_from_env(variable):
            raise ConfigError(
                f"accelerate's settings ask for {name}, which marft-graph does not use: only the "
                "adapters have gradients and optimizer states, and they are small. Use "
                "distributed_type MULTI_GPU, or, to divide the base's weights among the "
                "processes, FSDP with fsdp_version 2 or DeepSpeed (docs/several_gpus.md)"
            )


def _sharding(device: torch.device, count: int) -> Sharding | None:
    """What accelerate's settings of FSDP or DeepSpeed say.

    Raises:
        ConfigError: they ask for what is not supported.
    """
    if parse_flag_from_env(_DEEPSPEED):
        return _zero(device, count)
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    # Each process loads the base itself; the plugin tells transformers so by its variable.
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"accelerate's settings have fsdp_version {plugin.fsdp_version}; it must be 2"
        )
    if plugin.activation_checkpointing:
        raise ConfigError(
            "accelerate's settings have fsdp_activation_checkpointing; use the setting "
            "gradient_checkpointing instead"
        )
    return Sharding(
        device,
        count,
        is_resharded=bool(plugin.reshard_after_forward),
        is_offloaded=parse_flag_from_env("FSDP_OFFLOAD_PARAMS"),
    )


def _zero(device: torch.device, count: int) -> Sharding | None:
    """What DeepSpeed's settings divide: its ZeRO stage 3 the base, lower ones nothing of size.

    DeepSpeed's engine owns one model, one optimizer and the backward pass; here every agent has an
    optimizer of its own, and passes go past the model's head. FSDP2 divides weights as stage 3
    does. Stages 1 and 2 divide optimizer states and gradients, which only adapters have: each
    process keeps its own.

    Raises:
        ConfigError: the settings cannot be read, or weights are to be offloaded to a disk.
    """
    try:
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"accelerate's settings of DeepSpeed: {error}") from error
    offload = str(plugin.offload_param_device)
    if int(plugin.zero_stage) < 3:
        logger.info("ZeRO stage %s: adapters and their optimizers stay whole", plugin.zero_stage)
        return None
    if offload not in ("none", "None", "cpu"):
        raise ConfigError(
            f"DeepSpeed's settings have offload_param_device {offload!r}; it must be none or cpu"
        )
    logger.info("ZeRO stage 3: the base's layers are divided by FSDP2")
    return Sharding(device, count, is_resharded=True, is_offloaded=offload == "cpu")


def own_folder(ranks: Ranks, run_dir: str | Path | None, *, resume: bool) -> str | Path | None:
    """The folder that this process writes to: the run's, or a temporary one, to resume a copy.

    Raises:
        CheckpointError: there is nothing to resume that this process can see.
    """
    if ranks.is_main:
        return run_dir
    folder = Path(tempfile.mkdtemp(prefix=f"marft-rank-{ranks.index}-"))
    if resume:
        if run_dir is None or not Path(run_dir).is_dir():
            raise CheckpointError(
                f"nothing to resume: process {ranks.index} sees no folder {run_dir}; several "
                "machines need a file system that they share"
            )
        shutil.copytree(
            run_dir, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.lock", "traces")
        )
    return folder
