"""The same held-out examples before and after training, node by node, as HTML.

All text of models and data is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from marft_graph.episode import Call, Episode
from marft_graph.run.comparison_page import last_words, readable_text

_BETTER, _WORSE, _LEAST = 4, 3, 2
"""Examples shown of each kind; the least number in all, where so many are known."""

Pair = tuple[Episode, Episode]


def changed_section(before: Sequence[Episode], after: Sequence[Episode]) -> str:
    """Those that changed most, for better and for worse; empty where no example was run twice."""
    old = {episode.example_index: episode for episode in before if episode.ok}
    pairs = [(old[e.example_index], e) for e in after if e.ok and e.example_index in old]
    if not pairs:
        return ""
    pairs.sort(key=lambda pair: -_gain(pair))  # stable: the data's order among equals
    better = [pair for pair in pairs if _gain(pair) > 0][:_BETTER]
    worse = [pair for pair in reversed(pairs) if _gain(pair) < 0][:_WORSE]
    same = [pair for pair in pairs if _gain(pair) == 0]
    same = same[: max(0, _LEAST - len(better) - len(worse))]
    parts = [
        f"<h3>{title}</h3>{''.join(map(_pair, chosen))}"
        for title, chosen in (("Better", better), ("Worse", worse), ("The same", same))
        if chosen
    ]
    return f"<h2>Sample episodes, before and after</h2>{''.join(parts)}"


def _gain(pair: Pair) -> float:
    return pair[1].total_reward - pair[0].total_reward


def _pair(pair: Pair) -> str:
    before, after = pair
    example = readable_text(json.dumps(dict(after.example), ensure_ascii=False))
    nodes = "".join(
        f"<h4>{readable_text(node)}</h4>"
        f'<div class="pair">{_said(old, "before")}{_said(new, "after")}</div>'
        for node, old, new in _aligned(before, after)
    )
    return (
        f'<div class="card"><span class="soft">return {before.total_reward:.2f} → '
        f"<b>{after.total_reward:.2f}</b></span><pre>{example}</pre>{nodes}</div>"
    )


def _aligned(before: Episode, after: Episode) -> Iterator[tuple[str, Call | None, Call | None]]:
    """Each node's first call of both episodes, its second of both, and so on."""
    old, new = _by_turn(before), _by_turn(after)
    for node, turn in dict.fromkeys([*new, *old]):
        name = node if turn == 0 else f"{node}, call {turn + 1}"
        yield name, old.get((node, turn)), new.get((node, turn))


def _by_turn(episode: Episode) -> Mapping[tuple[str, int], Call]:
    turns: dict[str, int] = {}
    found = {}
    for call in episode.calls:
        turn = turns.get(call.node, 0)
        turns[call.node] = turn + 1
        found[call.node, turn] = call
    return found


def _said(call: Call | None, when: str) -> str:
    if call is None:
        return f'<div><span class="soft">{when}: was not asked</span></div>'
    return (
        f'<div><span class="soft">{when}, {call.tokens[1]} tokens</span>'
        f"<pre>{readable_text(last_words(call.messages))}</pre></div>"
    )
