"""The margins of each step: `margins.jsonl`, and on request every margin of a step as `margins/step-N.npy`.

A row has `step`, `epoch`, `batch_size`, `mean`, `std` (ddof 0), `min`, `p10`, `median`, `p90`, `max`, `pos_frac` (share above
0), `zero_frac` (share within 1e-5 of 0), `sample` (the step's first margins), the β that was used, what the controller of β was
at afterwards, and means of the pairs' log-probs, log-ratios and lengths. It is written once a step, with all pairs of the step in
data order, however the step was cut.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.config.dynamic_beta import ZERO_MARGIN
from burnish.disk import disk_error
from burnish.track.metrics import MetricsLog

if TYPE_CHECKING:  # the report reads this module, and needs no numpy
    import numpy as np

MARGINS = "margins.jsonl"
VECTORS = "margins"
QUIET_STEPS = 10  # a policy that was its reference a few steps ago may have margins of 0
LOUD_SHARE = 0.5


def summarise_margins(margins: np.ndarray, *, sample: int) -> dict[str, Any]:
    """The fields of a row that depend on the margins alone.

    Args:
        margins: (n,) nats, n ≥ 1, in data order.
        sample: How many of them to write out.
    """
    import numpy as np

    low, p10, median, p90, high = np.quantile(margins, [0.0, 0.1, 0.5, 0.9, 1.0]).tolist()
    return {
        "batch_size": int(margins.shape[0]),
        "mean": float(margins.mean()),
        "std": float(margins.std()),
        "min": low,
        "p10": p10,
        "median": median,
        "p90": p90,
        "max": high,
        "pos_frac": float((margins > 0).mean()),
        "zero_frac": find_zero_share(margins),
        "sample": margins[:sample].tolist(),
    }


def find_zero_share(margins: np.ndarray) -> float:
    """Share of margins that are 0 to within what a cached reference keeps."""
    return float((abs(margins) < ZERO_MARGIN).mean())


def are_too_many_zeros(step: float, share: float) -> bool:
    """Whether so many margins are 0 that a reader should be told: something keeps the policy at its reference."""
    return step > QUIET_STEPS and share >= LOUD_SHARE


class MarginLog(MetricsLog):
    """`margins.jsonl` of a stage, with the vectors beside it."""

    def __init__(self, stage_dir: Path) -> None:
        super().__init__(stage_dir / MARGINS)
        self.folder = stage_dir / VECTORS

    def write(self, row: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> None:
        """Add a step's row; its margins go to a file of their own, whole or not at all, before the row that names it.

        Raises:
            ResourceError: The disk is full or gone.
        """
        import numpy as np

        named: dict[str, Any] = {}
        for name, vector in vectors.items():
            place = self.folder / f"step-{row['step']:06d}{'' if name == 'margin' else f'-{name}'}.npy"
            try:
                self.folder.mkdir(exist_ok=True)
                buffer = io.BytesIO()
                np.save(buffer, vector, allow_pickle=False)
                part = place.with_suffix(".part")
                part.write_bytes(buffer.getvalue())
                part.replace(place)
            except OSError as exc:
                raise disk_error(exc, place, doing=f"write {place.name}") from exc
            named["npy" if name == "margin" else f"npy_{name}"] = f"{VECTORS}/{place.name}"
        self.append({**row, **named})

    def drop_vectors(self, step: int) -> None:
        """Remove the vectors of later steps: those steps will be done again."""
        if not self.folder.is_dir():
            return
        for place in self.folder.iterdir():
            number = place.name.removeprefix("step-")[:6]
            if place.suffix == ".part" or (number.isdigit() and int(number) > step):
                place.unlink()
