"""What a report says first: whether the run made the app better, in words.

Pure functions of metrics and of the held-out episodes before and after training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marft_graph.episode import Episode
from marft_graph.run.paired import PairedDifference, paired_difference

Row = Mapping[str, Any]

_WORDS = {
    "better": ("good", "Training made the app better."),
    "worse": ("bad", "Training made the app worse."),
    "no difference shown": ("", "No difference shown: the change may be chance."),
}


def headline_section(
    rows: Sequence[Row],
    evaluations: Sequence[Row],
    before: Sequence[Episode],
    after: Sequence[Episode],
) -> str:
    """The verdict, held-out return before and after, and the interval of the difference, as HTML.

    Args:
        rows: of `metrics.jsonl`.
        evaluations: rows of `evaluations.jsonl`.
        before: sampled held-out episodes before training; none: no verdict.
        after: those after it.
    """
    if len(evaluations) < 2:
        done = rows[-1]["iteration"] if rows else 0
        return f"<p>{done} iterations; no two evaluations to compare yet.</p>"
    differences = paired_differences(before, after)
    found = paired_difference(differences) if differences else None
    return (
        f"{_verdict(found)}{_returns(evaluations)}{_evidence(evaluations[-1], differences, found)}"
    )


def paired_differences(before: Sequence[Episode], after: Sequence[Episode]) -> list[float]:
    """After minus before, for each example whose episodes both ended well."""
    old = {e.example_index: e.total_reward for e in before if e.ok}
    return [e.total_reward - old[e.example_index] for e in after if e.ok and e.example_index in old]


def _verdict(found: PairedDifference | None) -> str:
    if found is None:
        return ""
    style, words = _WORDS[found.verdict]
    return f'<p class="big {style}"><b>{words}</b></p>'


def _returns(evaluations: Sequence[Row]) -> str:
    first, last = evaluations[0], evaluations[-1]
    lines = [
        f'<p class="big">Held-out return {first["eval_return"]:.3f} → '
        f"<b>{last['eval_return']:.3f}</b> sampled"
    ]
    if "eval_return_greedy" in first and "eval_return_greedy" in last:
        lines.append(
            f", {first['eval_return_greedy']:.3f} → <b>{last['eval_return_greedy']:.3f}</b> greedy"
        )
    return "".join(lines) + "</p>"


def _evidence(last: Row, differences: Sequence[float], found: PairedDifference | None) -> str:
    text = f"{last['iteration']} iterations"
    if found is not None:
        better = sum(value > 0 for value in differences)
        worse = sum(value < 0 for value in differences)
        text += (
            f", {found.pairs} held-out examples; difference {found.mean:+.3f}, "
            f"95 % interval {found.low:+.3f} to {found.high:+.3f}: <b>{found.verdict}</b>. "
            f"{better} examples earned more than before, {worse} less, "
            f"{found.pairs - better - worse} the same"
        )
        if found.verdict == "no difference shown":
            text += (
                ". Four times as many examples (eval_examples) would make the interval half as wide"
            )
    return f'<p class="soft">{text}.</p>'
