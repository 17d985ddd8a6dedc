"""Prompts through the model: what they have in common once, what answered calls left not again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from marft_graph.engine.prefixes import Kept, Prefixes
from marft_graph.policy.adapters import Policy
from marft_graph.policy.rows import Row, lay_out

Prompt = tuple[str | None, tuple[int, ...]]
"""An agent and the token ids of its prompt."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Some prompts' keys and values, and the logits after each."""

    members: list[int]
    """Indices of the prompts."""
    cache: DynamicCache
    row_M: list[int]
    """Row of each prompt in the cache."""
    paths: list[np.ndarray]
    """Columns of each prompt's tokens in its row."""
    logits_MV: Tensor
    computed: int
    """Tokens that went through the model, without padding."""


def prefill(
    policy: Policy, prompts: Sequence[Prompt], prefixes: Prefixes, max_tokens: int
) -> Iterator[Prefilled]:
    """All prompts, in batches of at most `max_tokens` padded tokens (or one row)."""
    fresh: list[int] = []
    continued: list[tuple[int, Kept, int]] = []
    for index, (agent, ids) in enumerate(prompts):
        found = prefixes.find(agent, ids)
        if found is None:
            fresh.append(index)
        else:
            continued.append((index, *found))
    yield from _fresh(policy, prompts, fresh, max_tokens)
    continued.sort(key=lambda item: len(prompts[item[0]][1]))
    while continued:
        count = max(1, max_tokens // len(prompts[continued[0][0]][1]))
        # Padded to the longest, so a batch has prompts of about one length.
        while count > 1 and count * len(prompts[continued[:count][-1][0]][1]) > max_tokens:
            count -= 1
        yield _continued(policy, prompts, continued[:count])
        continued = continued[count:]


def _fresh(
    policy: Policy, prompts: Sequence[Prompt], indices: Sequence[int], max_tokens: int
) -> Iterator[Prefilled]:
    """Prompts of which nothing is known; those of one agent share rows where they begin alike."""
    by_agent: dict[str | None, list[int]] = {}
    for index in indices:
        by_agent.setdefault(prompts[index][0], []).append(index)
    rows: list[tuple[str | None, Row]] = []
    for agent, own in by_agent.items():
        laid_out = lay_out(
            [prompts[i][1] for i in own],
            min(max_tokens, policy.longest_shared_row),
            quadratic=policy.attention_cost,
        )
        for row in laid_out:
            row.members = [own[i] for i in row.members]
            rows.append((agent, row))
    rows.sort(key=lambda item: -item[1].length)  # stable: batches of about one length
    while rows:
        count = max(1, max_tokens // rows[0][1].length)
        yield _one_batch(policy, rows[:count])
        rows = rows[count:]


def _one_batch(policy: Policy, agent_rows: Sequence[tuple[str | None, Row]]) -> Prefilled:
    rows = [row for _, row in agent_rows]
    members = [index for row in rows for index in row.members]
    paths = [path for row in rows for path in row.paths]
    row_M = [place for place, row in enumerate(rows) for _ in row.members]
    cache = DynamicCache(config=policy.config)
    with policy.using_rows([agent for agent, _ in agent_rows]):
        last_M = torch.tensor([int(path[-1]) for path in paths], device=policy.device)
        states_MH = policy.states_of(
            rows,
            torch.tensor(row_M, device=policy.device),
            last_M,
            cache=cache,
            use_cache=True,
        )
        logits_MV = policy.logits(states_MH)
    return Prefilled(members, cache, row_M, paths, logits_MV, sum(row.length for row in rows))


def _continued(
    policy: Policy, prompts: Sequence[Prompt], items: Sequence[tuple[int, Kept, int]]
) -> Prefilled:
    """Prompts that begin as kept sequences do: only what follows goes through the model."""
    device = policy.device
    ends = [prompts[index][1][shared:] for index, _, shared in items]
    past, longest = max(shared for _, _, shared in items), max(map(len, ends))
    cache = _past(policy, [(kept, shared) for _, kept, shared in items], past)
    position_MS = np.zeros((len(items), longest), dtype=np.int64)
    is_seen_MSL = np.zeros((len(items), longest, past + longest), dtype=np.bool_)
    is_seen_MSL[:, :, past:] = np.tri(longest, dtype=np.bool_)
    ids_MS = np.zeros((len(items), longest), dtype=np.int64)
    paths = []
    for place, ((_, _, shared), end) in enumerate(zip(items, ends, strict=True)):
        ids_MS[place, : len(end)] = end
        position_MS[place] = shared + np.arange(longest)
        is_seen_MSL[place, :, :shared] = True
        paths.append(np.concatenate([np.arange(shared), past + np.arange(len(end))]))
    with policy.using_rows([prompts[index][0] for index, _, _ in items]):
        last_M = torch.tensor([place * longest + len(end) - 1 for place, end in enumerate(ends)])
        states_MH = policy.states(
            torch.from_numpy(ids_MS).to(device),
            last_M.to(device),
            is_seen_BTT=torch.from_numpy(is_seen_MSL).to(device),
            position_ids=torch.from_numpy(position_MS).to(device),
            cache=cache,
            use_cache=True,
        )
        logits_MV = policy.logits(states_MH)
    members = [index for index, _, _ in items]
    return Prefilled(members, cache, list(range(len(items))), paths, logits_MV, sum(map(len, ends)))


def _past(policy: Policy, kept: Sequence[tuple[Kept, int]], longest: int) -> DynamicCache:
    """A cache with the beginnings of kept sequences, right-padded."""
    cache = DynamicCache(config=policy.config)
    for number in range(len(kept[0][0].layers)):
        keys, values = (
            _padded([own.layers[number][which][:, :shared] for own, shared in kept], longest)
            for which in (0, 1)
        )
        cache.update(keys, values, number)
    return cache


def _padded(parts: Sequence[Tensor], longest: int) -> Tensor:
    """Keys or values (heads, tokens, size) of several sequences, right-padded."""
    first = parts[0]
    padded = first.new_zeros((len(parts), first.shape[0], longest, first.shape[2]))
    for place, part in enumerate(parts):
        padded[place, :, : part.shape[1]] = part
    return padded
