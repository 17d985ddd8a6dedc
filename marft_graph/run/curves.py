"""Line charts: small inline SVG for the report, and a PNG of runs over seeds for a README."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marft_graph.run.tracking import read_evaluations, read_metrics
from marft_graph.visible import visible

_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777")
_LONGEST_NAME = 48
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 420, 220, 48, 28, 26


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line of (x, y) points."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, curves: Sequence[Curve]) -> str:
    """An SVG chart that follows the page's text colour; empty where there is no point."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(0.0, *ys), max(ys)
    if y_low == y_high:  # a line at 0, with room above it
        y_high = 1.0
    x_span, y_span = (x_high - x_low) or 1.0, y_high - y_low
    plot_width, plot_height = _WIDTH - _LEFT - 8, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> str:
        return (
            f"{_LEFT + (x - x_low) / x_span * plot_width:.1f},"
            f"{_TOP + (y_high - y) / y_span * plot_height:.1f}"
        )

    parts = [f'<text x="0" y="14" font-weight="600">{html.escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = _TOP + share * plot_height
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y}" y2="{y}" '
            'stroke="currentColor" opacity=".2"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end" opacity=".7">'
            f"{y_high - share * y_span:.3g}</text>"
        )
    places, height = _legend(curves)
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}" opacity=".7">{x_low:g}</text>')
    parts.append(
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 8}" text-anchor="end" opacity=".7">'
        f"iteration {x_high:g}</text>"
    )
    for index, curve in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(at(x, y) for x, y in curve.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        )
        if len(curve.points) == 1:
            centre_x, centre_y = at(*curve.points[0]).split(",")
            parts.append(f'<circle cx="{centre_x}" cy="{centre_y}" r="3" fill="{colour}"/>')
        parts.append(
            f'<text x="{places[index][0]}" y="{places[index][1]}" fill="{colour}">'
            f"{html.escape(_short(curve.name))}</text>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" '
        f'font-family="system-ui,sans-serif" font-size="12" fill="currentColor" role="img" '
        f'aria-label="{html.escape(title, quote=True)}">{"".join(parts)}</svg>'
    )


def _legend(curves: Sequence[Curve]) -> tuple[list[tuple[int, int]], int]:
    """Where each curve's name stands, in lines under the chart, and the whole height."""
    places = []
    x, y = _LEFT, _HEIGHT + 10
    for curve in curves:
        width = 7 * len(_short(curve.name)) + 16
        if x > _LEFT and x + width > _WIDTH:
            x, y = _LEFT, y + 16
        places.append((x, y))
        x += width
    return places, y + 8


def _short(name: str) -> str:
    shown = visible(name[:_LONGEST_NAME])
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"


def plot_learning_curves(run_dirs: Sequence[Path], out: Path, *, title: str = "") -> Path:
    """A PNG of the return over iterations: training runs thin, their mean thick, held-out as dots.

    Args:
        run_dirs: run folders, say one for each seed.
        out: the picture's path.
        title: a line above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), dpi=150)
    curves: list[dict[int, float]] = []
    for run_dir in run_dirs:
        rows = [row for row in read_metrics(run_dir) if row.get("return_mean") is not None]
        curves.append({row["iteration"]: row["return_mean"] for row in rows})
        axes.plot(list(curves[-1]), list(curves[-1].values()), color="#2563eb", alpha=0.25, lw=1)
        held_out = read_evaluations(run_dir)
        axes.plot(
            [row["iteration"] for row in held_out],
            [row["eval_return"] for row in held_out],
            "o",
            color="#ea580c",
            alpha=0.6,
            ms=4,
            label="held-out problems" if run_dir == run_dirs[0] else None,
        )
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    means = [sum(curve[i] for curve in curves) / len(curves) for i in shared]
    axes.plot(
        shared, means, color="#2563eb", lw=2.2, label=f"training, mean of {len(curves)} seeds"
    )
    axes.set(xlabel="iteration", ylabel="return", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)
    return out
