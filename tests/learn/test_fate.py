"""Every call has exactly one fate, and it is the one that kept it from being learnt from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marft_graph.episode import Call, Episode, Failure, SetAside
from marft_graph.learn.fate import Fate, UpdateFacts, count_fates, fates


def call(node: str = "actor", index: int = 0, **changes: Any) -> Call:
    fields = {"finish_reason": "stop", "adapter_version": 0, **changes}
    return Call(node, node, index, (), (1,), (2,), (0.0,), **fields)


def fate_of(
    one: Call, facts: UpdateFacts | None = None, *, is_undone: bool = False, **episode: Any
) -> Fate:
    """The fate of a call in an episode that was learnt from unless it failed."""
    whole = Episode({}, (one,), **episode)
    facts = UpdateFacts(frozenset({"actor"})) if facts is None else facts
    ((_, fate),) = fates([whole], [whole], facts, is_undone=is_undone)
    return fate


BOTH = frozenset({"actor", "planner"})


@pytest.mark.parametrize(
    ("fate", "given"),
    [
        ("trained", {}),
        ("truncated", {"one": call(finish_reason="length")}),
        ("equal_group", {"facts": UpdateFacts(BOTH, without_advantage=frozenset({(0, 0)}))}),
        (
            "alone",
            {
                "facts": UpdateFacts(
                    BOTH, without_advantage=frozenset({(0, 0)}), alone=frozenset({(0, 0)})
                )
            },
        ),
        ("frozen_turn", {"facts": UpdateFacts(frozenset({"planner"}))}),
        ("warm_up", {"facts": UpdateFacts(is_warm_up=True)}),
        ("undone", {"is_undone": True}),
        ("greedy", {"one": call(temperature=0.0)}),
        ("failed", {"status": "failed: timeout", "failure": Failure.TIMEOUT}),
        ("dropped", {"status": "failed: RewardError", "failure": Failure.REWARD}),
    ],
)
def test_a_call_comes_to_the_fate_that_decided_it(fate: str, given: dict[str, Any]) -> None:
    assert fate_of(given.pop("one", call()), **given) == fate


def test_an_example_that_was_left_out_is_filtered_whatever_the_update_did() -> None:
    left_out, kept = Episode({}, (call(),)), Episode({}, (call(),), example_index=1)
    facts = UpdateFacts(BOTH, without_advantage=frozenset({(0, 0)}))
    assert [f for _, f in fates([left_out, kept], [kept], facts)] == ["filtered", "equal_group"]


def test_places_count_whole_episodes_alone() -> None:
    """An update numbers the episodes that did not fail."""
    failed, whole = Episode({}, (call(),), status="failed: X"), Episode({}, (call(),))
    facts = UpdateFacts(BOTH, without_advantage=frozenset({(0, 0)}))
    found = [f for _, f in fates([failed, whole], [failed, whole], facts)]
    assert found == ["failed", "equal_group"]


def test_calls_that_are_not_the_episodes_are_counted_too() -> None:
    aside = tuple(("team/writer/agent", why) for why in SetAside)
    episode = Episode({}, (call(),), set_aside=aside)
    counts = count_fates(fates([episode], [episode], UpdateFacts(BOTH)))
    assert counts["team/writer"] == {
        "retried": 1, "unanswered": 1, "frozen": 1, "not_intercepted": 1
    }  # fmt: skip
    assert counts["actor"] == {"trained": 1}


def test_every_fate_has_words_and_what_is_no_success_says_what_to_do() -> None:
    assert len({fate.words for fate in Fate}) == len(Fate)
    assert all(fate.remedy for fate in Fate if not fate.is_learnt)


calls = st.builds(
    call,
    st.sampled_from(["actor", "planner", "team/judge"]),
    temperature=st.sampled_from([0.0, 1.0]),
    finish_reason=st.sampled_from(["stop", "length"]),
)
asides = st.lists(st.tuples(st.sampled_from(["actor", "own"]), st.sampled_from(SetAside)))


@st.composite
def episodes_of(draw: st.DrawFn) -> Episode:
    own = draw(st.lists(calls, max_size=4))
    numbered = tuple(call(c.node, i, temperature=c.temperature, finish_reason=c.finish_reason)
                     for i, c in enumerate(own))  # fmt: skip
    failure = draw(st.sampled_from([None, *Failure]))
    status = "ok" if failure is None else f"failed: {failure}"
    return Episode({}, numbered, status=status, failure=failure, set_aside=tuple(draw(asides)))


places = st.frozensets(st.tuples(st.integers(0, 4), st.integers(0, 3)))
agents = st.frozensets(st.sampled_from(["actor", "planner", "team/judge"]))


@given(
    st.lists(st.tuples(episodes_of(), st.booleans()), max_size=5),
    st.builds(UpdateFacts, agents, st.booleans(), places, places),
    st.booleans(),
)
def test_the_counts_sum_to_the_calls_that_were_made(
    drawn: list[tuple[Episode, bool]], facts: UpdateFacts, is_undone: bool
) -> None:
    episodes = [episode for episode, _ in drawn]
    learnt = [episode for episode, is_learnt in drawn if is_learnt]
    counts = count_fates(fates(episodes, learnt, facts, is_undone=is_undone))
    made = Counter(c.node for e in episodes for c in e.calls)
    made += Counter(node for e in episodes for node, _ in e.set_aside)
    assert {node: sum(own.values()) for node, own in counts.items()} == made
    if is_undone or not learnt:
        assert not {"trained", "truncated"} & {fate for own in counts.values() for fate in own}
