"""Advantages along the calls' dependency graph, and their group-relative and normalised forms.

Pure functions of plain numbers; nothing here knows agents, models or episodes.

For an episode with calls 0..N-1 in topological order, own rewards r_k, values V_k and outcome R:
let S_i be call i and its descendants, P_i(k) the parents of k inside S_i, and Z_i the calls of S_i
with no child in S_i. With r'_k = r_k + R/|Z_i| for k in Z_i, else r_k::

    delta_k = r'_k + gamma * sum over children c in S_i of V_c / |P_i(c)|  -  V_k
    e(i) = 1,   e(k) = gamma * lam * mean over p in P_i(k) of e(p)
    A_i  = sum over k in S_i of e(k) * delta_k,        return_i = A_i + V_i

On a chain this is GAE (Schulman et al. 2016, arXiv 1506.02438) as MARFT (arXiv 2504.16129) applies
it across agents. A recursion over children would count the sink of a diamond twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

Parents = Sequence[Sequence[int]]
_ROUNDING = 1e-14
"""Relative difference under which returns are equal: sums in another order differ by less."""


def dag_gae(
    rewards: Sequence[float] | Tensor,
    values: Sequence[float] | Tensor,
    parents: Parents,
    outcome: float,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (both (N,)) of an episode's calls, in units of reward.

    Args:
        rewards: own reward of each call (N,).
        values: value of the state before each call (N,).
        parents: for each call the indices of the calls it depends on, all smaller than its own.
        outcome: the episode's outcome reward, shared by the sinks of what a call influenced.
        gamma: discount from a call to its children.
        lam: GAE lambda across calls.

    Returns:
        Tensors in the dtype of `values` if that is a floating tensor, else float64.

    Raises:
        ValueError: lengths differ, a tensor has not one axis, or a parent does not come before its
            child.

    >>> advantages, returns = dag_gae([0, 0], [0.5, 0.25], [(), (0,)], 1.0, gamma=1.0, lam=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([0.125, 0.75], [0.625, 1.0])
    """
    floating = isinstance(values, Tensor) and values.is_floating_point()
    value_N = torch.as_tensor(values, dtype=None if floating else torch.float64).detach()
    _check_one_axis("values", value_N)
    advantages, returns = token_gae(
        rewards,
        [[value] for value in value_N.tolist()],
        parents,
        outcome,
        gamma=gamma,
        lam=lam,
    )
    firsts = ([own[0] for own in each] for each in (advantages, returns))
    advantage_N, return_N = (value_N.new_tensor(first) for first in firsts)
    return advantage_N, return_N


def token_gae(
    rewards: Sequence[float] | Tensor,
    values: Sequence[Sequence[float]],
    parents: Parents,
    outcome: float,
    *,
    gamma: float,
    lam: float,
    gamma_token: float = 1.0,
    lam_token: float = 1.0,
    token_rewards: Sequence[Sequence[float]] | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """The same definition on the graph of tokens: advantages and returns of every token.

    A call is a chain of its tokens (discounted by `gamma_token`, `lam_token`); its last token leads
    to the first token of each child (discounted by `gamma`, `lam`). Linear in tokens: a call enters
    its ancestors' sums as one number. Plain numbers in and out: tensors of a few tokens cost more.

    Args:
        rewards: own reward of each call (N,), paid at its last token.
        values: for each call the values before its tokens, (T_i,), T_i at least 1.
        parents: for each call the indices of the calls it depends on, all smaller than its own.
        outcome: the episode's outcome reward, paid at last tokens.
        gamma: discount from a call's last token to its children.
        lam: GAE lambda for the same step.
        gamma_token: discount between tokens of a call.
        lam_token: GAE lambda between tokens of a call.
        token_rewards: further rewards of single tokens, (T_i,) for each call, such as a KL penalty.

    Returns:
        For each call advantages (T_i,) and returns (T_i,).

    Raises:
        ValueError: lengths differ, a call has no token, or a parent does not come before its child.
    """
    _check(rewards, values, parents, token_rewards)
    first = [own[0] for own in values]
    children = _children(parents)
    decay_token = gamma_token * lam_token
    # Inside a call all deltas but the last token's are the same whoever looks at it.
    inner = [
        _inner_deltas(own, gamma_token, None if token_rewards is None else token_rewards[k])
        for k, own in enumerate(values)
    ]
    ended = [_discounted_sums(deltas, decay_token) for deltas in inner]
    parents = [tuple(dict.fromkeys(own)) for own in parents]
    advantages, returns = [], []
    for i in range(len(values)):
        members = _descendants(i, children)
        inside = set(members)
        parents_in = {k: [p for p in parents[k] if p in inside] for k in members}
        sinks = sum(not any(c in inside for c in children[k]) for k in members)
        # e at each member's first token, and the sum of everything after call i's last token
        weight, after = {i: 1.0}, 0.0
        last_delta = 0.0
        for k in members:
            reward = float(rewards[k])
            kids = [c for c in children[k] if c in inside]
            if not kids:
                reward += outcome / sinks
            bonus = reward + gamma * sum(first[c] / len(parents_in[c]) for c in kids)
            if k == i:
                last_delta = bonus
                continue
            # e enters k from its parents' last tokens, each decayed over the parent's own tokens;
            # call i's own decay is put in below, token by token
            weight[k] = (
                gamma
                * lam
                * sum(
                    weight[p] * (1.0 if p == i else decay_token ** (len(values[p]) - 1))
                    for p in parents_in[k]
                )
                / len(parents_in[k])
            )
            after += weight[k] * (ended[k][0] + decay_token ** (len(values[k]) - 1) * bonus)
        deltas = inner[i].copy()
        deltas[-1] += last_delta + after
        own = _discounted_sums(deltas, decay_token)
        advantages.append(own)
        returns.append([a + value for a, value in zip(own, values[i], strict=True)])
    return advantages, returns


def call_returns(rewards: Sequence[float] | Tensor, parents: Parents, outcome: float) -> Tensor:
    """What each call's return is at gamma 1 (N,), float64: own and descendants' rewards, each once,
    plus the outcome.

    >>> call_returns([1.0, 2.0, 4.0], [(), (0,), (0,)], 0.5).tolist()
    [7.5, 2.5, 4.5]
    """
    _check(rewards, [[0.0]] * len(rewards), parents, None)
    children = _children(parents)
    sums = [sum(float(rewards[k]) for k in _descendants(i, children)) for i in range(len(rewards))]
    return torch.tensor([total + outcome for total in sums], dtype=torch.float64)


def group_advantages(
    returns_N: Tensor, groups: Sequence[Hashable], *, scale: bool, epsilon: float = 1e-6
) -> Tensor:
    """Returns relative to the mean of their group (N,); no critic (GRPO, arXiv 2402.03300).

    Computed in float64 and returned in it: returns may be large against what they differ by.

    Args:
        returns_N: return of each call.
        groups: for each call the group it belongs to; a group of one has advantage 0.
        scale: also divide by the group's population standard deviation (denominator: group size).
        epsilon: added to the deviation; a group whose returns are all equal has advantage 0.

    >>> group_advantages(torch.tensor([1.0, 0.0, 5.0]), ["a", "a", "b"], scale=False).tolist()
    [0.5, -0.5, 0.0]
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    if len(groups) != len(returns_N):
        raise ValueError(f"{len(returns_N)} returns but {len(groups)} groups; give one for each")
    returns_N = returns_N.double()
    advantages_N = torch.zeros_like(returns_N)
    for indices in members.values():
        own = returns_N[indices]
        if are_equal(own):
            continue  # exactly 0, where rounding of the mean would leave noise to be scaled up
        centred = own - own.mean()
        if scale:
            centred = centred / (centred.square().mean().sqrt() + epsilon)
        advantages_N[indices] = centred
    return advantages_N


def normalize(advantages_N: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Advantages with mean 0 and population deviation 1 over all N entries.

    The mean is not added back. Entries that are all equal become 0. Computed in float64 and
    returned in it.

    >>> normalize(torch.tensor([1.0, 3.0])).round(decimals=6).tolist()
    [-1.0, 1.0]
    """
    advantages_N = advantages_N.double()
    if are_equal(advantages_N):
        return torch.zeros_like(advantages_N)
    centred = advantages_N - advantages_N.mean()
    return centred / (centred.square().mean().sqrt() + epsilon)


def are_equal(values_N: Tensor) -> bool:
    """Whether values (N,) are all one value but for rounding; so are none.

    >>> are_equal(torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64))
    True
    """
    if len(values_N) == 0:
        return True
    spread = values_N.max() - values_N.min()
    return bool(spread <= _ROUNDING * values_N.abs().max())


def _inner_deltas(
    values: Sequence[float], gamma_token: float, rewards: Sequence[float] | None
) -> list[float]:
    """A call's TD errors, the last without what follows the call and without the call's reward."""
    following = [*values[1:], 0.0]
    deltas = [gamma_token * after - value for value, after in zip(values, following, strict=True)]
    if rewards is None:
        return deltas
    return [delta + reward for delta, reward in zip(deltas, rewards, strict=True)]


def _discounted_sums(deltas: Sequence[float], decay: float) -> list[float]:
    """sum over s >= t of decay^(s-t) delta_s, for each t."""
    total, sums = 0.0, []
    for delta in reversed(deltas):
        total = delta + decay * total
        sums.append(total)
    return sums[::-1]


def _children(parents: Parents) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in parents]
    for child, own in enumerate(parents):
        for parent in dict.fromkeys(own):  # named twice is observed once
            children[parent].append(child)
    return children


def _descendants(i: int, children: Sequence[Sequence[int]]) -> list[int]:
    """Call i and everything that depends on it, in topological order."""
    found, todo = {i}, [i]
    while todo:
        for child in children[todo.pop()]:
            if child not in found:
                found.add(child)
                todo.append(child)
    return sorted(found)


def _check_one_axis(name: str, numbers: Tensor) -> None:
    if numbers.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}; give one number for each call")


def _check(
    rewards: Sequence[float] | Tensor,
    values: Sequence[Sequence[float]],
    parents: Parents,
    token_rewards: Sequence[Sequence[float]] | None,
) -> None:
    if isinstance(rewards, Tensor):
        _check_one_axis("rewards", rewards)
    if not len(rewards) == len(values) == len(parents):
        raise ValueError(
            f"{len(rewards)} rewards, {len(values)} values and {len(parents)} parent lists; give "
            "one of each for every call"
        )
    for i, own in enumerate(parents):
        if any(not 0 <= parent < i for parent in own):
            raise ValueError(f"call {i} has parents {tuple(own)}; each must be from 0 to {i - 1}")
        if len(values[i]) == 0:
            raise ValueError(f"call {i} has no token")
    if token_rewards is not None and [len(r) for r in token_rewards] != [len(v) for v in values]:
        raise ValueError("token_rewards must have one number for each token")
