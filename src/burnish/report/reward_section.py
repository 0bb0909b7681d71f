"""What a reward model's scores of held-out pairs tell, beyond its accuracy."""

from __future__ import annotations

from html import escape
from typing import Any

from burnish.report.numbers import show_count, show_interval, show_number, show_p, show_value
from burnish.report.read import as_dict, as_number

_COLUMNS = ("mean", "std", "min", "q1", "median", "q3", "max")


def render_reward_report(name: str, report: dict[str, Any]) -> str:
    """A few sentences and the distribution of the scores; "" for a report without pairs."""
    pairs = as_number(report.get("pairs"))
    if not pairs:
        return ""
    remarks = "".join(f"<li>{escape(line)}</li>" for line in write_reward_remarks(report))
    head = "".join(f'<th class="num">{column}</th>' for column in _COLUMNS)
    rows = "".join(
        f"<tr><td>{title}</td>{''.join(f'<td class=num>{_cell(as_dict(report.get(key)).get(c))}</td>' for c in _COLUMNS)}</tr>"
        for key, title in (("chosen", "chosen"), ("rejected", "rejected"), ("difference", "difference"))
    )
    sources = as_dict(report.get("by_source"))
    by_source = "".join(
        f"<tr><td>{escape(str(source))}</td><td class=num>{_share(as_dict(found).get('accuracy'))}</td>"
        f"<td class=num>{_cell(as_dict(found).get('pairs'), count=True)}</td></tr>"
        for source, found in sources.items()
    )
    split = f"<table class=data><tr><th>source</th><th class=num>accuracy</th><th class=num>pairs</th></tr>{by_source}</table>"
    return (
        f"<h3>Scores of {escape(name)}</h3><ul class=remarks>{remarks}</ul>"
        f'<details><summary>Distribution of the scores</summary><div class="wide"><table><tr><th></th>{head}</tr>{rows}'
        f"</table></div>{split if sources else ''}</details>"
    )


def write_reward_remarks(report: dict[str, Any]) -> list[str]:
    """Accuracy, calibration, and what else drives the scores, in sentences."""
    accuracy, counts = as_dict(report.get("accuracy")), as_dict(report.get("differences"))
    interval = show_interval("accuracy", as_number(accuracy.get("low")), as_number(accuracy.get("high")))
    out = [
        f"On {show_count(as_number(report.get('pairs')) or 0)} held-out pairs the chosen answer scores higher in "
        f"{show_value('accuracy', as_number(accuracy.get('value')))}"
        + (f" (95 % interval {interval})" if interval else "")
    ]
    zero = as_number(counts.get("zero"))
    if zero:
        out[0] += f", {show_count(zero)} ties counted half"
    out[0] += "."
    log_loss = as_number(report.get("log_loss"))
    if log_loss is not None:
        out.append(f"Mean log loss of the pairs: {show_number(log_loss)} nats (guessing: 0.693).")
    bias = as_dict(report.get("length_bias"))
    r, prefers = as_number(bias.get("r")), as_number(bias.get("prefers_longer"))
    if r is not None:
        p = as_number(bias.get("p_value"))
        clear = p is not None and p < 0.05
        out.append(
            f"Length: the scores {'go' if clear else 'do not clearly go'} with the answers' lengths "
            f"(Spearman {show_number(r)}, {show_p(p)})"
            + (f"; the longer answer wins in {show_value('share', prefers)} of pairs." if prefers is not None else ".")
        )
    both = as_number(as_dict(report.get("spearman")).get("r"))
    if both is not None:
        out.append(f"Scores of the two answers to one prompt: Spearman correlation {show_number(both)}.")
    return out


def _cell(value: Any, *, count: bool = False) -> str:
    number = as_number(value)
    if number is None:
        return "–"
    return show_count(number) if count else show_number(number)


def _share(value: Any) -> str:
    return show_value("accuracy", as_number(value))
