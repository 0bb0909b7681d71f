"""Numbers as people read them."""

from __future__ import annotations

import math

_PROPORTIONS = ("accuracy", "accuracies", "share", "win_rate", "error_rate", "match_rate")
MINUS, NARROW = "−", "\u202f"


def is_proportion(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is shown in percent."""
    last = metric.rpartition("/")[2].lower()
    return last.endswith(_PROPORTIONS) or last.startswith("pass@")


def show_value(metric: str, value: float | None) -> str:
    """A value of a metric: `41.3 %` for proportions, three or four digits for the rest."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if is_proportion(metric):
        return _signless(f"{100 * value:.1f}") + f"{NARROW}%"
    return show_number(value)


def show_difference(metric: str, value: float | None) -> str:
    """A difference with its sign: `+29.3 points` for proportions."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if is_proportion(metric):
        return _signless(f"{100 * value:+.1f}") + " points"
    return show_number(value, sign=True)


def show_interval(metric: str, low: float | None, high: float | None, *, difference: bool = False) -> str:
    """Limits of an interval: `36.5 to 46.2 %`."""
    if low is None or high is None:
        return ""
    if is_proportion(metric):
        form = "{:+.1f}" if difference else "{:.1f}"
        unit = "" if difference else f"{NARROW}%"
        return f"{_signless(form.format(100 * low))} to {_signless(form.format(100 * high))}{unit}"
    return f"{show_number(low, sign=difference)} to {show_number(high, sign=difference)}"


def show_number(value: float, *, sign: bool = False) -> str:
    """Three to four significant digits, exponents only where they are needed, a true minus sign."""
    if not math.isfinite(value):
        return str(value)
    plus = "+" if sign else ""
    size = abs(value)
    if size == 0:
        text = "0"
    elif size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:{plus}.2e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    elif size >= 1000:
        text = f"{value:{plus},.0f}"
    else:
        text = f"{value:{plus}.{1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 else 4}f}"
    return _signless(text)


def show_p(p: float | None) -> str:
    """A p-value: `p = 0.03`, `p < 0.001`."""
    if p is None or not math.isfinite(p):
        return ""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def show_count(value: float) -> str:
    """A whole number with separators, large ones shortened: `1,479,936`, `7.6 B`."""
    if value >= 1e9:
        return f"{value / 1e9:.3g} B"
    return f"{value:,.0f}"


def _signless(text: str) -> str:
    """A true minus sign, and none before zero."""
    return text.lstrip("-") if float(text.replace(",", "").rstrip("e")) == 0 else text.replace("-", MINUS)
