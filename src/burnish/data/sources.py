"""Data sources: from what a recipe says to files (or hub rows), their splits, and the hash of their bytes."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from burnish.config.data import DataSource
from burnish.data.bundled import list_data, resolve_data
from burnish.data.problems import ProblemLog
from burnish.data.readers import ACCEPTED, Row, count_rows, file_kind, read_rows
from burnish.data.slices import Split, parse_split
from burnish.errors import DataError

_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "manifest.json")
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval", "heldout", "held_out")


@dataclass(frozen=True)
class Source:
    """A source whose place is known.

    Attributes:
        settings: What the recipe says of it.
        name: Its name in metrics.
        files: Split to its files, each with the name to show; empty for hub sets.
        held_out: The split that serves for evaluation, if the source has one.
        split: The split and slice to read.
        hub: The hub id, or None.
    """

    settings: DataSource
    name: str
    files: dict[str, list[tuple[Path, str]]]
    split: Split
    held_out: str | None = None
    hub: str | None = None
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)

    def rows(self, split: Split, log: ProblemLog) -> Iterator[Row]:
        """The rows of a split or slice; malformed ones go to the log."""
        if self.hub is not None:
            from burnish.data.hub import read_hub

            yield from read_hub(self.hub, self.settings.subset, split)
            return
        files = self.files[split.name]
        total = count_rows(files) if split.needs_total else None
        yield from read_rows(files, log, split.span(total))

    def fingerprint(self, split: Split) -> str:
        """Hash of the bytes that `rows` reads and of the slice."""
        key = split.name
        if key not in self._hashes:
            digest = hashlib.sha256()
            if self.hub is not None:
                from burnish.data.hub import hub_fingerprint

                digest.update(hub_fingerprint(self.hub, self.settings.subset, split).encode())
            for path, shown in self.files.get(key, []):
                digest.update(f"{shown}\0".encode("utf-8", "surrogateescape"))
                with path.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            self._hashes[key] = digest.hexdigest()
        return f"{self._hashes[key]}:{split.name}[{split.start}:{split.stop}]"


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk` (read through `datasets`, as hub sets are)."""
    return (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and any(path.glob("*.arrow")))


def as_sources(data: str | DataSource | list[str | DataSource] | None) -> list[DataSource]:
    """The setting `data` as a list; a plain string means a source of that name."""
    if data is None:
        return []
    items = data if isinstance(data, list) else [data]
    return [DataSource(source=item) if isinstance(item, str) else item for item in items]


def resolve_source(settings: DataSource) -> Source:
    """Find a source: an existing local path first, then bundled sets, then the hub.

    Raises:
        DataError: There is no such source, or it lacks the split.
    """
    split = parse_split(settings.split)
    text = settings.source
    name = settings.name or _short_name(text)
    saved = is_saved_dataset(Path(text).expanduser())
    found = None if saved else _local_files(text) or _bundled_files(text)
    if found is not None:
        if split.name not in found:
            if settings.split is None and len(found) == 1:
                split = Split(next(iter(found)))
            else:
                raise DataError(
                    f"there is no split {split.name!r}; there are {', '.join(found)}",
                    where=text,
                    remedy=f"set data.split to one of them, for example {next(iter(found))}",
                )
        return Source(settings, name, found, split, _held_out(split, found))
    owners = {bundled.partition("/")[0] for bundled in list_data()}
    if not saved and (_looks_like_path(text) or text.partition("/")[0] in owners):
        raise _missing(text)
    from burnish.data.hub import hub_splits

    splits = hub_splits(text, settings.subset)
    if split.name not in splits:
        raise DataError(
            f"there is no split {split.name!r}; there are {', '.join(splits)}", where=text, remedy="set data.split"
        )
    return Source(settings, name, {}, split, _held_out(split, splits), hub=text)


def _held_out(split: Split, splits: Collection[str]) -> str | None:
    """The split that goes with a training split for evaluation: test with train, test_prefs with train_prefs."""
    if not split.name.startswith("train"):
        return None
    return next((s + split.name[5:] for s in _HELD_OUT if s + split.name[5:] in splits), None)


def _short_name(text: str) -> str:
    last = text.rstrip("/").rpartition("/")[2]
    for ending in (".gz", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".ndjson"):
        last = last.removesuffix(ending)
    return last or text


def _local_files(text: str) -> dict[str, list[tuple[Path, str]]] | None:
    path = Path(text).expanduser()
    if path.is_file():
        if file_kind(path) is None:
            ending = "".join(path.suffixes) or "(none)"
            raise DataError(
                f"the ending {ending} is not known; accepted are {ACCEPTED}",
                where=text,
                remedy="rename the file to its real format, or convert it",
            )
        return {"train": [(path, text)]}
    if path.is_dir():
        return _folder_files(path, text)
    if any(mark in text for mark in "*?["):
        matches = sorted(_glob(path))
        files = [(p, p.as_posix()) for p in matches if p.is_file() and file_kind(p)]
        if not files:
            raise DataError(
                f"no file matches; accepted are {ACCEPTED}",
                where=text,
                remedy="check the pattern (quote it in a shell)",
            )
        return {"train": files}
    return None


def _glob(pattern: Path) -> Iterator[Path]:
    base = Path(pattern.anchor) if pattern.anchor else Path()
    return base.glob(str(pattern.relative_to(pattern.anchor) if pattern.anchor else pattern))


def _folder_files(folder: Path, shown: str) -> dict[str, list[tuple[Path, str]]]:
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and file_kind(p) and not p.name.startswith((".", "_")) and p.name not in _NOT_DATA
    )
    if not files:
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DataError(
            f"no data file in this folder (found {inside}); accepted are {ACCEPTED}",
            where=shown,
            remedy="give the folder that holds the data files",
        )
    base = shown.rstrip("/")
    splits: dict[str, list[tuple[Path, str]]] = {}
    for file in files:
        relative = file.relative_to(folder).as_posix()
        splits.setdefault(_split_of(relative), []).append((file, f"{base}/{relative}"))
    if "train" in splits:
        return splits
    held_out = [name for name in splits if name in _HELD_OUT]
    if held_out and len(splits) == len(held_out):
        return splits
    return {"train": [pair for pairs in splits.values() for pair in pairs]}


def _split_of(relative: str) -> str:
    """The split that a file's name (or its folder's) says: train-00001.parquet, test.jsonl, validation/a.json."""
    words = [relative.rpartition("/")[2], *relative.split("/")[:-1]]
    for word in words:
        lowered = word.lower()
        for split in ("train", *_HELD_OUT):
            rest = lowered.removeprefix(split)
            if rest != lowered and (not rest or rest[0] in "._-"):
                return split
    return "train"


def _bundled_files(text: str) -> dict[str, list[tuple[Path, str]]] | None:
    folder = resolve_data(text)
    if folder is None:
        return None
    files = {p.name.partition(".")[0]: p for p in sorted(folder.glob("*.jsonl.gz"))}
    return {name: [(path, f"{text}/{path.name}")] for name, path in files.items()}


def _looks_like_path(text: str) -> bool:
    path = Path(text)
    return (
        path.is_absolute()
        or text.startswith((".", "~"))
        or text.count("/") != 1
        or file_kind(path) is not None
        or (path.parent.is_dir() and str(path.parent) != ".")
    )


def _missing(text: str) -> DataError:
    path = Path(text).expanduser()
    nearby = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    bundled = ", ".join(list_data()) or "none"
    near = difflib.get_close_matches(path.name, nearby, 1) or difflib.get_close_matches(text, list_data(), 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return DataError(
        "there is no such file, folder or bundled set",
        where=text,
        remedy=f"{hint}give an existing path, one of the bundled sets ({bundled}), or a hub id (owner/name)",
    )
