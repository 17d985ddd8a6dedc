"""Whether a base's numbers can be exactly those of transformers; where not, it is refused at load.

A rollout, an update and a server must compute one function. Attention here is full and causal, rows
share beginnings, and keys are cached by this project's own means: a base for which any of that
gives other logits than its own forward pass would learn from wrong ratios. What a config says is
read first, before weights are loaded. Then a small random copy of it, of few layers and with its
windows, chunks and switches shortened alike, computes sequences that are longer than all of them,
once for each config in a process.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from marft_graph.errors import ModelError
from marft_graph.policy.rows import Row, lay_out

if TYPE_CHECKING:
    from marft_graph.policy.adapters import Policy

logger = logging.getLogger(__name__)

_LENGTH = 72
"""Tokens of the longest sequence of the small copy ..."""
_LIMIT = 16
"""... and what its windows, chunks and switches become."""
_LAYERS = 4
_LIMITS = re.compile(r"window|chunk_size|block_size|local_attn|original_max_position")
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_BOUND = 2e-3
"""Largest difference of logits, as a share of the largest; rounding is a hundredth of it."""
_checked: dict[str, str | None] = {}


def context_of(config: Any) -> int:
    """Tokens up to which a base is computed exactly.

    Rope of kind `longrope` turns all keys anew where a sequence passes its original length, which
    cached keys cannot follow: the context ends there.
    """
    context = int(getattr(config, "max_position_embeddings", 0) or 2048)
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and original and int(original) < context:
            logger.warning(
                "the context ends at %d tokens of %d: beyond, its longrope changes keys that were "
                "computed before",
                original,
                context,
            )
            context = int(original)
    return context


def refuse_by_config(config: Any, base_model: str) -> None:
    """Refuse a base that says itself why it cannot be computed exactly.

    Raises:
        ModelError: with the reason.
    """
    reason = next(_reasons(config), None)
    if reason is not None:
        raise ModelError(f"base_model {base_model!r} is refused: {reason}")


def _reasons(config: Any) -> Iterator[str]:
    own = config.get_text_config()
    name = getattr(own, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):
        yield f"{name} is an encoder and a decoder; a causal language model is needed"
    context = context_of(own)
    kinds = set(getattr(own, "layer_types", None) or ())
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    if other:
        yield f"it has layers of kind {other}; the policy computes full attention alone"
    window = getattr(own, "sliding_window", None)
    is_used = getattr(own, "use_sliding_window", True) is not False
    slides = "sliding_attention" in kinds if kinds else is_used
    if slides and isinstance(window, int) and 0 < window < context:
        yield (
            f"its attention has a sliding window of {window} tokens in a context of {context}; the "
            "policy computes full attention alone"
        )
    chunk = getattr(own, "attention_chunk_size", None)
    if isinstance(chunk, int) and 0 < chunk < context:
        yield f"its attention is in chunks of {chunk} tokens in a context of {context}"
    for cap in ("attn_logit_softcapping", "attn_logit_soft_cap"):
        if getattr(own, cap, None):
            yield f"it caps attention scores ({cap}), which fused attention (sdpa) leaves out"
    if getattr(own, "alibi", False):
        yield "its attention is biased by distance (ALiBi), which shared rows do not keep"


def _ropes(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [rope, *rope.values()] if isinstance(rope, dict) else []
    return [part for part in parts if isinstance(part, dict) and "rope_type" in part]


def refuse_by_copy(
    config: Any, base_model: str, policy_of: Callable[[PreTrainedModel], Policy]
) -> None:
    """Refuse a base whose small random copy gives other logits here than by its own forward pass.

    A config that cannot be made small is not judged by this; the model itself is compared on a
    short sequence when it is loaded.

    Args:
        config: of the whole model.
        base_model: for the message.
        policy_of: makes the policy with fresh adapters on the copy.

    Raises:
        ModelError: with what differs.
    """
    own = config.get_text_config()
    key = json.dumps(own.to_dict(), sort_keys=True, default=str)
    if key not in _checked:
        _checked[key] = _difference(own, policy_of)
    reason = _checked[key]
    if reason is not None:
        raise ModelError(f"base_model {base_model!r} is refused: {reason}")


def _difference(config: Any, policy_of: Callable[[PreTrainedModel], Policy]) -> str | None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(_small(config), attn_implementation="sdpa")
            model = model.float().eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
            ids = torch.randint(1, int(model.config.get_text_config().vocab_size), (_LENGTH,))
            other = torch.cat((ids[: _LENGTH // 2], ids.flip(0)[: _LENGTH // 4]))
            theirs = [
                model(input_ids=x.unsqueeze(0), use_cache=False).logits[0] for x in (ids, other)
            ]
        except Exception as error:  # noqa: BLE001 - sizes of another family may contradict each other
            if "scaled_dot_product_attention" in str(error):
                return "transformers has no fused attention (sdpa) for it"
            logger.debug("no small copy of %s: %s", type(config).__name__, error)
            return None
        try:
            policy = policy_of(model)
        except ModelError as error:
            return str(error)
        with policy.using(policy.agents[0]):
            lone = policy.logits(policy.hidden(ids.unsqueeze(0)))[0]
            if _differs(lone, theirs[0]):
                return f"on {_LENGTH} tokens its logits differ from transformers' own"
            rows = lay_out([tuple(ids.tolist()), tuple(other.tolist())], 4 * _LENGTH)
            if any(_differs(*pair) for pair in zip(_in_rows(policy, rows), theirs, strict=True)):
                return "its logits differ where sequences that begin alike share a row"
        if _differs(_decoded(policy, ids), theirs[0][_LENGTH // 2 :]):
            return "its logits differ where tokens are computed one by one with cached keys"
    return None


def _differs(ours: Tensor, theirs: Tensor) -> bool:
    most = theirs.abs().max().item() * _BOUND
    return not bool((ours - theirs).abs().max() <= most)  # not a number differs


def _in_rows(policy: Policy, rows: list[Row]) -> Iterator[Tensor]:
    """Logits of each sequence's tokens, in the order of the sequences."""
    found: dict[int, Tensor] = {}
    for place, row in enumerate(rows):
        for index, path in zip(row.members, row.paths, strict=True):
            states = policy.states_of(rows, torch.full((len(path),), place), torch.from_numpy(path))
            found[index] = policy.logits(states)
    return (found[index] for index in sorted(found))


def _decoded(policy: Policy, ids: Tensor) -> Tensor:
    """Logits of the second half of a sequence, token after token."""
    half = len(ids) // 2
    cache = DynamicCache()
    with policy.using_rows([policy.agents[0]]):
        policy.hidden(ids[:half].unsqueeze(0), cache=cache, use_cache=True)
        states = [
            policy.step(
                ids[place : place + 1],
                position_B=torch.tensor([place]),
                is_seen_BL=torch.ones(1, place + 1, dtype=torch.bool),
                cache=cache,
            )
            for place in range(half, len(ids))
        ]
    return policy.logits(torch.cat(states))


def _small(config: Any) -> Any:
    """The config with few narrow layers of the same kinds, and short windows and switches."""
    small = copy.deepcopy(config)
    layers = int(config.num_hidden_layers)
    context = context_of(config)
    heads, keys = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == layers:
            setattr(small, name, [value[at] for at in _kept_layers(value)])
        elif _LIMITS.search(name) and isinstance(value, int) and not isinstance(value, bool):
            setattr(small, name, _LIMIT if 0 < value < context else 2 * _LENGTH)
        elif name.endswith("_token_id") and value is not None:
            setattr(small, name, 0)
    for name, size in _SIZES.items():  # by the names that all families understand
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(getattr(type(config), name, None), property):
            setattr(small, name, min(value, size) if "expert" in name else size)
    small.num_hidden_layers = min(layers, _LAYERS)
    if hasattr(config, "max_position_embeddings"):
        small.max_position_embeddings = 2 * _LENGTH
    if isinstance(keys, int):
        small.num_key_value_heads = 1 if keys == 1 else (4 if keys == heads else 2)
    return small


def _kept_layers(kinds: list[Any]) -> list[int]:
    """The layers of a small copy; every kind is among them.

    >>> _kept_layers(["full"] * 5 + ["sliding", "full"])
    [0, 1, 2, 5]
    """
    first = {json.dumps(kind): at for at, kind in reversed(list(enumerate(kinds)))}
    wanted = dict.fromkeys([*sorted(first.values()), *range(len(kinds))])
    return sorted(list(wanted)[:_LAYERS])
