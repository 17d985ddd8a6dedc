"""Attention in rows where sequences share a beginning: each token reads its own sequence's keys.

A mask over a whole row would do, but most of its work would be thrown away: of eight answers to one
prompt, each would be scored against all others. Here the tokens that a sequence added to its row
meet copies of the keys on its path and no others, in one product for sequences of about one length.
A long sequence has a product of its own, for which no mask of its length squared is ever made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from marft_graph.policy.attention import attend, for_sharing
from marft_graph.policy.rows import Row, lay_out, padded_ids, positions, seen

logger = logging.getLogger(__name__)

_NAME = "marft_graph"
"""Of this attention among those of transformers."""
_PADDING = 1.25
"""Most scores of a product, padding included, as a multiple of those that are wanted ..."""
_PRODUCT = 2**14
"""... beside so many, which are what one product more would cost."""
_MASKED = 2**20
"""Most scores of a product with a mask in memory; sequences with more are read alone."""

Segment = tuple[np.ndarray, np.ndarray]
"""Places of a sequence's own tokens and of its path, among all tokens of a batch of rows."""


class Segments:
    """Which keys each token of some rows reads.

    Args:
        rows: a batch, padded to its longest row.
        device: of queries and keys.
        dtype: of queries and keys.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> None:
        length = max(row.length for row in rows)
        place_T = np.zeros(len(rows) * length, dtype=np.int64)  # padding may take any answer
        self._products: list[_Padded | _Alone] = []
        answers = 0
        for part in _products(_segments(rows, length)):
            is_masked = _scores(part) <= _MASKED
            self._products.append((_Padded if is_masked else _Alone)(part, device, dtype))
            padded = max(len(own) for own, _ in part)
            for own, _ in part:
                place_T[own] = np.arange(answers, answers + len(own))
                answers += padded
        self._place_T = torch.from_numpy(place_T).to(device)
        self.reads = 0
        """Layers that have asked so far."""

    def attend(self, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, scale: float) -> Tensor:
        """What all tokens read (B, T, H, S)."""
        self.reads += 1
        batch, heads, length, _ = q_BHTS.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTS, k_BKTS, v_BKTS))
        answers = [product.attend(q, k, v, scale) for product in self._products]
        whole = torch.cat(answers).index_select(0, self._place_T)
        return whole.view(batch, length, heads, -1)


class _Padded:
    """Sequences of about one length in one product, with a mask."""

    def __init__(self, part: Sequence[Segment], device: torch.device, dtype: torch.dtype) -> None:
        query_MS, key_ML, is_seen_MSL = (torch.from_numpy(x).to(device) for x in _padded(part))
        self._query_MS, self._key_ML = query_MS, key_ML
        self._hidden = {1: hiding(is_seen_MSL, dtype).unsqueeze(1)}
        """What is added to scores, by the number of queries that share a key head."""

    def attend(self, q_NHS: Tensor, k_NKS: Tensor, v_NKS: Tensor, scale: float) -> Tensor:
        """What the own tokens read, sequence after sequence (M S, H, size)."""
        shared = q_NHS.shape[1] // k_NKS.shape[1]
        if shared not in self._hidden:
            self._hidden[shared] = for_sharing(self._hidden[1], shared)
        own = (
            _taken(q_NHS, self._query_MS),
            _taken(k_NKS, self._key_ML),
            _taken(v_NKS, self._key_ML),
        )
        return attend(*own, self._hidden[shared], scale).transpose(1, 2).flatten(0, 1)


class _Alone:
    """One long sequence, whose own tokens are the last of its path."""

    def __init__(self, part: Sequence[Segment], device: torch.device, dtype: torch.dtype) -> None:
        ((own, path),) = part
        self._query = _places(own, device)
        self._key = _places(path, device)
        self._is_whole = len(own) == len(path)
        self._hidden: Tensor | None = None
        if not self._is_whole:
            self._hidden = _hidden_of_last(len(own), len(path), device, dtype)

    def attend(self, q_NHS: Tensor, k_NKS: Tensor, v_NKS: Tensor, scale: float) -> Tensor:
        """What the own tokens read (S, H, size)."""
        q = q_NHS[self._query].transpose(0, 1).unsqueeze(0)
        k, v = (x[self._key].transpose(0, 1).unsqueeze(0) for x in (k_NKS, v_NKS))
        if self._is_whole:
            read = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        else:
            shared = q.shape[1] // k.shape[1]
            on_cpu = q.device.type == "cpu"  # where alone keys may be shared beside a mask
            k, v = (x if on_cpu else x.repeat_interleave(shared, dim=1) for x in (k, v))
            read = functional.scaled_dot_product_attention(
                q.flip(2), k, v, attn_mask=self._hidden, scale=scale, enable_gqa=on_cpu
            ).flip(2)
        return read.squeeze(0).transpose(0, 1)


def _places(place_T: np.ndarray, device: torch.device) -> Tensor | slice:
    """Places as a slice, which copies nothing, where they stand one after another."""
    first, count = int(place_T[0]), len(place_T)
    if int(place_T[-1]) - first == count - 1:  # they only ever rise
        return slice(first, first + count)
    return torch.from_numpy(place_T).to(device)


def _hidden_of_last(own: int, path: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What is added to scores (1, 1, S, L) of the last S of L tokens, **the last of them first**.

    In that order a token sees one key less than the one before it, so that all rows of the mask are
    parts of one line of S + L numbers: it takes no memory of S times L.

    >>> (_hidden_of_last(2, 4, torch.device("cpu"), torch.float32) == 0)[0, 0].int()
    tensor([[1, 1, 1, 1],
            [1, 1, 1, 0]], dtype=torch.int32)
    """
    line = torch.zeros(own + path - 1, device=device, dtype=dtype)
    line[path:] = torch.finfo(dtype).min
    return line.as_strided((1, 1, own, path), (0, 0, 1, 1))


def hiding(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores; on a CPU a mask of booleans would cost half as much again."""
    hidden = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
    return hidden.masked_fill_(~is_seen, torch.finfo(dtype).min)


def read_segments(model: PreTrainedModel, decoder: nn.Module) -> bool:
    """Let a model's attention take `segments`; whether it does, and agrees with a mask.

    A model that does not stays as it was.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    if _agrees(decoder, int(model.config.get_text_config().num_hidden_layers)):
        return True
    logger.warning("%s attends to rows by masks", type(decoder).__name__)
    model.set_attn_implementation(before)
    return False


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA, which also takes `segments` in place of a mask."""
    if segments is not None:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return segments.attend(query, key, value, scale), None
    output: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )[0]
    return output, None


AttentionInterface.register(_NAME, _attention)


@torch.no_grad()
def _agrees(decoder: Any, layers: int) -> bool:
    """Whether a mask and segments give the same states."""
    weight = decoder.get_input_embeddings().weight
    most = len(weight) - 1
    rows = lay_out([tuple(min(i, most) for i in ids) for ids in ((1, 2, 3), (1, 2, 4, 5))], 16)
    inputs = {"input_ids": padded_ids(rows), "position_ids": positions(rows)}
    given = {name: torch.from_numpy(x).to(weight.device) for name, x in inputs.items()}
    hidden = hiding(torch.from_numpy(seen(rows)).unsqueeze(1).to(weight.device), weight.dtype)
    segments = Segments(rows, weight.device, weight.dtype)
    theirs = decoder(**given, attention_mask=hidden, use_cache=False).last_hidden_state.float()
    try:
        ours = decoder(**given, segments=segments, use_cache=False).last_hidden_state.float()
    except TypeError:  # one of its parts takes no argument of this name
        return False
    bound = theirs.abs().max().item() * (1e-4 if weight.dtype == torch.float32 else 5e-2)
    return segments.reads == layers and bool((ours - theirs).abs().max() <= bound)


def _segments(rows: Sequence[Row], length: int) -> list[Segment]:
    """What each sequence added, and its path, where rows stand one after another."""
    return [
        (number * length + own, number * length + path)
        for number, row in enumerate(rows)
        for own, path in zip(row.own, row.paths, strict=True)
        if len(own)
    ]


def _scores(part: Sequence[Segment]) -> int:
    """Scores of a product of some segments, padding included."""
    return len(part) * max(len(own) for own, _ in part) * max(len(path) for _, path in part)


def _products(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Parts in which padding costs little; of more scores than a mask may have, one segment."""
    part: list[Segment] = []
    wanted = longest = 0
    for segment in sorted(segments, key=lambda s: (-len(s[0]), -len(s[1]))):
        own, path = map(len, segment)
        most = len(part[0][0]) if part else own
        padded = (len(part) + 1) * most * max(longest, path)
        is_wasteful = padded > _PADDING * (wanted + own * path) + _PRODUCT
        if part and (is_wasteful or padded > _MASKED):
            yield part
            part, wanted, longest = [], 0, 0
        part.append(segment)
        wanted += own * path
        longest = max(longest, path)
    if part:
        yield part


def _padded(part: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Own tokens (M, S), paths (M, L), and which of the latter each of the former sees.

    Both are padded with the first token of the batch; what is no token sees one key, for a softmax
    needs something.
    """
    most, longest = max(len(own) for own, _ in part), max(len(path) for _, path in part)
    query_MS = np.zeros((len(part), most), dtype=np.int64)
    key_ML = np.zeros((len(part), longest), dtype=np.int64)
    is_seen_MSL = np.zeros((len(part), most, longest), dtype=np.bool_)
    is_seen_MSL[:, :, 0] = True
    for n, (own, path) in enumerate(part):
        query_MS[n, : len(own)] = own
        key_ML[n, : len(path)] = path
        before = len(path) - len(own)
        is_seen_MSL[n, : len(own), : len(path)] = np.tri(len(own), len(path), before, np.bool_)
    return query_MS, key_ML, is_seen_MSL


def _taken(x_NHS: Tensor, place_MT: Tensor) -> Tensor:
    """(M, H, T, S): the heads of tokens at some places."""
    taken = x_NHS.index_select(0, place_MT.flatten())
    return taken.view(*place_MT.shape, *x_NHS.shape[1:]).transpose(1, 2)
