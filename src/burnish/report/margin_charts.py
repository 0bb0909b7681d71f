"""Stages on preference pairs: how β moved, where the margins were, how far both answers went from the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from burnish.report.charts import Panel, draw_panel, find_points, render_figure
from burnish.report.numbers import show_number, show_value
from burnish.report.read import StageFiles, as_dict, as_number
from burnish.report.svg import Band, Point, Series, draw_lines, smooth
from burnish.track.margins import are_too_many_zeros

# Metrics that these charts show, so that they are not drawn a second time.
DRAWN = frozenset(
    {"dpo/beta", "dpo/margin_mean", "dpo/loss", "risk/p_hat", "risk/tau", "beta_dpo/mean", "margins/zero_share"}
)
_RATIOS = Panel(
    "Log-ratio to the reference",
    ("chosen_ratio", "rejected_ratio"),
    note="log π − log π_ref, nats an answer, mean over the step's pairs: the estimate of the KL on the data's answers",
)
_LENGTHS = Panel("Length of answers", ("chosen_tokens", "rejected_tokens"), note="scored tokens, mean of a step")
_TAIL = 0.1  # of the steps, over which the end of a stage is averaged


def draw_margins(stage: StageFiles) -> tuple[list[str], int]:
    """HTML figures, and the steps that their lines average; none for a stage without margins."""
    rows = [r for r in stage.margins if _read(r, "step") is not None]
    if not rows:
        return [], 0
    pairs = [draw_panel(_RATIOS, rows, mark=0.0), draw_panel(_LENGTHS, rows)]
    drawn = [
        _draw_margins(rows, scaled=_get(stage, "margin") == "implicit_reward"),
        _draw_beta(rows),
        _draw_share(rows, as_number(_get(stage, "delta")) or 0.1),
        *((figure, window) for figure, _, window in pairs),
    ]
    return [figure for figure, _ in drawn if figure], max(window for _, window in drawn)


def write_margin_remarks(stage: StageFiles) -> tuple[list[str], list[str]]:
    """(warnings, remarks) about a stage's margins."""
    warned, noted = [], []
    zeros = [
        (step, share)
        for r in stage.margins
        if (step := _read(r, "step")) is not None and (share := _read(r, "zero_frac")) is not None
        if are_too_many_zeros(step, share)
    ]
    if zeros:
        worst = max(share for _, share in zeros)
        warned.append(
            f"In {len(zeros):,} of {len(stage.margins):,} steps at least half of the margins were 0 (up to "
            f"{show_value('share', worst)}, first at step {zeros[0][0]:,.0f}): on these pairs the policy does not differ from "
            "its reference. Look at the learning rate, at what is trainable, and at the masks of the answers."
        )
    held = [_read(r, "step") or 0 for r in stage.margins if _read(r, "held")]
    if held:
        noted.append(
            f"The controller of β held in {len(held):,} step{'s' * (len(held) != 1)}, in which the margins of a unit were all "
            f"equal (first at step {held[0]:,.0f})."
        )
    noted += _write_displacement(stage.margins)
    noted += _write_limits(stage)
    return warned, noted


def _write_displacement(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the chosen answers became less likely than they were."""
    tail = rows[-int(_TAIL * len(rows)) :] if len(rows) >= 1 / _TAIL else ()
    means, error = {}, 0.0
    for name in ("chosen_ratio", "rejected_ratio", "chosen_tokens"):
        values = [v for r in tail if (v := _read(r, name)) is not None]
        if not values:
            return []
        means[name] = mean = sum(values) / len(values)
        if name == "chosen_ratio":
            error = math.sqrt(sum((v - mean) ** 2 for v in values)) / len(values)
    chosen, rejected = means["chosen_ratio"], means["rejected_ratio"]
    if chosen > -0.01 * max(means["chosen_tokens"], 1.0) or chosen > -2 * error:
        return []
    return (
        [
            f"The chosen answers ended {show_number(-chosen)} nats less likely than under the reference, the rejected ones "
            f"{show_number(abs(rejected))} nats {'less' if rejected < 0 else 'more'}: the margin grew by moving probability away "
            "from both (likelihood displacement)."
        ]
        if rejected < 0
        else [f"The chosen answers ended {show_number(-chosen)} nats less likely than under the reference."]
    )


def _write_limits(stage: StageFiles) -> list[str]:
    """Whether β spent time at a limit, where the controller no longer steers."""
    used = [v for r in stage.margins if (v := _read(r, "beta_used")) is not None]
    if _get(stage, "type") != "risk" or not used:
        return []
    high, low = as_number(_get(stage, "beta_max")) or 2.0, as_number(_get(stage, "beta_min")) or 0.0
    at = sum(1 for beta in used if beta >= high or (low and beta <= low))
    if at <= 0.05 * len(used):
        return []
    return [
        f"β was at a limit in {show_value('share', at / len(used))} of the steps: there the controller steers no more."
    ]


def _read(row: dict[str, Any], name: str) -> float | None:
    """A finite number of a row."""
    value = as_number(row.get(name))
    return value if value is not None and math.isfinite(value) else None


def _get(stage: StageFiles, name: str) -> Any:
    """A setting of the section dynamic_beta."""
    return as_dict(as_dict(stage.record.get("settings")).get("dynamic_beta")).get(name)


def _draw_margins(rows: Sequence[dict], *, scaled: bool) -> tuple[str, int]:
    """The distribution of the margins over the steps, with the controller's threshold among them.

    Args:
        scaled: β-DPO's running mean is of β_0 times the margin: on another scale, so it is not drawn.
    """
    middle, window = _smooth(find_points(rows, "median"))
    if not middle:
        return "", 0
    series = [Series("median", middle, "s1")]
    legend = [("s1", "median", show_number(middle[-1][1]))]
    for name, words in (("risk/tau", "τ"), ("beta_dpo/mean", "running mean")):
        points = find_points(rows, name)
        if points and not scaled:
            series.append(Series(words, points, "s2"))
            legend.append(("s2", words, show_number(points[-1][1])))
    bands = [Band(_find_band(rows, "min", "max"), pale=True), Band(_find_band(rows, "p10", "p90", calm=True))]
    label = "Margins by step: " + ", ".join(f"{words} {value}" for _, words, value in legend)
    chart = draw_lines(series, metric="margin", label=label, bands=bands, mark=0.0)
    note = "log-ratio of chosen less rejected, nats, without β; shaded: 10 % to 90 % of a step's pairs, pale: all"
    return (render_figure("Distribution of margins", chart, legend, [note]) if chart else ""), window


def _draw_beta(rows: Sequence[dict]) -> tuple[str, int]:
    """β over the steps, and its range where it differs between pairs; nothing if it is constant."""
    if not any("controller" in r for r in rows):
        return "", 0
    points = find_points(rows, "beta_used")
    if not points:
        return "", 0
    ranges = [(as_number(r["step"]), r.get("beta_range")) for r in rows]
    spread = [
        (step, low, high)
        for step, pair in ranges
        if step is not None and isinstance(pair, list) and len(pair) == 2
        if (low := as_number(pair[0])) is not None and (high := as_number(pair[1])) is not None
    ]
    varies = any(low < high for _, low, high in spread)
    legend = [("s1", "last", show_number(points[-1][1])), ("s1", "first", show_number(points[0][1]))]
    label = f"beta by step, from {show_number(points[0][1])} to {show_number(points[-1][1])}"
    chart = draw_lines([Series("β", points, "s1")], metric="beta", label=label, bands=[Band(spread)] if varies else [])
    notes = ["mean over the step's pairs; shaded: least to greatest"] if varies else []
    return (render_figure("β", chart, legend, notes) if chart else ""), 0


def _draw_share(rows: Sequence[dict], delta: float) -> tuple[str, int]:
    """p̂ against the wanted δ."""
    points = find_points(rows, "risk/p_hat")
    if not points:
        return "", 0
    line, window = _smooth(points)
    mean = sum(y for _, y in points) / len(points)
    legend = [("s1", "mean p̂", show_value("share", mean)), ("s2", "wanted δ", show_value("share", delta))]
    series = [Series("p̂", points, "s1", raw=True), Series("p̂", line, "s1")] if window else [Series("p̂", line, "s1")]
    level = [Series("δ", [(points[0][0], delta), (points[-1][0], delta)], "s2")]
    label = f"share of margins above tau by step, mean {show_value('share', mean)}"
    chart = draw_lines([*series, *level], metric="share", label=label)
    return (render_figure("Share of margins above τ", chart, legend, []) if chart else ""), window


def _smooth(points: list[Point]) -> tuple[list[Point], int]:
    """The smoothed line and its window; the points themselves and 0 where there are few."""
    line, window = smooth(points)
    return (line, window) if line else (points, 0)


def _find_band(rows: Sequence[dict], low: str, high: str, *, calm: bool = False) -> list[tuple[float, float, float]]:
    """(step, lower, upper) of two metrics; `calm`: both smoothed as the lines are."""
    lower, upper = (find_points(rows, name) for name in (low, high))
    if calm:
        lower, upper = (_smooth(points)[0] for points in (lower, upper))
    tops = dict(upper)
    return [(step, y, tops[step]) for step, y in lower if step in tops]
