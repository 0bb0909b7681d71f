"""Split names with slices: `train`, `train[:5%]`, `test[100:200]`, `train[-50:]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from burnish.errors import DataError

_FORM = re.compile(r"([\w.\-]+)(?:\[(-?\d+(?:\.\d+)?%?)?:(-?\d+(?:\.\d+)?%?)?\])?")


@dataclass(frozen=True, slots=True)
class Split:
    """A split's name and the bounds of its slice, as written (None = open)."""

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def whole(self) -> bool:
        """No slice."""
        return self.start is None and self.stop is None

    @property
    def needs_total(self) -> bool:
        """The bounds depend on the number of rows."""
        return any(
            bound is not None and (bound.endswith("%") or bound.startswith("-")) for bound in (self.start, self.stop)
        )

    def span(self, total: int | None) -> tuple[int, int | None]:
        """First position and the one behind the last; percentages are rounded to the nearest row.

        Args:
            total: Number of rows; may be None unless `needs_total`.
        """
        start = 0 if self.start is None else _position(self.start, total)
        stop = None if self.stop is None else _position(self.stop, total)
        return start, (stop if stop is None else max(start, stop))


def parse_split(text: str | None) -> Split:
    """The split that `text` means; None = train.

    Raises:
        DataError: It is not of the form name, name[a:b] or name[a%:b%].
    """
    if text is None:
        return Split("train")
    found = _FORM.fullmatch(text.strip())
    if not found:
        raise DataError(
            f"cannot read {text!r}",
            where="data.split",
            remedy="write train, train[:5%], train[100:200] or test[-50:]; several splits are several sources (a list)",
        )
    name, start, stop = found.groups()
    for bound in (start, stop):
        if bound and not bound.endswith("%") and "." in bound:
            raise DataError(
                f"{bound} in {text!r} is not a whole row number", where="data.split", remedy="write train[:100]"
            )
        if bound and bound.endswith("%") and abs(float(bound[:-1])) > 100:
            raise DataError(f"{bound} in {text!r} is over 100 %", where="data.split", remedy="write at most 100%")
    return Split(name, start, stop)


def _position(bound: str, total: int | None) -> int:
    if not bound.endswith("%") and not bound.startswith("-"):
        return int(bound) if total is None else min(int(bound), total)
    if total is None:
        raise ValueError("the number of rows is needed for this slice")
    value = round(total * float(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
    return min(max(value + total if bound.startswith("-") else value, 0), total)
