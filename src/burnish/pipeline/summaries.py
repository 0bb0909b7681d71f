"""What a plan says of a stage's data; equal data of many stages are read once."""

from __future__ import annotations

from dataclasses import dataclass

from burnish.config.train import TrainSettings
from burnish.data.prepare import find_data_key, prepare_data
from burnish.data.report import DataReport
from burnish.data.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class DataSummary:
    """Prepared data without the data.

    Attributes:
        train: Examples to train on. held_out: Examples held out.
        report: What became of the rows.
        fingerprint: SHA-256 over all groups.
        longest: Tokens of the longest example, its prompt with the longest completion, and its name.
    """

    train: int
    held_out: int
    report: DataReport
    fingerprint: str
    longest: tuple[int, str]


class DataSummaries:
    """Summaries by the content that they are of, for as long as the object lives; the groups are not kept."""

    def __init__(self) -> None:
        self._known: dict[str, DataSummary] = {}

    def find(self, settings: TrainSettings, tokenizer: TextTokenizer, *, context: int | None = None) -> DataSummary:
        """The summary of a stage's data; arguments and errors as of `prepare_data`."""
        key = find_data_key(settings, tokenizer, context=context)
        if key not in self._known:
            found = prepare_data(settings, tokenizer, context=context)
            self._known[key] = DataSummary(
                len(found.train), len(found.held_out), found.report, found.fingerprint, found.longest
            )
        return self._known[key]
