"""Curves as inline SVG: no library and no script is needed to see them, and styles of the page colour them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

W, H = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 26
MAX_POINTS = 300
NUM_COLOURS = 8
LOG_FROM = 50.0
"""Largest over smallest value from which a positive quantity is drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    """(step, value), steps rising, values finite."""
    run: int = 0
    """Which run, for its colour."""
    dash: str = ""
    """SVG's stroke-dasharray."""


def chart(curves: Sequence[Curve], *, title: str) -> str:
    """An SVG of curves over steps; long ones are thinned to means.

    The script of the page reads scales and labels from data attributes, to tell values under the pointer.

    Args:
        curves: at least one, none without points.
        title: for people who hear the page.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    log = min(ys) > 0 and max(ys) / min(ys) >= LOG_FROM
    x0, x1 = _room(min(xs), max(xs))
    y0, y1 = _room(*((math.log10(y) for y in (min(ys), max(ys))) if log else (min(ys), max(ys))))
    y_ticks = _log_ticks(y0, y1) if log else [(tick, tick) for tick in _ticks(y0, y1, 5)]

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * (W - LEFT - RIGHT), H - BOTTOM - (y - y0) / (y1 - y0) * (H - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {W} {H}" role="img" aria-label="{escape(title)}" data-log="{int(log)}"'
        f' data-box="{LEFT} {W - RIGHT} {H - BOTTOM} {TOP}" data-range="{x0:.9g} {x1:.9g} {y0:.9g} {y1:.9g}">'
    ]
    for y, value in y_ticks:
        _, v = at(x0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{W - RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for x in _ticks(x0, x1, 4):
        u, _ = at(x, y0)
        parts.append(f'<text x="{min(u, W - RIGHT - 14):.1f}" y="{H - 8}" text-anchor="middle">{_number(x)}</text>')
    for curve in curves:
        points = [at(x, math.log10(y) if log else y) for x, y in _thin(curve.points)]
        colour = f'class="run{curve.run % NUM_COLOURS}"'
        style = f'{colour} data-label="{escape(curve.label)}"' + _dash(curve.dash)
        parts.append(f'<polyline {style} points="{" ".join(f"{u:.1f},{v:.1f}" for u, v in points)}"/>')
        if len(points) < 8:  # few enough to be seen one by one; alone, a line of one point shows nothing
            parts += [f'<circle {colour} cx="{u:.1f}" cy="{v:.1f}" r="2.5"/>' for u, v in points]
    return "".join([*parts, '<line class="cursor" hidden/></svg>'])


def key(run: int | None, dash: str = "") -> str:
    """A bit of the line that stands for a run, or, without a run, for a dash."""
    colour = "any" if run is None else f"run{run % NUM_COLOURS}"
    line = f'<line class="{colour}" x1="0" x2="28" y1="5" y2="5"{_dash(dash)}/>'
    return f'<svg class="key" viewBox="0 0 28 10" aria-hidden="true">{line}</svg>'


def _dash(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def _room(low: float, high: float) -> tuple[float, float]:
    """The range of an axis: a constant gets some room around it."""
    if high > low:
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within a range: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= raw)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, float]]:
    """(logarithm, value) of powers of ten, few enough to read."""
    exponents = range(math.ceil(low), math.floor(high) + 1)
    every = -(-len(exponents) // 5) or 1
    return [(float(exponent), 10.0**exponent) for exponent in exponents[::every]]


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most MAX_POINTS, each the mean of its neighbours."""
    if len(points) <= MAX_POINTS:
        return points
    cuts = [round(n * len(points) / MAX_POINTS) for n in range(MAX_POINTS + 1)]
    parts = (points[start:end] for start, end in zip(cuts, cuts[1:], strict=False))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.6g}"
