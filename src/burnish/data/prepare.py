"""From settings to groups: the one call that training makes for its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import jinja2
import numpy as np
import tokenizers

from burnish.config.data import DataSettings
from burnish.config.registry import find_method_spec
from burnish.config.train import TrainSettings
from burnish.core.group import Completion, Group
from burnish.data.assemble import Sources, are_rows_drawn, find_sources, load_all
from burnish.data.cache import build_key, data_folder, load_entry, save_entry
from burnish.data.example import Reading, name_answers
from burnish.data.lengths import Limits
from burnish.data.problems import ProblemLog
from burnish.data.report import DataReport
from burnish.data.template import load_template
from burnish.data.tokenise import Encoding, encode_examples
from burnish.data.tokenizer import TextTokenizer
from burnish.disk import cache_root, disk_error
from burnish.errors import ConfigError, DataError

MADE_EQUAL_LIMIT = 0.1


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

    @property
    def longest(self) -> tuple[int, str]:
        """Tokens of the longest example, its prompt with the longest completion, and its name; (0, "") without any."""
        return max(((g.longest, g.id) for g in (*self.train, *self.held_out)), default=(0, ""))


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
    sources = find_sources(settings)
    folder = data_folder(cache_dir if cache_dir is not None else cache_root())
    key = _cache_key(settings, sources, encoding)
    found = load_entry(folder, key) if folder else None
    if found is not None:
        (train, held_out), meta = found
        report = DataReport.from_json(meta["report"])
        report.from_cache = True
        return PreparedData(train, held_out, report, meta["fingerprint"], meta["example"], encoding.end_ids)
    prepared = _prepare(settings, sources, encoding)
    if folder is not None:
        meta = {"report": prepared.report.to_json(), "fingerprint": prepared.fingerprint, "example": prepared.example}
        try:
            save_entry(folder, key, [prepared.train, prepared.held_out], meta)
        except OSError as error:
            reason = disk_error(error, folder, doing="cache the tokenised data").message
            prepared.report.notes.append(
                f"the tokenised data are not cached: {folder}: {reason}; the run goes on without (remove files there, "
                "or set BURNISH_CACHE to another folder or to off)"
            )
    return prepared


def _prepare(settings: TrainSettings, sources: Sources, encoding: Encoding) -> PreparedData:
    log = ProblemLog(settings.on_error)
    loaded = load_all(settings, sources, reading_of(settings, encoding.tokenizer), log)
    log.raise_if_due()
    report = loaded.report
    train = encode_examples(loaded.train, encoding, log, report.splits["train"])
    held_out = []
    if "held_out" in report.splits:
        held_out = encode_examples(loaded.held_out, encoding, log, report.splits["held_out"])
    log.raise_if_due()
    report.notes += list(log.notes)
    check_outcome(train, report)
    example = show_example(train[0], encoding.tokenizer)
    return PreparedData(train, held_out, report, fingerprint(train, held_out), example, encoding.end_ids)


def _cache_key(settings: TrainSettings, sources: Sources, encoding: Encoding) -> str:
    """Everything that the groups depend on; kinds and seeds that give the same groups share a key."""
    own = {name: value for name, value in settings.model_dump(mode="json").items() if name in DataSettings.model_fields}
    return build_key(
        {
            "rows": find_method_spec(settings.kind).rows,
            "columns": find_method_spec(settings.kind).columns,
            "seed": settings.seed if are_rows_drawn(settings, sources) else None,
            "settings": own,
            "strip_control": settings.strip_control,
            "sources": [source.fingerprint(split) for source, split in sources.read_splits()],
            "tokenizer": encoding.tokenizer.fingerprint,
            "template": encoding.template.fingerprint,
            "limits": asdict(encoding.limits),
            "libraries": [tokenizers.__version__, jinja2.__version__],
        }
    )


def find_data_key(settings: TrainSettings, tokenizer: TextTokenizer, *, context: int | None = None) -> str:
    """What `prepare_data` names the data by: equal keys, equal groups.

    Raises:
        DataError, ConfigError: As `prepare_data`, of sources and settings.
    """
    return _cache_key(settings, find_sources(settings), build_encoding(settings, tokenizer, context))


def reading_of(settings: TrainSettings, tokenizer: TextTokenizer | None) -> Reading:
    """How rows are read for a stage; without a tokenizer dialogues are taken as messages."""
    own = tokenizer is None or tokenizer.chat_template is not None
    return Reading(
        rows=find_method_spec(settings.kind).rows,
        chat=own or settings.chat_template is not None,
        strip_think=settings.strip_think,
        strip_control=settings.strip_control,
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
        labelled=find_method_spec(settings.kind).rows == "label",
    )


# --------------------------------------------------------------------------------------------------------- outcome


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
    for name, completion in zip(name_answers(len(group.completions)), group.completions):
        pieces = [(tokenizer.decode(ids), scored) for ids, scored in find_runs(completion)]
        text = "".join(f"«{piece}»" if scored else piece for piece, scored in pieces)
        lines.append(f"{name} ({len(completion.ids)} tokens, {completion.scored} scored): {text}")
    return "\n".join(lines)


def find_runs(completion: Completion) -> Iterator[tuple[list[int], bool]]:
    """Stretches of tokens that are all scored or all not."""
    borders = [0, *(np.flatnonzero(np.diff(completion.mask.astype(np.int8))) + 1).tolist(), len(completion.ids)]
    for start, stop in pairwise(borders):
        yield completion.ids[start:stop].tolist(), bool(completion.mask[start])
