"""A small SVG writer for the report's charts: lines over steps, and intervals on a common scale.

Colours are classes that the page's style sheet defines, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from burnish.report.numbers import MINUS, is_proportion, show_number

WIDTH, HEIGHT = 340, 205
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 34
_MOST_POINTS = 400

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend.
        points: (step, value), by step; non-finite values break the line.
        colour: Class s1 … s4.
        raw: Drawn thin and pale, behind.
        dots: Points are marked and tell their value when pointed at.
    """

    name: str
    points: Sequence[Point]
    colour: str = "s1"
    raw: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """An area between two lines, drawn behind all else.

    Attributes:
        points: (step, lower, upper), by step.
        colour: Class s1 … s4.
        pale: Fainter, and does not stretch the scale: what leaves it is cut at its end.
    """

    points: Sequence[tuple[float, float, float]]
    colour: str = "s1"
    pale: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing with what the caption should say about it."""

    svg: str
    outside: int


def smooth(points: Sequence[Point]) -> tuple[list[Point], int]:
    """A centred moving mean over about a thirtieth of the points; returns it with the number of points it averages.

    A spike that the scale leaves out counts as the scale's end: one step must not lift the whole neighbourhood.
    """
    sound = [p for p in points if math.isfinite(p[1])]
    if sound:
        low, high = find_limits([y for _, y in sound])
        sound = [(x, min(max(y, low), high)) for x, y in sound]
    half = max(1, len(sound) // 60)
    if len(sound) < 12:
        return [], 0
    sums = [0.0]
    for _, y in sound:
        sums.append(sums[-1] + y)
    out = []
    for at, (x, _) in enumerate(sound):
        reach = min(half, at)  # narrower at the start, where curves are steep
        low, high = at - reach, min(at + reach + 1, len(sound))
        out.append((x, (sums[high] - sums[low]) / (high - low)))
    return out, 2 * half + 1


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about 400 points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stretch = math.ceil(len(points) / (_MOST_POINTS // 2))
    out: list[Point] = []
    for start in range(0, len(points), stretch):
        part = [p for p in points[start : start + stretch] if math.isfinite(p[1])]
        if not part:
            out.append((points[start][0], math.nan))
            continue
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        if start == 0:
            ends.add(points[0])
        if start + stretch >= len(points):
            ends.add(points[-1])
        out += sorted(ends)
    return out


def draw_lines(
    series: Sequence[Series],
    *,
    metric: str,
    label: str,
    bands: Sequence[Band] = (),
    mark: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Chart | None:
    """A chart of lines over steps; None without a finite value.

    Args:
        series: What to draw, back to front.
        bands: Areas behind the lines. mark: A level with a dashed line.
        metric: Decides the unit of the scale (percent for proportions).
        label: What it shows, for those who cannot see it.
        limits: Ends of the scale where several charts share one; default: of these values.
    """
    values = [y for s in series for _, y in s.points if math.isfinite(y)]
    steps = [x for s in series for x, _ in s.points]
    if not values:
        return None
    noisy = [y for s in series if s.raw for _, y in s.points if math.isfinite(y)]
    calm = [y for s in series if not s.raw for _, y in s.points if math.isfinite(y)]
    ends = [*calm, *(find_limits(noisy) if noisy else ())]  # spikes of single steps may leave the scale, nothing else
    for band in bands:
        edges = [y for _, *pair in band.points for y in pair if math.isfinite(y)]
        ends += find_limits(edges) if edges and not band.pale else ()
    ends += () if mark is None else (mark,)
    low, high = _pad(*(limits or (min(ends), max(ends))), metric)
    outside = sum(1 for y in values if not low <= y <= high)
    y_ticks = nice_ticks(low, high, 5)
    first, last = min(steps), max(steps)
    x_ticks = [t for t in nice_ticks(first, last, 4, integers=True) if first <= t <= last]
    if last == first:
        first, last = first - 0.5, last + 0.5

    def at_x(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}" class="chart">',
        f"<title>{escape(label)}</title>",
    ]
    names = tick_labels(y_ticks, metric)
    for tick, name in zip(y_ticks, names):
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.8:.1f}" text-anchor="end">{name}</text>')
    floor = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    for tick in x_ticks:
        x = at_x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    if mark is not None:
        y = at_y(mark)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for band in bands:
        edge = [(at_x(x), *(at_y(min(max(y, low), high)) for y in pair)) for x, *pair in _thin_band(band.points)]
        if edge:
            around = [*((x, upper) for x, _, upper in edge), *((x, lower) for x, lower, _ in reversed(edge))]
            kind = "band pale" if band.pale else "band"
            parts.append(f'<path class="{kind} {band.colour}" d="{_path(around)}Z"/>')
    for s in series:
        shown = [(x, min(max(y, low), high) if math.isfinite(y) else y) for x, y in s.points]
        path = _path([(at_x(x), at_y(y) if math.isfinite(y) else math.nan) for x, y in thin(shown)])
        kind = "raw" if s.raw else "line"
        if path:
            parts.append(f'<path class="{kind} {s.colour}" d="{path}"/>')
        if s.dots and len(s.points) <= 60:
            for (x, y), (_, true) in zip(shown, s.points):
                if math.isfinite(y):
                    tip = f"{s.name}, step {x:,.0f}: {show_number(true)}"
                    parts.append(
                        f'<circle class="dot {s.colour}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3">'
                        f"<title>{escape(tip)}</title></circle>"
                    )
    parts.append("</svg>")
    return Chart("".join(parts), outside)


def _thin_band(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """At most about 200 points of a band, each as wide as the widest of its stretch."""
    sound = [p for p in points if all(map(math.isfinite, p))]
    stretch = max(1, math.ceil(len(sound) / (_MOST_POINTS // 2)))
    parts = [sound[start : start + stretch] for start in range(0, len(sound), stretch)]
    return [(p[len(p) // 2][0], min(y for _, y, _ in p), max(y for _, _, y in p)) for p in parts]


def draw_interval(
    low: float | None,
    value: float | None,
    high: float | None,
    scale: tuple[float, float],
    mark: float | None,
    label: str,
    single: Sequence[float] = (),
) -> str:
    """A value with its limits on a scale that several rows share.

    Args:
        mark: Where a reference line goes.
        single: Values that the value is the mean of, drawn small.
    """
    begin, end = scale
    if value is None or not math.isfinite(value) or end <= begin:
        return ""

    def at(x: float) -> str:
        return f"{3 + 94 * (min(max(x, begin), end) - begin) / (end - begin):.2f}%"

    text = escape(label, quote=True)
    parts = [
        f'<svg class="interval" width="100%" height="20" role="img" aria-label="{text}"><title>{text}</title>',
        '<line class="grid" x1="0" x2="100%" y1="10" y2="10"/>',
    ]
    if mark is not None and math.isfinite(mark):
        parts.append(f'<line class="mark" x1="{at(mark)}" x2="{at(mark)}" y1="0" y2="20"/>')
    if low is not None and high is not None:
        parts.append(f'<line class="whisker s1" x1="{at(low)}" x2="{at(high)}" y1="10" y2="10"/>')
    parts += [f'<circle class="single" cx="{at(x)}" cy="10" r="2.2"/>' for x in single if math.isfinite(x)]
    parts.append(f'<circle class="dot s1" cx="{at(value)}" cy="10" r="4.5"/></svg>')
    return "".join(parts)


def nice_ticks(low: float, high: float, most: int, *, integers: bool = False) -> list[float]:
    """Round numbers within [low, high]: multiples of 1, 2 or 5 · 10ⁿ."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    if integers:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_labels(ticks: Sequence[float], metric: str) -> list[str]:
    """Labels of a scale, all with the same number of decimals."""
    if is_proportion(metric):
        gap = 100 * (ticks[1] - ticks[0]) if len(ticks) > 1 else 1
        decimals = 0 if gap >= 0.999 else 1
        return [f"{100 * t + 0.0:.{decimals}f} %".replace("-", MINUS) for t in ticks]
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    biggest = max(abs(t) for t in ticks)
    if biggest and (biggest < 1e-3 or biggest >= 1e5):
        out = []
        for t in ticks:
            if abs(t) < gap * 1e-6:
                out.append("0")
                continue
            digits = max(0, math.floor(math.log10(abs(t)) + 1e-9) - math.floor(math.log10(gap) + 1e-9))
            mantissa, _, exponent = f"{t:.{digits}e}".partition("e")
            mantissa = mantissa.rstrip("0").rstrip(".") if digits else mantissa
            out.append(f"{mantissa}e{int(exponent)}".replace("-", MINUS))
        return out
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{0.0 if abs(t) < gap * 1e-6 else t:,.{decimals}f}".replace("-", MINUS) for t in ticks]


def find_limits(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest value, or, if a few spikes would flatten the rest, those of the inner 98 %."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 30:
        inner_low, inner_high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]
        if high - low > 4 * (inner_high - inner_low) > 0:
            return inner_low, inner_high
    return low, high


def _pad(low: float, high: float, metric: str) -> tuple[float, float]:
    """Some room above and below; a quantity that is never negative keeps its zero, a share its 100 %."""
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    lower, upper = low - pad, high + pad
    if low >= 0 > lower:
        lower = 0.0
    if is_proportion(metric) and high <= 1 < upper:
        upper = 1.0
    return lower, upper


def _path(points: Sequence[Point]) -> str:
    out: list[str] = []
    pen = "M"
    for x, y in points:
        if math.isfinite(y):
            out.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(out)
