"""The last layer's MLP for those tokens alone whose states are asked for.

Keys and values of a token serve other tokens; what follows its last attention serves nobody but
itself. Of a prompt one state is asked for, of a call those before its action tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_CHECKED_TOKENS = 4


def narrow_last_layer(decoder: nn.Module) -> bool:
    """Let a decoder take `wanted`, N of its B x T tokens by place, and give their states (1, N, H).

    Returns whether it does. It stays as it was if its last layer is not an attention and an MLP,
    each with a norm before it and added to what it reads.
    """
    layers = getattr(decoder, "layers", None)
    layer: Any = layers[-1] if isinstance(layers, nn.ModuleList) else None
    if not all(hasattr(layer, part) for part in _PARTS):
        return False
    whole = layer.forward

    def forward(x_BTH: Tensor, *args: Any, wanted: Tensor | None = None, **options: Any) -> Any:
        if wanted is None:
            return whole(x_BTH, *args, **options)
        read_BTH, _ = layer.self_attn(hidden_states=layer.input_layernorm(x_BTH), **options)
        x_NH = (x_BTH + read_BTH).flatten(0, 1).index_select(0, wanted).unsqueeze(0)
        return x_NH + layer.mlp(layer.post_attention_layernorm(x_NH))

    layer.forward = forward
    if _agrees(decoder):
        return True
    logger.info("%s gives the states of all tokens", type(decoder).__name__)
    layer.forward = whole
    return False


@torch.no_grad()
def _agrees(decoder: Any) -> bool:
    """Whether wanted states are those of the whole pass."""
    weight = decoder.get_input_embeddings().weight
    ids_BT = torch.arange(2 * _CHECKED_TOKENS, device=weight.device).view(2, -1) % len(weight)
    wanted = torch.tensor([1, 2 * _CHECKED_TOKENS - 1], device=weight.device)
    given = {"input_ids": ids_BT, "use_cache": False}
    theirs_NH = decoder(**given).last_hidden_state.flatten(0, 1)[wanted]
    try:
        ours_NH = decoder(**given, wanted=wanted).last_hidden_state[0]
    except Exception:  # noqa: BLE001 - its parts want or give something else
        return False
    bound = theirs_NH.abs().max().item() * (1e-4 if weight.dtype == torch.float32 else 5e-2)
    return ours_NH.shape == theirs_NH.shape and bool((ours_NH - theirs_NH).abs().max() <= bound)
