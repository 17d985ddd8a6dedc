"""The frozen base divided among processes: each keeps a part of every decoder layer (FSDP2).

A layer's weights are put together when it runs and dropped again, forward and backward. That takes
all processes at once, so each must make as many passes as the others. Adapters, embeddings, norms
and the head stay whole everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)

from marft_graph.errors import ModelError
from marft_graph.ranks import Sharding


class ShardedLayers:
    """A decoder whose layers are divided among all processes that train together.

    Args:
        decoder: on the CPU, or where it is to stay; its layers are moved one by one, so that the
            device never holds them all.
        kept: parameters that stay whole, and stay this module's own.
        sharding: how.

    Raises:
        ModelError: the decoder has no list of layers.
    """

    def __init__(
        self, decoder: nn.Module, kept: Sequence[nn.Parameter], sharding: Sharding
    ) -> None:
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ModelError(f"{type(decoder).__name__} has no `layers`, which FSDP divides")
        self._sharding = sharding
        mesh = init_device_mesh(sharding.device.type, (sharding.count,))
        offload = CPUOffloadPolicy() if sharding.is_offloaded else OffloadPolicy()
        whole = set(kept)
        self._layers: list[FSDPModule] = []
        for layer in layers:
            # It stays the same module, and becomes an FSDPModule as well.
            divided = fully_shard(
                layer,
                mesh=mesh,
                reshard_after_forward=sharding.is_resharded,
                offload_policy=offload,
                ignored_params=whole,
            )
            self._layers.append(divided)
        in_layers = {id(p) for layer in layers for p in layer.parameters()}
        rest = {p for p in decoder.parameters() if id(p) not in in_layers} | whole
        # The root holds no weights; it lets a layer's be fetched while the one before it runs.
        fully_shard(decoder, mesh=mesh, offload_policy=offload, ignored_params=rest)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Keep all layers whole on every process, which may then make any number of passes.

        All processes must begin and end this together.
        """
        for layer in self._layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.set_reshard_after_forward(self._sharding.is_resharded, recurse=False)
                layer.reshard()
