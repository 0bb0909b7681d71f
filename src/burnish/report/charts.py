"""Which curves of a training stage are shown, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from burnish.report.numbers import show_value
from burnish.report.read import StageFiles, as_number
from burnish.report.svg import Chart, Point, Series, draw_lines, smooth

_NOT_CURVES = {"step", "epoch", "kind"}


@dataclass(frozen=True)
class Panel:
    """One chart: its title, the metrics drawn together from training and from evaluation, and a word of explanation."""

    title: str
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    note: str = ""


PANELS = (
    Panel("Loss", ("loss",), ("eval_loss", "loss")),
    Panel(
        "Accuracy",
        ("rewards/accuracies", "accuracy", "scores/accuracy", "mean_token_accuracy", "token_accuracy"),
        ("eval_rewards/accuracies", "eval_accuracy", "eval_scores/accuracy", "eval_mean_token_accuracy", "accuracy"),
    ),
    Panel(
        "Margin",
        ("rewards/margins", "margin", "scores/margin", "scores/margins"),
        ("eval_rewards/margins", "eval_margin", "eval_scores/margin", "eval_scores/margins"),
        "chosen minus rejected",
    ),
    Panel("Rewards", ("rewards/chosen", "rewards/rejected"), (), "implicit rewards of both answers"),
    Panel("Scores", ("scores/chosen", "scores/rejected"), (), "the reward model's scores of both answers"),
    Panel("Log-probabilities", ("logps/chosen", "logps/rejected"), (), "of both answers, in nats"),
    Panel("KL from the reference", ("kl", "rewards/kl"), ("eval_kl",), "nats"),
    Panel("Learning rate", ("learning_rate",)),
    Panel("Gradient norm", ("grad_norm",), (), "before clipping"),
)
_NOTES = {
    "mean_token_accuracy": "share of tokens predicted right",
    "token_accuracy": "share of tokens predicted right",
    "rewards/accuracies": "share of pairs ranked right",
    "scores/accuracy": "share of pairs ranked right",
}
_PLAIN = {"Learning rate"}  # drawn as it is: there is no noise to smooth


def draw_stage(stage: StageFiles, skip: frozenset[str] = frozenset()) -> tuple[list[str], list[str], int]:
    """HTML figures of a stage's curves: the usual ones, all others that it logged, and the steps that lines average.

    Metrics in `skip` are drawn elsewhere.
    """
    train = [r for r in stage.metrics if r.get("kind", "train") == "train"]
    held_out = [r for r in stage.metrics if r.get("kind") == "eval"]
    used: set[str] = set(skip)
    main = []
    window = 0
    for panel in PANELS:
        drawn, names, averaged = draw_panel(panel, train, held_out)
        used |= names
        window = max(window, averaged)
        if drawn:
            main.append(drawn)
    others = []
    for name in _names(train):
        if name not in used:
            drawn, _, _ = draw_panel(Panel(name, (name,), (f"eval_{name}",)), train, held_out)
            used |= {name, f"eval_{name}"}
            others.append(drawn)
    for name in _names(held_out):
        if name not in used and name not in ("seconds",):
            drawn, _, _ = draw_panel(Panel(name, (), (name,)), train, held_out)
            others.append(drawn)
    return main, [d for d in others if d], window


def _names(rows: Sequence[dict]) -> list[str]:
    found: dict[str, None] = {}
    for row in rows:
        found.update((k, None) for k, v in row.items() if k not in _NOT_CURVES and as_number(v) is not None)
    return list(found)


def find_points(rows: Sequence[dict], name: str) -> list[Point]:
    """(step, value) of a metric, by step."""
    out = []
    for row in rows:
        step, value = as_number(row.get("step")), as_number(row.get(name))
        if step is not None and value is not None:
            out.append((step, value))
    return sorted(out, key=lambda p: p[0])


def draw_panel(
    panel: Panel, train: Sequence[dict], held_out: Sequence[dict] = (), mark: float | None = None
) -> tuple[str, set[str], int]:
    """A figure with caption and legend ("" if there is nothing to draw), the metrics used, the steps averaged.

    Args:
        mark: A level with a dashed line.
    """
    behind: list[Series] = []
    front: list[Series] = []
    legend: list[tuple[str, str, str]] = []
    used: set[str] = set()
    several = sum(1 for n in panel.train if find_points(train, n)) > 1
    colours = iter(("s1", "s2", "s3", "s4", "s1", "s2"))
    window = 0
    for name in panel.train:
        points = find_points(train, name)
        if not points:
            continue
        colour = next(colours)
        used.add(name)
        words = name.rpartition("/")[2].replace("_", " ") if several else "training"
        plain = panel.title in _PLAIN
        smoothed, window = ([], 0) if plain else smooth(points)
        if smoothed:
            behind.append(Series(words, points, colour, raw=True))
            front.append(Series(words, smoothed, colour))
        else:
            front.append(Series(words, points, colour, dots=len(points) <= 30 and not plain))
        if plain:
            legend.append((colour, "peak", show_value(name, max(y for _, y in points))))
        else:
            legend.append((colour, words, show_value(name, (smoothed or points)[-1][1])))
    for name in panel.held_out:
        points = find_points(held_out, name)
        if points:
            colour = next(colours)
            used.add(name)
            front.append(Series("held out", points, colour, dots=True))
            legend.append((colour, "held out", show_value(name, points[-1][1])))
            break
    if not front:
        return "", used, 0
    metric = next(iter(used & set(panel.train)), next(iter(used)))
    label = f"{panel.title} by step: " + ", ".join(f"{words} {value}" for _, words, value in legend)
    chart = draw_lines([*behind, *front], metric=metric, label=label, mark=mark)
    if chart is None:
        return "", used, 0
    notes = [panel.note] if panel.note else [_NOTES[name] for name in sorted(used) if name in _NOTES][:1]
    if chart.outside:
        notes.append(f"{chart.outside} {'value' if chart.outside == 1 else 'values'} beyond the scale")
    return render_figure(panel.title, chart, legend, notes), used, window


def render_figure(title: str, chart: Chart, legend: Sequence[tuple[str, str, str]], notes: Sequence[str]) -> str:
    """A drawing with its title, a legend of (colour, words, value), and a word below."""
    keys = "".join(
        f'<span class="key"><i class="{colour}"></i>{escape(words)} <b>{escape(value)}</b></span>'
        for colour, words, value in legend
    )
    small = f'<p class="note">{escape("; ".join(notes))}</p>' if notes else ""
    caption = f'<figcaption><span class="what">{escape(title)}</span> {keys}</figcaption>'
    return f"<figure>{caption}{chart.svg}{small}</figure>"
