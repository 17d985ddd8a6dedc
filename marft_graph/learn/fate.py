"""The fate of each call: whether it was learnt from, and if not, why not.

Every chat-model call that a node makes in a training episode has exactly one `Fate`. It is decided
here and nowhere else, from what the rollout, the filter and the update know, so that "why is this
node not learning?" has one answer. Knows no files: metrics, reports and `inspect --run` show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from marft_graph.episode import Call, Episode, Failure, SetAside
from marft_graph.names import agent_path

Place = tuple[int, int]
"""Position of an episode among those that an update learns from, and of a call in it."""


class Fate(StrEnum):
    """What became of a call, in the order in which it is decided."""

    NOT_INTERCEPTED = "not_intercepted"
    FROZEN = "frozen"
    UNANSWERED = "unanswered"
    RETRIED = "retried"
    DROPPED = "dropped"
    FAILED = "failed"
    GREEDY = "greedy"
    FILTERED = "filtered"
    UNDONE = "undone"
    WARM_UP = "warm_up"
    FROZEN_TURN = "frozen_turn"
    ALONE = "alone"
    EQUAL_GROUP = "equal_group"
    TRUNCATED = "truncated"
    TRAINED = "trained"

    @property
    def is_learnt(self) -> bool:
        """Whether the call's advantage changed its agent's adapter."""
        return self in (Fate.TRAINED, Fate.TRUNCATED)

    @property
    def words(self) -> str:
        """What it means, for people."""
        return _WORDS[self]

    @property
    def remedy(self) -> str:
        """What to do where a node's calls come to it and should not; empty where that is fine."""
        return _REMEDIES.get(self, "")


_WORDS = {
    Fate.NOT_INTERCEPTED: "the app's own model answered, and nobody had decided that it should",
    Fate.FROZEN: "the node is not trained: its own model answered",
    Fate.UNANSWERED: "not answered: the episode ended first, or the engine refused or failed",
    Fate.RETRIED: "made by an attempt of its node that failed and was tried again",
    Fate.DROPPED: "its episode was dropped, as the reward function failed",
    Fate.FAILED: "its episode failed",
    Fate.GREEDY: "answered at temperature 0: no choice of the policy",
    Fate.FILTERED: "its example's episodes all earned the same, and were left out",
    Fate.UNDONE: "the iteration collapsed, and what it learnt was undone",
    Fate.WARM_UP: "only the critics were trained in this iteration",
    Fate.FROZEN_TURN: "it was another agent's turn",
    Fate.ALONE: "no other episode of its example made this call: nothing to compare it with",
    Fate.EQUAL_GROUP: "advantage 0: all that it is compared with earned the same",
    Fate.TRUNCATED: "learnt from, though it was cut off at the token limit",
    Fate.TRAINED: "learnt from",
}
_REMEDIES = {
    Fate.NOT_INTERCEPTED: "Train the node, or leave it out of `nodes`, which freezes it.",
    Fate.FROZEN: "`nodes` says which nodes are trained; none: every agent.",
    Fate.UNANSWERED: "The report's failures say why; a higher episode_timeout or call_timeout.",
    Fate.RETRIED: "See why the node's attempts fail.",
    Fate.DROPPED: "Mend the reward function; the report's failures have its first error.",
    Fate.FAILED: "The report's failures have each reason's first error. fault_rewards lets "
    "faults of the policy be learnt from.",
    Fate.GREEDY: "temperature: 1.0 samples in training; the app keeps its own outside.",
    Fate.FILTERED: "Examples that are neither always nor never solved, or a reward with steps.",
    Fate.UNDONE: "A lower learning_rate, or a higher kl_coef.",
    Fate.WARM_UP: "critic_warmup says how long.",
    Fate.FROZEN_TURN: "update_order, alternate_every and alternate_order say whose turn it is.",
    Fate.ALONE: "group_by: example compares all calls of an example.",
    Fate.EQUAL_GROUP: "Examples that are neither always nor never solved, a reward with steps in "
    "between, or a larger group_size.",
    Fate.TRUNCATED: "A higher max_new_tokens, or a reward for brevity.",
}
_OF_SET_ASIDE = {
    SetAside.OWN_MODEL: Fate.FROZEN,
    SetAside.UNDECIDED: Fate.NOT_INTERCEPTED,
    SetAside.UNANSWERED: Fate.UNANSWERED,
    SetAside.RETRIED: Fate.RETRIED,
}


@dataclass(frozen=True, slots=True)
class UpdateFacts:
    """What an update did, as far as the fates of its calls depend on it."""

    updated: frozenset[str] = frozenset()
    """Agents whose adapters it changed."""
    is_warm_up: bool = False
    """Whether it trained the critics only."""
    without_advantage: frozenset[Place] = frozenset()
    """Calls all of whose tokens have advantage 0."""
    alone: frozenset[Place] = frozenset()
    """Calls whose group has no other call."""


def fates(
    episodes: Sequence[Episode],
    learnt: Sequence[Episode],
    facts: UpdateFacts,
    *,
    is_undone: bool = False,
) -> Iterator[tuple[str, Fate]]:
    """The node and the fate of every call that was made.

    Args:
        episodes: all of an iteration.
        learnt: those that were given to the update, the same objects.
        facts: of that update.
        is_undone: whether older weights were put back after it.
    """
    whole = [episode for episode in learnt if episode.ok]
    position = {id(episode): e for e, episode in enumerate(whole)}
    for episode in episodes:
        for node, why in episode.set_aside:
            yield agent_path(node), _OF_SET_ASIDE[why]
        e = position.get(id(episode))
        for call in episode.calls:
            fate = _before_the_update(call, episode, is_learnt=e is not None)
            if fate is None and is_undone:
                fate = Fate.UNDONE
            if fate is None and e is not None:
                fate = _in_the_update(call, (e, call.index), facts)
            yield agent_path(call.node), fate or Fate.FILTERED


def _before_the_update(call: Call, episode: Episode, *, is_learnt: bool) -> Fate | None:
    if not episode.ok:
        return Fate.DROPPED if episode.failure is Failure.REWARD else Fate.FAILED
    if call.temperature == 0:
        return Fate.GREEDY
    return None if is_learnt else Fate.FILTERED


def _in_the_update(call: Call, place: Place, facts: UpdateFacts) -> Fate:
    if call.agent not in facts.updated:
        return Fate.WARM_UP if facts.is_warm_up else Fate.FROZEN_TURN
    if place in facts.alone:
        return Fate.ALONE
    if place in facts.without_advantage:
        return Fate.EQUAL_GROUP
    return Fate.TRUNCATED if call.finish_reason == "length" else Fate.TRAINED


def count_fates(fates_by_node: Iterator[tuple[str, Fate]]) -> dict[str, dict[str, int]]:
    """How many calls of each node came to each fate, for the metrics.

    >>> count_fates(iter([("actor", Fate.TRAINED), ("actor", Fate.GREEDY)]))
    {'actor': {'greedy': 1, 'trained': 1}}
    """
    counts: dict[str, Counter[Fate]] = {}
    for node, fate in fates_by_node:
        counts.setdefault(node, Counter())[fate] += 1
    return {
        node: {fate.value: own[fate] for fate in Fate if own[fate]} for node, own in counts.items()
    }
