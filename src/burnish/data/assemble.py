"""Sources to the examples of both sides: slices, splits, mixtures, samples, and no prompt on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from burnish.config.registry import find_method_spec
from burnish.config.train import TrainSettings
from burnish.data.columns import ColumnMapping, find_mapping
from burnish.data.example import Example, Reading
from burnish.data.formats import check_format
from burnish.data.load import load_examples
from burnish.data.noise import flip_labels
from burnish.data.problems import Problem, ProblemLog
from burnish.data.report import DataReport, SplitReport
from burnish.data.slices import Split
from burnish.data.sources import Source, as_sources, resolve_source
from burnish.data.splits import in_slice, mixture_sizes, sample_rows, split_rows
from burnish.errors import ConfigError


@dataclass
class Loaded:
    """Examples of both sides, before they are tokenised."""

    train: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    report: DataReport = field(default_factory=DataReport)


@dataclass(frozen=True)
class Sources:
    """The sources of a stage: what it trains on, and what it is evaluated on if that is named."""

    train: list[Source]
    explicit: list[Source]

    @property
    def own_held_out(self) -> list[tuple[Source, Split]]:
        """The training sources' own test splits."""
        return [(source, Split(source.held_out)) for source in self.train if source.held_out]

    def read_splits(self) -> list[tuple[Source, Split]]:
        """Every split that will be read."""
        held_out = [(source, source.split) for source in self.explicit] or self.own_held_out
        return [(source, source.split) for source in self.train] + held_out


def find_sources(settings: TrainSettings) -> Sources:
    """The sources that the settings name.

    Raises:
        ConfigError: No data are named.
        DataError: A source does not exist.
    """
    train = [resolve_source(source) for source in as_sources(settings.data)]
    if not train:
        raise ConfigError(
            "no training data are named", where="data", remedy="set data: <file, folder, bundled set or hub id>"
        )
    return Sources(_distinct(train), [resolve_source(source) for source in as_sources(settings.eval_data)])


def _distinct(sources: list[Source]) -> list[Source]:
    """Sources of one name take the text that the recipe gives for them instead, so that metrics tell them apart."""
    names = [source.name for source in sources]
    texts = [source.settings.source for source in sources]
    return [
        replace(source, name=text) if names.count(source.name) > 1 and texts.count(text) == 1 else source
        for source, text in zip(sources, texts)
    ]


def are_rows_drawn(settings: TrainSettings, sources: Sources) -> bool:
    """Whether the seed decides what rows there are: samples, mixtures, a held-out share and flipped labels are drawn with it."""
    counts = [source.settings.max_samples for source in (*sources.train, *sources.explicit)]
    own = settings.validation_split > 0 and not sources.explicit and not sources.own_held_out
    limited = any(count is not None for count in (settings.max_samples, settings.max_eval_samples, *counts))
    return own or limited or settings.flip_share > 0 or _is_mixture(sources.train)


def _is_mixture(sources: Sequence[Source]) -> bool:
    return len(sources) > 1 and any("weight" in source.settings.model_fields_set for source in sources)


def load_all(settings: TrainSettings, sources: Sources, reading: Reading, log: ProblemLog) -> Loaded:
    """The examples of both sides, sliced, split and sampled; problems go to the log."""
    report = DataReport({"train": SplitReport()})
    train_report = report.splits["train"]
    loaded = Loaded(report=report)
    loaded.train = _read_train(sources.train, settings, reading, log, train_report)
    held_out = [(source, source.split) for source in sources.explicit] or sources.own_held_out
    if held_out:
        names = " and ".join(dict.fromkeys(split.name for _, split in held_out))
        report.held_out_from = "eval_data" if sources.explicit else f"the source's own {names} split"
        loaded.held_out = _read_held_out(held_out, settings, reading, log, report)
    elif settings.validation_split > 0:
        share, seed = settings.validation_split, settings.seed
        report.held_out_from = f"validation_split {share:g} of data, by prompt (seed {seed})"
        loaded.train, loaded.held_out = split_rows(loaded.train, lambda e: e.opening, share, seed)
        report.splits["held_out"] = SplitReport(rows_read=len(loaded.held_out))
        train_report.rows_read -= len(loaded.held_out)
    _check_leaks(loaded, log, explicit=bool(sources.explicit), skip=settings.on_error == "skip")
    loaded.train = _sample(loaded.train, settings.max_samples, settings.seed, train_report)
    flip_labels(loaded.train, settings.flip_share, settings.seed, train_report)
    if "held_out" in report.splits:
        split_report = report.splits["held_out"]
        loaded.held_out = _sample(loaded.held_out, settings.max_eval_samples, settings.seed, split_report)
    _fill_columns(loaded, find_method_spec(settings.kind).columns)
    return loaded


def mapping_of(source: Source, settings: TrainSettings) -> ColumnMapping | None:
    """The column mapping of a source: its own, else the stage's."""
    return find_mapping(source.settings.columns if source.settings.columns is not None else settings.columns)


def _read_source(
    source: Source, split: Split, settings: TrainSettings, reading: Reading, log: ProblemLog, report: SplitReport
) -> list[Example]:
    check_format(source.settings.format, reading.rows)
    own = replace(reading, format=source.settings.format)
    mapping = mapping_of(source, settings)
    found = load_examples(source, split, own, mapping, log, report, drop_identical=settings.drop_identical)
    if reading.chat and any(example.form == "plain" for example in found):
        note = "prompts and answers are plain texts, so the chat template is not used (data.format: instruct uses it)"
        log.note(source.name, note)
    return found


def _read_train(
    sources: Sequence[Source], settings: TrainSettings, reading: Reading, log: ProblemLog, report: SplitReport
) -> list[Example]:
    parts: list[list[Example]] = []
    for source in sources:
        examples = _read_source(source, source.split, settings, reading, log, report)
        inside = [e for e in examples if in_slice(e.opening, settings.slice_share, settings.slice_offset)]
        report.unused += len(examples) - len(inside)
        parts.append(_sample(inside, source.settings.max_samples, settings.seed, report))
    weights = [source.settings.weight for source in sources] if _is_mixture(sources) else None
    sizes = mixture_sizes([len(part) for part in parts], weights)
    mixed = [_sample(part, size, settings.seed, report) for part, size in zip(parts, sizes)]
    return [example for part in mixed for example in part]


def _read_held_out(
    pairs: Sequence[tuple[Source, Split]],
    settings: TrainSettings,
    reading: Reading,
    log: ProblemLog,
    report: DataReport,
) -> list[Example]:
    split_report = report.splits["held_out"] = SplitReport()
    found = []
    for source, split in pairs:
        examples = _read_source(source, split, settings, reading, log, split_report)
        found += _sample(examples, source.settings.max_samples, settings.seed, split_report)
    return found


def _sample(examples: list[Example], count: int | None, seed: int, report: SplitReport) -> list[Example]:
    kept = sample_rows(examples, lambda e: e.place, count, seed)
    report.unused += len(examples) - len(kept)
    return kept


def _check_leaks(loaded: Loaded, log: ProblemLog, *, explicit: bool, skip: bool) -> None:
    """Held-out rows whose prompt is trained on: an error if `eval_data` names them, else left out and counted."""
    if not loaded.held_out:
        return
    trained = {example.prompt_text: example.place for example in loaded.train}
    kept = []
    for example in loaded.held_out:
        if example.prompt_text not in trained:
            kept.append(example)
            continue
        place = trained[example.prompt_text]
        if explicit and not skip:
            log.add(
                Problem(
                    example.file,
                    example.line,
                    "prompt",
                    f"this evaluation row has the prompt of the training row {place}",
                    "remove it from one of the two, or set on_error: skip (then left out of the evaluation)",
                    "leak",
                )
            )
        else:
            loaded.report.splits["held_out"].leaked.add(f"{example.place} (= {place})")
    loaded.held_out = kept


def _fill_columns(loaded: Loaded, further: Sequence[str]) -> None:
    """Give every example the same columns: those that any has, and further ones."""
    examples = [*loaded.train, *loaded.held_out]
    names = {name for example in examples for name in example.columns} - {"label"}  # rows without one are pairs
    for name in sorted(names.union(further)):
        lacking = [example for example in examples if name not in example.columns]
        for example in lacking:
            example.columns[name] = 0.0
        if 0 < len(lacking) < len(examples):
            loaded.report.notes.append(f"{len(lacking):,} rows have no {name}; it is taken as 0")
