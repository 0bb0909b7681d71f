"""Label noise for studies: a share of the training labels the wrong way round."""

from __future__ import annotations

from collections.abc import Iterable

from burnish.data.example import Example, content_text
from burnish.data.report import SplitReport
from burnish.data.splits import unit_hash


def flip_labels(examples: Iterable[Example], share: float, seed: int, report: SplitReport) -> None:
    """Swap chosen and rejected of a share of the pairs, and turn the label of such a share of the labelled rows.

    A row's fate depends on its content and the seed alone: not on its place, and what a small share flips, a larger one
    flips too. Equal rows go together.
    """
    if not share:
        return
    for example in examples:
        if unit_hash(content_text(example), f"flip:{seed}") >= share:
            continue
        report.flipped.add(example.place)
        if len(example.completions) == 2:
            example.completions.reverse()
        else:
            example.columns["label"] = 1.0 - example.columns["label"]
