"""One token for every running completion, with fewer operations than the model's own pass.

Where each row of a batch has one token, starting operations costs more than their arithmetic. In
models of Llama's shape the layers that read the same states run as one here, with the adapters of
all of them; gate and up, for example, are one product. Where memory allows, each adapter has the
base's weights once more with its own and the norm's multiplied in, which leaves one product of
those that LoRA needs. The model's own pass stays the reference: `StepDecoder.of` compares with it
and gives None where the two differ.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from marft_graph.policy.attention import attend, for_sharing
from marft_graph.policy.beginning import SharedBeginning
from marft_graph.policy.lora import BASE, LoraLayers, RowAdapters, Rows, base_layer, is_plain

logger = logging.getLogger(__name__)

_FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
_CHECKED_TOKENS = 4
_FOLDED_PARAMETERS = 32_000_000
"""Most weights that all adapters together may have of their own, 4 bytes each."""


def name_of_cache(decoder: nn.Module) -> str:
    """What a decoder's pass calls its cache; transformers 5.24 renamed it, family by family."""
    parameters = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


class StepDecoder:
    """The decoder of a model of Llama's shape, for batches of one token per row."""

    def __init__(self, decoder: Any, lora: LoraLayers) -> None:
        self._decoder = decoder
        weight = decoder.embed_tokens.weight
        copied = sum(base_layer(part).weight.numel() for part in _projections(decoder))
        folds = (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and copied * (1 + lora.adapters) <= _FOLDED_PARAMETERS
        )
        self._layers = [_Layer(layer, lora, folds) for layer in decoder.layers]
        self._folds = folds

    @classmethod
    def of(cls, decoder: nn.Module, lora: LoraLayers) -> StepDecoder | None:
        """The decoder's shorter form; None where it has another shape, or does not agree."""
        if type(decoder).__name__ not in _FAMILIES or not isinstance(decoder, PreTrainedModel):
            return None
        if type(decoder.embed_tokens) is not nn.Embedding:  # one with an adapter
            return None
        if not all(is_plain(part) for part in _projections(decoder)):
            return None
        step = cls(decoder, lora)
        if step._agrees():
            return step
        logger.warning("%s decodes by its own forward pass", type(decoder).__name__)
        return None

    def __call__(
        self,
        ids_B: Tensor,
        position_B: Tensor,
        hidden_B1L: Tensor,
        cache: Cache,
        rows: Rows,
        beginning: SharedBeginning | None = None,
    ) -> Tensor:
        """Last hidden states (B, H) of one token per row, whose keys and values `cache` takes.

        `hidden_B1L` is added to the scores: 0 for tokens that a row sees, else very negative.
        """
        decoder = self._decoder
        x_BH = decoder.embed_tokens(ids_B)
        cos, sin = decoder.rotary_emb(x_BH, position_B.unsqueeze(-1))  # (B, 1, size of a head)
        # Outside of attention rows of one adapter stand together, as its own weights need it.
        turned = self._folds and rows.order_B is not None
        x_BH = x_BH[rows.order_B] if turned else x_BH
        for number, layer in enumerate(self._layers):
            x_BH = layer(x_BH, cos, sin, hidden_B1L, cache, number, rows, beginning)
        x_BH = _normed(decoder.norm, x_BH)
        return x_BH[rows.place_B] if turned else x_BH

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether both passes give a last token the same state."""
        decoder = self._decoder
        device = decoder.embed_tokens.weight.device
        ids_BT = torch.arange(2 * _CHECKED_TOKENS, device=device).view(2, -1)
        ids_BT %= decoder.embed_tokens.num_embeddings
        theirs_BH = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state[:, -1].float()
        cache = DynamicCache(config=decoder.config)
        decoder(input_ids=ids_BT[:, :-1], use_cache=True, **{name_of_cache(decoder): cache})
        last_B = torch.full((2,), _CHECKED_TOKENS - 1, device=device)
        hidden_B1L = torch.zeros(2, 1, _CHECKED_TOKENS, dtype=theirs_BH.dtype, device=device)
        hidden_B1L = hidden_B1L.to(decoder.embed_tokens.weight.dtype)
        ours_BH = self(ids_BT[:, -1], last_B, hidden_B1L, cache, Rows([BASE, BASE])).float()
        is_exact = decoder.embed_tokens.weight.dtype == torch.float32
        most = theirs_BH.abs().max().item() * (1e-4 if is_exact else 5e-2)
        return bool((ours_BH - theirs_BH).abs().max() <= most)


class _Layer:
    """A decoder layer: attention and a gated MLP."""

    def __init__(self, layer: Any, lora: LoraLayers, folds: bool) -> None:
        self._layer = layer
        self._folds = folds
        attention, mlp = layer.self_attn, layer.mlp
        norms = layer.input_layernorm, layer.post_attention_layernorm
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._qkv = _Joined(projections, lora, norms[0], folds=folds)
        self._out = _Joined([attention.o_proj], lora, folds=folds)
        self._gate_up = _Joined([mlp.gate_proj, mlp.up_proj], lora, norms[1], folds=folds)
        self._down = _Joined([mlp.down_proj], lora, folds=folds)
        self._size = int(attention.head_dim)
        self._queries = base_layer(attention.q_proj).out_features // self._size
        self._keys = base_layer(attention.k_proj).out_features // self._size
        self._has_norms = hasattr(attention, "q_norm")

    def __call__(
        self,
        x_BH: Tensor,
        cos: Tensor,
        sin: Tensor,
        hidden_B1L: Tensor,
        cache: Cache,
        number: int,
        rows: Rows,
        beginning: SharedBeginning | None,
    ) -> Tensor:
        layer = self._layer
        batch, queries, keys = len(x_BH), self._queries, self._keys
        heads = self._qkv(x_BH, rows)
        if is_turned := self._folds and rows.place_B is not None:
            heads = heads[rows.place_B]
        heads = heads.view(batch, queries + 2 * keys, self._size)
        turned = heads[:, : queries + keys]
        if self._has_norms:
            q, k = turned[:, :queries], turned[:, queries:]
            attention = layer.self_attn
            turned = torch.cat((_normed(attention.q_norm, q), _normed(attention.k_norm, k)), dim=1)
        left, right = turned.chunk(2, -1)
        turned = torch.addcmul(turned * cos, torch.cat((-right, left), -1), sin)
        q, k = turned[:, :queries], turned[:, queries:]
        v = heads[:, queries + keys :]
        seen_k, seen_v = cache.update(k.unsqueeze(2), v.unsqueeze(2), number)
        scale = layer.self_attn.scaling
        if beginning is None:
            hidden = for_sharing(hidden_B1L.unsqueeze(1), queries // keys)
            mixed = attend(q.unsqueeze(2), seen_k, seen_v, hidden, scale)
        else:
            q_BKGS = q.reshape(batch, keys, queries // keys, self._size)
            mixed = beginning.attend(number, q_BKGS, seen_k, seen_v, hidden_B1L, scale)
        mixed = mixed.reshape(batch, queries * self._size)
        x_BH = x_BH + self._out(mixed[rows.order_B] if is_turned else mixed, rows)
        gate, up = self._gate_up(x_BH, rows).chunk(2, -1)
        return x_BH + self._down(layer.mlp.act_fn(gate) * up, rows)


class _Joined:
    """Linear layers that read the same states, as one, with the norm before them.

    Their weights become views of one tensor, so nothing is kept twice but what is folded: W + s B A
    for each adapter, times the norm's weights. Then rows of an adapter must stand together.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        lora: LoraLayers,
        norm: Any | None = None,
        *,
        folds: bool,
    ) -> None:
        self._norm = norm
        self._folds = folds
        self._folded: dict[str, Tensor] = {}
        self._version = -1
        bases = [base_layer(layer) for layer in layers]
        self._adapters: RowAdapters = lora.join(layers)
        self._weight = _joined([base.weight for base in bases])
        biases = [base.bias for base in bases if base.bias is not None]
        self._bias: Tensor | None = None
        if len(biases) == len(bases):
            self._bias = _joined(biases)
        elif biases:
            self._bias = torch.cat(
                [
                    base.weight.new_zeros(len(base.weight)) if base.bias is None else base.bias.data
                    for base in bases
                ]
            )

    def __call__(self, x: Tensor, rows: Rows) -> Tensor:
        if not self._folds:
            x = x if self._norm is None else _normed(self._norm, x)
            return self._adapters.add(functional.linear(x, self._weight, self._bias), x, rows)
        if self._norm is not None:
            squares = (x * x).sum(-1, keepdim=True)  # the root of the width is in the weights
            x = x * squares.add_(x.shape[-1] * self._norm.variance_epsilon).rsqrt_()
        parts = [
            functional.linear(x[span], self._own(name), self._bias) for name, span in rows.spans
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _own(self, name: str) -> Tensor:
        """The weights that rows of an adapter have, as it was published last."""
        if self._version != self._adapters.version:
            self._folded.clear()
            self._version = self._adapters.version
        weight = self._folded.get(name)
        if weight is None:
            change = self._adapters.change(name)
            weight = self._weight if change is None else self._weight + change
            if self._norm is not None:
                weight = weight * (self._norm.weight * math.sqrt(weight.shape[1]))
            self._folded[name] = weight
        return weight


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor with the values of several, which become views of it."""
    if len(parameters) == 1:
        return parameters[0].data
    whole = torch.cat([parameter.data for parameter in parameters])
    parts = torch.split(whole, [len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return whole


def _projections(decoder: Any) -> list[nn.Module]:
    return [
        part
        for block in decoder.layers
        for part in (
            *(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
            *(block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj),
        )
    ]


def _normed(norm: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
