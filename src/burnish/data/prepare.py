"""From settings to groups: the one call that training makes for its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from burnish.config.train import TrainSettings
from burnish.core.group import Group
from burnish.data.columns import find_mapping
from burnish.data.formats import Example, Reading, Want
from burnish.data.lengths import Limits
from burnish.data.load import load_examples
from burnish.data.problems import Problem, ProblemLog
from burnish.data.report import DataReport, SplitReport
from burnish.data.slices import Split
from burnish.data.sources import Source, as_sources, resolve_source
from burnish.data.splits import in_slice, mixture_sizes, sample_rows, split_rows
from burnish.data.template import load_template
from burnish.data.tokenise import Encoding, encode_examples
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import ConfigError, DataError

MADE_EQUAL_LIMIT = 0.1
WANTS: dict[str, Want] = {"sft": "completion"}


@dataclass
class PreparedData:
    """Data ready for the engine.

    Attributes:
        train: Groups to train on, in the order of the sources.
        held_out: Groups to evaluate on; no prompt of theirs is trained on.
        report: What became of the rows.
        fingerprint: SHA-256 over all groups.
        example: One decoded example; «…» marks what is scored.
        end_ids: Ids that end an answer (for sampling).
    """

    train: list[Group]
    held_out: list[Group]
    report: DataReport
    fingerprint: str
    example: str
    end_ids: frozenset[int] = frozenset()


@dataclass
class Loaded:
    """Examples of both sides, before they are tokenised."""

    train: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    report: DataReport = field(default_factory=DataReport)


def prepare_data(
    settings: TrainSettings,
    tokenizer: TextTokenizer,
    *,
    context: int | None = None,
    cache_dir: Path | None = None,
) -> PreparedData:
    """Read, check, split and tokenise the data of a training stage.

    Args:
        settings: The stage.
        tokenizer: The model's tokenizer.
        context: Tokens that the model takes at most; default: what the tokenizer's files say.
        cache_dir: Folder of the cache; default: BURNISH_CACHE or ~/.cache/burnish.

    Raises:
        DataError: Malformed data (all problems at once), or nothing is left to train on.
        ConfigError: Settings that cannot be met.
    """
    encoding = build_encoding(settings, tokenizer, context)
    log = ProblemLog(settings.on_error)
    loaded = load_all(settings, reading_of(settings, tokenizer), log)
    log_raised(log, loaded)
    groups = [
        encode_examples(examples, encoding, log, loaded.report.splits[name])
        for name, examples in (("train", loaded.train), ("held_out", loaded.held_out))
        if name in loaded.report.splits
    ]
    log.raise_if_due()
    train, held_out = groups[0], groups[1] if len(groups) > 1 else []
    finish_report(loaded.report, log)
    check_outcome(train, loaded.report)
    return PreparedData(
        train,
        held_out,
        loaded.report,
        fingerprint(train, held_out),
        show_example(train[0], tokenizer),
        encoding.end_ids,
    )


def want_of(kind: str) -> Want:
    """What a kind of stage needs of a row."""
    return WANTS.get(kind, "pair")


def reading_of(settings: TrainSettings, tokenizer: TextTokenizer) -> Reading:
    """How rows are read for a stage."""
    return Reading(
        want=want_of(settings.kind),
        chat=tokenizer.chat_template is not None or settings.chat_template is not None,
        strip_think=settings.strip_think,
        strip_control=bool(getattr(settings, "strip_control", False)),
    )


def build_encoding(settings: TrainSettings, tokenizer: TextTokenizer, context: int | None) -> Encoding:
    """How texts become ids for a stage.

    Raises:
        ConfigError: `max_length` exceeds the model's context.
    """
    limit = context if context is not None else tokenizer.model_max_length
    if settings.max_length is not None and limit is not None and settings.max_length > limit:
        raise ConfigError(
            f"max_length is {settings.max_length}, but the model takes {limit} tokens at most",
            where="max_length",
            remedy=f"set max_length: {limit} or less",
        )
    total = settings.max_length if settings.max_length is not None else limit
    return Encoding(
        tokenizer,
        load_template(settings.chat_template, tokenizer, settings.chat_template_kwargs),
        Limits(total, settings.max_prompt_length, settings.max_completion_length, settings.truncation),
        settings.train_on,
        settings.add_eos,
        settings.drop_identical,
    )


# --------------------------------------------------------------------------------------------------------- loading


def load_all(settings: TrainSettings, reading: Reading, log: ProblemLog) -> Loaded:
    """The examples of both sides, sliced, split and sampled; problems go to the log.

    Raises:
        ConfigError: No data are named.
        DataError: A source does not exist.
    """
    sources = [resolve_source(s) for s in as_sources(settings.data)]
    if not sources:
        raise ConfigError(
            "no training data are named", where="data", remedy="set data: <file, folder, bundled set or hub id>"
        )
    explicit = [resolve_source(s) for s in as_sources(settings.eval_data)]
    report = DataReport({"train": SplitReport()})
    loaded = Loaded(report=report)
    loaded.train = _read_train(sources, settings, reading, log, report.splits["train"])
    if explicit:
        report.held_out_from = "eval_data"
        loaded.held_out = _read_held_out([(s, s.split) for s in explicit], settings, reading, log, report)
    elif any(s.held_out for s in sources):
        pairs = [(s, Split(s.held_out)) for s in sources if s.held_out]
        report.held_out_from = (
            "the source's own " + " and ".join(dict.fromkeys(split.name for _, split in pairs)) + " split"
        )
        loaded.held_out = _read_held_out(pairs, settings, reading, log, report)
    elif settings.validation_split > 0:
        report.held_out_from = (
            f"validation_split {settings.validation_split:g} of data, by prompt (seed {settings.seed})"
        )
        loaded.train, loaded.held_out = split_rows(
            loaded.train, lambda e: e.opening, settings.validation_split, settings.seed
        )
        report.splits["held_out"] = SplitReport(rows_read=len(loaded.held_out))
        report.splits["train"].rows_read -= len(loaded.held_out)
    _check_leaks(loaded, log, explicit=bool(explicit), skip=settings.on_error == "skip")
    loaded.train = _sample(loaded.train, settings.max_samples, settings.seed, report.splits["train"])
    if "held_out" in report.splits:
        loaded.held_out = _sample(loaded.held_out, settings.max_eval_samples, settings.seed, report.splits["held_out"])
    _fill_columns(loaded, settings.kind)
    return loaded


def _mapping(source: Source, settings: TrainSettings):
    return find_mapping(source.settings.columns if source.settings.columns is not None else settings.columns)


def _read_source(
    source: Source, split: Split, settings: TrainSettings, reading: Reading, log: ProblemLog, report: SplitReport
) -> list[Example]:
    own = Reading(reading.want, reading.chat, source.settings.format, reading.strip_think, reading.strip_control)
    mapping = _mapping(source, settings)
    return load_examples(source, split, own, mapping, log, report, drop_identical=settings.drop_identical)


def _read_train(
    sources: Sequence[Source], settings: TrainSettings, reading: Reading, log: ProblemLog, report: SplitReport
) -> list[Example]:
    parts: list[list[Example]] = []
    for source in sources:
        examples = _read_source(source, source.split, settings, reading, log, report)
        inside = [e for e in examples if in_slice(e.opening, settings.slice_share, settings.slice_offset)]
        report.unused += len(examples) - len(inside)
        parts.append(_sample(inside, source.settings.max_samples, settings.seed, report))
    weighted = any("weight" in source.settings.model_fields_set for source in sources)
    weights = [source.settings.weight for source in sources] if weighted and len(sources) > 1 else None
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
    """Held-out rows whose prompt is trained on: an error for data named as evaluation data, else left out and counted."""
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
                    "remove it from one of the two, or set data.on_error: skip (then left out of the evaluation)",
                    "leak",
                )
            )
        loaded.report.splits["held_out"].leaked.add(f"{example.place} (= {place})")
    loaded.held_out = kept


def _fill_columns(loaded: Loaded, kind: str) -> None:
    """Give every example the same columns."""
    examples = [*loaded.train, *loaded.held_out]
    names = {name for example in examples for name in example.columns}
    if kind == "reward":
        names.add("margin")
    for example in examples:
        for name in names:
            example.columns.setdefault(name, 0.0)


# --------------------------------------------------------------------------------------------------------- outcome


def log_raised(log: ProblemLog, loaded: Loaded) -> None:
    """Raise what is wrong with rows before time is spent on tokenising."""
    log.raise_if_due()


def finish_report(report: DataReport, log: ProblemLog) -> None:
    """Put the notes of the readers into the report."""
    report.notes += list(log.notes)


def check_outcome(train: Sequence[Group], report: DataReport) -> None:
    """Refuse data that leave nothing to train on, or that the cut has spoilt.

    Raises:
        DataError: With the report's counts.
    """
    counts = report.splits["train"]
    if not train:
        raise DataError(
            "no training example is left:\n  " + "\n  ".join(counts.lines()),
            where="data",
            remedy="see the counts: raise max_length, widen the slice, or mend the rows",
        )
    pairs = counts.kept + counts.made_equal.count
    if counts.made_equal.count > MADE_EQUAL_LIMIT * pairs:
        raise DataError(
            f"truncation made both answers equal in {counts.made_equal.count} of {pairs} pairs "
            f"({', '.join(counts.made_equal.rows)})",
            where="data",
            remedy="raise max_length or max_completion_length, or set truncation: skip",
        )


def fingerprint(*splits: Sequence[Group]) -> str:
    """SHA-256 over ids, masks, names and columns of all groups."""
    digest = hashlib.sha256()
    for groups in splits:
        digest.update(b"split")
        for group in groups:
            head = [group.id, sorted(group.columns.items()), sorted(group.tags.items()), len(group.prompt)]
            digest.update(json.dumps([head, [len(c.ids) for c in group.completions]]).encode("utf-8", "surrogatepass"))
            digest.update(np.ascontiguousarray(group.prompt).tobytes())
            for completion in group.completions:
                digest.update(completion.ids.tobytes())
                digest.update(completion.mask.tobytes())
    return digest.hexdigest()


def show_example(group: Group, tokenizer: TextTokenizer) -> str:
    """A group as text; «…» marks the scored tokens, each completion on a line of its own."""
    lines = [f"[{group.id}] prompt ({len(group.prompt)} tokens): {tokenizer.decode(group.prompt.tolist())}"]
    names = ("chosen", "rejected") if len(group.completions) == 2 else ("completion",) * len(group.completions)
    for name, completion in zip(names, group.completions):
        pieces, start = [], 0
        ids, mask = completion.ids.tolist(), completion.mask.tolist()
        for i in range(1, len(ids) + 1):
            if i == len(ids) or mask[i] != mask[start]:
                text = tokenizer.decode(ids[start:i])
                pieces.append(f"«{text}»" if mask[start] else text)
                start = i
        lines.append(f"{name} ({len(ids)} tokens, {completion.scored} scored): {''.join(pieces)}")
    return "\n".join(lines)


__all__ = ["PreparedData", "build_encoding", "prepare_data"]
