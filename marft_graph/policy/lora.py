"""How adapters act inside the base's linear layers: one for a whole batch, or one for each row.

PEFT owns the weights and their format; this module owns the arithmetic. PEFT's own pass over a
mixed batch gathers the rows of each adapter and runs it by itself. Here all adapters of a layer
stand in one matrix, and a mask keeps for each row the columns of its own:

    y = W x + B_all (mask_row * (A_all x)),   A_all = [A_1; ..; A_n],   B_all = [s_1 B_1 .. s_n B_n]

Rows read copies of the adapters that are made when a version is published, so that completions may
run while the learner changes the weights themselves.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

BASE = "__base__"
"""PEFT's name for rows that no adapter touches."""


class LoraLayers:
    """All LoRA layers of a model, run as `rows` says, or as PEFT's state says outside of it.

    Plain linear layers are run here. Others (quantized ones, embeddings, DoRA) stay with PEFT's own
    forward pass, which has one state for all threads: see `is_shared_state`.
    """

    def __init__(self, model: PeftModel) -> None:
        self._local = threading.local()
        self._layers: list[_LinearLora] = []
        self.is_shared_state = False
        """Whether rows and whole batches must not run at the same time."""
        for layer in model.modules():
            if isinstance(layer, Linear) and _is_plain(layer):
                self._layers.append(_LinearLora(layer, self._local))
            elif isinstance(layer, LoraLayer) and isinstance(layer, nn.Module):
                self.is_shared_state = True
                layer.register_forward_pre_hook(self._name_rows, with_kwargs=True)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Let `rows` use the adapters as they are now."""
        for layer in self._layers:
            layer.copy_adapters()

    @contextlib.contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Run this thread's batches with row i under adapter `names[i]` (or `BASE`)."""
        self._local.rows = _Rows(names)
        try:
            yield
        finally:
            self._local.rows = None

    def _name_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        rows: _Rows | None = getattr(self._local, "rows", None)
        return None if rows is None else (args, {**kwargs, "adapter_names": rows.names})


class _Rows:
    """Which adapter each row of a batch has, and the masks that follow from it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.only = self.names[0] if len(set(self.names)) == 1 else None
        """The adapter of all rows, where they have the same."""
        self._masks: dict[tuple[tuple[str, int], ...], Tensor] = {}

    def mask(self, layout: tuple[tuple[str, int], ...], like: Tensor) -> Tensor:
        """(B, R): 1 where a column of A_all belongs to the row's adapter; one for each layout."""
        mask = self._masks.get(layout)
        if mask is None:
            place = {name: i for i, (name, _) in enumerate(layout)}
            ranks = torch.tensor([rank for _, rank in layout])
            columns_NR = torch.eye(len(layout) + 1)[:, :-1].repeat_interleave(ranks, dim=1)
            row_B = torch.tensor([place.get(name, len(layout)) for name in self.names])
            mask = columns_NR[row_B].to(like)
            self._masks[layout] = mask
        return mask


class _LinearLora:
    """One linear layer with its adapters."""

    def __init__(self, layer: Linear, local: threading.local) -> None:
        self._layer = layer
        self._base: nn.Linear = layer.get_base_layer()  # type: ignore[assignment]
        self._local = local
        self._layout: tuple[tuple[str, int], ...] = ()
        self._down_RI = torch.empty(0)
        self._up_RO = torch.empty(0)
        self._spans: dict[str, slice] = {}
        self._peft_forward = layer.forward
        layer.forward = self.forward  # type: ignore[method-assign]

    def copy_adapters(self) -> None:
        names = list(self._layer.lora_A.keys())
        weights = [self._weights(name) for name in names]
        down = [a_RI for a_RI, _, _ in weights]
        up = [b_OR.t() * scale for _, b_OR, scale in weights]
        self._layout = tuple(zip(names, [part.shape[0] for part in down], strict=True))
        self._down_RI, self._up_RO = torch.cat(down), torch.cat(up)
        end = 0
        for name, rank in self._layout:
            self._spans[name] = slice(end, end + rank)
            end += rank

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What replaces PEFT's forward pass; the same numbers but for rounding."""
        if args or kwargs:  # `adapter_names` of PEFT's own callers
            result: Tensor = self._peft_forward(x, *args, **kwargs)
            return result
        base = functional.linear(x, self._base.weight, self._base.bias)
        rows: _Rows | None = getattr(self._local, "rows", None)
        if rows is None:
            return self._whole_batch(x, base)
        if rows.only is None:
            low = functional.linear(x.to(self._down_RI.dtype), self._down_RI)
            mask = rows.mask(self._layout, low)
            low *= mask.view(len(mask), *[1] * (low.dim() - 2), -1)
            return _plus(base, low, self._up_RO)
        span = self._spans.get(rows.only)
        if span is None:  # the base, or an adapter that leaves this layer alone
            return base
        low = functional.linear(x.to(self._down_RI.dtype), self._down_RI[span])
        return _plus(base, low, self._up_RO[span])

    def _whole_batch(self, x: Tensor, base: Tensor) -> Tensor:
        """The adapters that PEFT has active, with gradients."""
        layer = self._layer
        if layer.disable_adapters:
            return base
        for name in layer.active_adapters:
            if name in layer.lora_A:
                a_RI, b_OR, scale = self._weights(name)
                low = functional.linear(x.to(a_RI.dtype), a_RI)
                base = _plus(base, low, b_OR.t(), scale)
        return base

    def _weights(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A (R, in), B (out, R) and the scale of an adapter."""
        layer: Any = self._layer  # PEFT's containers are not typed
        return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def _plus(base: Tensor, low: Tensor, up_RO: Tensor, scale: float = 1.0) -> Tensor:
    """base + scale * low @ up, in the base's precision."""
    if base.dtype != low.dtype:
        return (base + (low @ up_RO) * scale).to(base.dtype)
    flat = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up_RO, alpha=scale)
    return flat.view(base.shape)


def _is_plain(layer: Linear) -> bool:
    """Whether a layer is W x + s B A x with weights that torch multiplies as they are."""
    return (
        type(layer) is Linear
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant
        and not layer.merged
        and not any(layer.lora_bias.values())
    )
