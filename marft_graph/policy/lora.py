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
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

T = TypeVar("T")
BASE = "__base__"
"""PEFT's name for rows that no adapter touches."""

AdapterValues = Mapping[nn.Parameter, Tensor]
"""Copies of adapter weights, by the parameters that they were copied from."""


class LoraLayers:
    """All LoRA layers of a model, run as `rows` says, or as PEFT's state says outside of it.

    Plain linear layers are run here. Others (quantized ones, embeddings, DoRA) stay with PEFT's own
    forward pass, which has one state for all threads: see `is_shared_state`.
    """

    def __init__(self, model: PeftModel) -> None:
        self._local = threading.local()
        self._layers: list[_LinearLora] = []
        self._adapters: list[RowAdapters] = []
        self.is_shared_state = False
        """Whether rows and whole batches must not run at the same time."""
        for layer in model.modules():
            if isinstance(layer, Linear) and is_plain(layer):
                adapters = self.join([layer])
                self._layers.append(_LinearLora(layer, adapters, self._local))
            elif isinstance(layer, LoraLayer) and isinstance(layer, nn.Module):
                self.is_shared_state = True
                layer.register_forward_pre_hook(self._name_rows, with_kwargs=True)

    @torch.no_grad()
    def publish(self, values: AdapterValues | None = None) -> None:
        """Let `rows` use the adapters as they are now, or as they were when copied."""
        for adapters in self._adapters:
            adapters.copy(values)

    def join(self, layers: Sequence[nn.Module]) -> RowAdapters:
        """The adapters of plain layers that read the same states; published with the others."""
        adapters = RowAdapters(layers)
        adapters.copy()
        self._adapters.append(adapters)
        return adapters

    @contextlib.contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Run this thread's batches with row i under adapter `names[i]` (or `BASE`)."""
        last: Rows | None = getattr(self._local, "last", None)
        if last is None or last.names != names:  # else its masks are still right
            self._local.last = last = Rows(names)
        self._local.rows = last
        try:
            yield
        finally:
            self._local.rows = None

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[None]:
        """Run this thread's batches under one adapter (or `BASE`), with gradients to its weights.

        PEFT's own switches walk through all modules, and are those of all threads.
        """
        before: str | None = getattr(self._local, "whole", None)
        self._local.whole = name
        try:
            yield
        finally:
            self._local.whole = before

    def bound(self, function: Callable[..., T]) -> Callable[..., T]:
        """A function that runs under the adapter that `whole` now says, in whatever thread."""
        name: str | None = getattr(self._local, "whole", None)
        if name is None:
            return function

        def run(*args: Any, **kwargs: Any) -> T:
            with self.whole(name):
                return function(*args, **kwargs)

        return run

    @property
    def adapters(self) -> int:
        """How many there are."""
        return len({name for joined in self._adapters for name in joined.names})

    @property
    def current_rows(self) -> Rows | None:
        """The rows that this thread now runs; None: whole batches."""
        return getattr(self._local, "rows", None)

    def _name_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        rows = self.current_rows
        return None if rows is None else (args, {**kwargs, "adapter_names": rows.names})


class Rows:
    """Which adapter each row of a batch has, and what follows from it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.only = self.names[0] if len(set(self.names)) == 1 else None
        """The adapter of all rows, where they have the same."""
        self._masks: dict[tuple[tuple[str, int], ...], Tensor] = {}

    @cached_property
    def order_B(self) -> Tensor | None:
        """The rows in an order in which those of an adapter are neighbours; None: as they are."""
        if self.only is not None:
            return None
        places = sorted(range(len(self.names)), key=lambda i: self.names[i])  # stable
        return torch.tensor(places)

    @cached_property
    def place_B(self) -> Tensor | None:
        """Where each row stands in `order_B`."""
        return None if self.order_B is None else self.order_B.argsort()

    @cached_property
    def spans(self) -> list[tuple[str, slice]]:
        """Each adapter's rows in `order_B`."""
        found, start = [], 0
        for name, own in itertools.groupby(sorted(self.names)):
            end = start + len(list(own))
            found.append((name, slice(start, end)))
            start = end
        return found

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


class RowAdapters:
    """Copies of the adapters of layers that read the same states, for batches of mixed rows.

    The outputs of several layers stand side by side; an adapter's columns of A_all are those of its
    parts in all layers.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = [layer for layer in layers if isinstance(layer, Linear)]
        widths = [base_layer(layer).out_features for layer in layers]
        ends = list(itertools.accumulate(widths))
        self._width = ends[-1]
        self._outputs = [
            slice(end - width, end)
            for layer, end, width in zip(layers, ends, widths, strict=True)
            if isinstance(layer, Linear)
        ]
        self._layout: tuple[tuple[str, int], ...] = ()
        self._down_RI = torch.empty(0)
        self._up_RO = torch.empty(0)
        self._spans: dict[str, slice] = {}
        self.version = 0
        """Copies that were made; each may differ from the one before."""

    @property
    def names(self) -> list[str]:
        """Adapters that change one of the layers or more."""
        return list(dict.fromkeys(name for layer in self._layers for name in layer.lora_A))

    @torch.no_grad()
    def copy(self, values: AdapterValues | None = None) -> None:
        """Take the adapters' weights as they are now, or as they were when copied."""
        values = values or {}
        down: list[Tensor] = []
        up: list[Tensor] = []
        layout = []
        end = 0
        for name in self.names:
            start = end
            for layer, outputs in zip(self._layers, self._outputs, strict=True):
                if name not in layer.lora_A:
                    continue
                own_RI, own_OR, scale = weights_of(layer, name)
                a_RI, b_OR = values.get(own_RI, own_RI), values.get(own_OR, own_OR)
                down.append(a_RI)
                part_RO = b_OR.new_zeros(len(a_RI), self._width)
                part_RO[:, outputs] = b_OR.t() * scale
                up.append(part_RO)
                end += len(a_RI)
            layout.append((name, end - start))
            self._spans[name] = slice(start, end)
        self._layout = tuple(layout)
        if down:
            self._down_RI, self._up_RO = torch.cat(down), torch.cat(up)
        self.version += 1

    def change(self, name: str) -> Tensor | None:
        """What an adapter adds to the layers' weights (out, in); None: nothing."""
        span = self._spans.get(name)
        return None if span is None else self._up_RO[span].t() @ self._down_RI[span]

    def add(self, base: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """What the layers make of `x`, given what the base makes of it."""
        if rows.only is None:
            if not self._layout:
                return base
            low = functional.linear(x.to(self._down_RI.dtype), self._down_RI)
            mask = rows.mask(self._layout, low)
            low *= mask.view(len(mask), *[1] * (low.dim() - 2), -1)
            return _plus(base, low, self._up_RO)
        span = self._spans.get(rows.only)
        if span is None:  # the base, or an adapter that leaves these layers alone
            return base
        low = functional.linear(x.to(self._down_RI.dtype), self._down_RI[span])
        return _plus(base, low, self._up_RO[span])


class _LinearLora:
    """One linear layer with its adapters."""

    def __init__(self, layer: Linear, adapters: RowAdapters, local: threading.local) -> None:
        self._layer = layer
        self._base = base_layer(layer)
        self._adapters = adapters
        self._local = local
        self._peft_forward = layer.forward
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What replaces PEFT's forward pass; the same numbers but for rounding."""
        if args or kwargs:  # `adapter_names` of PEFT's own callers
            result: Tensor = self._peft_forward(x, *args, **kwargs)
            return result
        base = functional.linear(x, self._base.weight, self._base.bias)
        rows: Rows | None = getattr(self._local, "rows", None)
        return self._whole_batch(x, base) if rows is None else self._adapters.add(base, x, rows)

    def _whole_batch(self, x: Tensor, base: Tensor) -> Tensor:
        """The adapter that `whole` says, or those that PEFT has active; with gradients."""
        layer = self._layer
        whole: str | None = getattr(self._local, "whole", None)
        if whole is None:
            names = [] if layer.disable_adapters else layer.active_adapters
        else:
            names = [whole]
        for name in names:
            if name in layer.lora_A:
                a_RI, b_OR, scale = weights_of(layer, name)
                low = functional.linear(x.to(a_RI.dtype), a_RI)
                base = _plus(base, low, b_OR.t(), scale)
        return base


def weights_of(layer: Linear, name: str) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A (R, in), B (out, R) and the scale of an adapter in a layer."""
    own: Any = layer  # PEFT's containers are not typed
    return own.lora_A[name].weight, own.lora_B[name].weight, float(own.scaling[name])


def base_layer(layer: nn.Module) -> nn.Linear:
    """The base's linear layer, which an adapter may stand around."""
    own: nn.Linear = layer.get_base_layer() if isinstance(layer, Linear) else layer  # type: ignore[assignment]
    return own


def _plus(base: Tensor, low: Tensor, up_RO: Tensor, scale: float = 1.0) -> Tensor:
    """base + scale * low @ up, in the base's precision."""
    if base.dtype != low.dtype:
        return (base + (low @ up_RO) * scale).to(base.dtype)
    flat = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up_RO, alpha=scale)
    return flat.view(base.shape)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is W x, or W x + s B A x, with weights that torch multiplies as they are."""
    if type(layer) is nn.Linear:
        return True
    return (
        type(layer) is Linear
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant
        and not layer.merged
        and not any(layer.lora_bias.values())
    )
