"""`burnish merge`: which adapter, on which rows it is checked, where the merged model goes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from burnish.artifacts.folder import DamagedFolder, FolderWriter, load_manifest, verify_folder
from burnish.artifacts.run_folder import load_run, load_stage, plain_name, stage_folders
from burnish.config.keys import settings_class
from burnish.config.registry import find_known
from burnish.config.stages import SftSettings
from burnish.config.train import TrainSettings
from burnish.core.group import Group
from burnish.data.prepare import prepare_data
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import BurnishError, ConfigError, UsageError
from burnish.models.fingerprint import TOKENIZER_FILES
from burnish.models.folder import inspect_model_folder, read_context, read_text_config
from burnish.models.merge import choose_rows, draw_rows, find_base_folder, measure_kl, merge_folder, save_merged
from burnish.models.quantise import read_quantization

log = logging.getLogger("burnish")

KIND = "merged"
FALLBACK = "pocket/chat"
KL_ROWS = 64
SAVE_DTYPES: dict[str, Any] = {"fp32": torch.float32, "source": "source", "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter to merge.

    Attributes:
        folder: Folder with adapter_config.json.
        name: What the merged folder is named after.
        record: stage.json of the stage that made it; {} outside a run.
    """

    folder: Path
    name: str
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to check on.

    Attributes:
        groups: The rows.
        what: What they are, for people.
        own: Held-out rows of the stage, or data that was named: the KL is measured on these.
    """

    groups: list[Group]
    what: str
    own: bool


def find_source(word: str, root: Path) -> Source:
    """The adapter that RUN/STAGE or a path means.

    Args:
        word: Folder of an adapter or of a stage; or RUN/STAGE below `root`, the stage by folder or by name.
        root: Folder of runs.

    Raises:
        UsageError: Nothing there, several stages, no adapter, or a stage without a result.
    """
    for place in (Path(word).expanduser(), root / word):
        if (place / "adapter_config.json").is_file():
            record = load_stage(place.parent) if place.name == "final" else None
            return _describe_source(place, record)
        if (place / "stage.json").is_file():
            return _from_stage(place)
        if (place / "run.json").is_file():
            return _from_run(place)
        if (place / "config.json").is_file():
            raise UsageError(
                "this is a full model; there is no adapter to merge",
                where=str(place),
                remedy="give the folder of an adapter (adapter_config.json), or use this model as it is",
            )
        run, _, stage = str(place).rpartition("/")
        if (Path(run) / "run.json").is_file():
            for folder in stage_folders(Path(run)):
                found = load_stage(folder) or {}
                if stage in (found.get("name"), found.get("label")):
                    return _from_stage(folder)
            raise UsageError(f"the run has no stage {stage!r}", where=run, found=stage, remedy=_list_stages(Path(run)))
    raise UsageError(
        f"there is no adapter and no stage {word!r}",
        where=str(root),
        found=word,
        remedy="give RUN/STAGE (see `burnish runs list`) or the folder of an adapter",
    )


def _from_stage(folder: Path) -> Source:
    record, final = load_stage(folder) or {}, folder / "final"
    if not final.is_dir():
        raise UsageError(
            f"stage {record.get('label') or folder.name} has no result yet (its state: {record.get('state')})",
            where=str(folder),
            remedy="let it finish: give its command again",
        )
    if not (final / "adapter_config.json").is_file():
        raise UsageError(
            f"stage {record.get('label') or folder.name} trained no adapter; its result is a full model already",
            where=str(final),
            remedy="use final/ as it is",
        )
    return _describe_source(final, record)


def _from_run(run: Path) -> Source:
    with_adapter = [s for s in stage_folders(run) if (s / "final" / "adapter_config.json").is_file()]
    if len(with_adapter) == 1:
        return _from_stage(with_adapter[0])
    raise UsageError(
        f"the run has {len(with_adapter)} stages with an adapter; name one"
        if with_adapter
        else "no stage of it has an adapter",
        where=str(run),
        remedy=_list_stages(run),
    )


def _list_stages(run: Path) -> str:
    names = [f"{run.name}/{(load_stage(s) or {}).get('label') or s.name}" for s in stage_folders(run)]
    return f"its stages: {', '.join(names)}" if names else "see `burnish runs list`"


def _describe_source(folder: Path, record: Mapping[str, Any] | None) -> Source:
    folder = folder.resolve()
    if inspect_model_folder(folder).kind != "adapter":
        raise UsageError(
            "this is a full model; there is no adapter to merge", where=str(folder), remedy="use this model as it is"
        )
    if not record:
        return Source(folder, plain_name(folder.name))
    run = next((p for p in folder.parents if (p / "run.json").is_file()), None)
    label = str(record.get("label") or record.get("name") or folder.parent.name)
    return Source(folder, plain_name(f"{load_run(run).get('name') or run.name}-{label}" if run else label), record)


def choose_output(source: Source, base: Path, output: str | None, *, force: bool) -> Path:
    """Where the merged model goes, checked before anything is loaded.

    Raises:
        UsageError: Something is there already, or it would touch the adapter or its base.
    """
    place = (Path(output).expanduser() if output else Path(f"{source.name}-merged")).absolute()
    for kept in (source.folder, base):
        if place.resolve() == kept or kept in place.resolve().parents or place.resolve() in kept.parents:
            raise UsageError(
                "the merged model would be written into the adapter or its base, or over them",
                where=str(place),
                remedy="choose another --output",
            )
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return place
    if not force:
        raise UsageError(
            f"{place} is there already",
            where="--output",
            found=str(place),
            remedy="choose another --output, or replace it with --force",
        )
    try:
        ours = place.is_dir() and load_manifest(place).kind == KIND
    except BurnishError:
        ours = False
    if not ours:
        raise UsageError(
            f"{place} was not written by `burnish merge` and is not replaced",
            where="--output",
            remedy="remove it yourself, or choose another --output",
        )
    return place


def find_rows(source: Source, tokenizer_folder: Path | None, data: str | None) -> Rows:
    """Rows of the stage's own held-out data; of `data` where it is named; else of bundled texts.

    Raises:
        BurnishError: `data` cannot be read.
    """
    if tokenizer_folder is None:
        vocabulary = int(read_text_config(source.folder).get("vocab_size") or 1000)
        return Rows(draw_rows(vocabulary), "random ids (the adapter and its base have no tokenizer)", own=False)
    tokenizer, context = TextTokenizer.load(str(tokenizer_folder)), read_context(source.folder)
    if data is not None:
        found = prepare_data(SftSettings(data=data), tokenizer, context=context)
        return Rows(found.held_out or found.train, data, own=True)
    why = "it is of no run"
    kind = str(source.record.get("kind"))
    spec = find_known(kind)
    if spec is not None and spec.trains:
        try:
            settings = settings_class(kind).model_validate(source.record.get("settings"))
            assert isinstance(settings, TrainSettings)
            found = prepare_data(settings, tokenizer, context=context)
            if found.held_out:
                return Rows(found.held_out, f"held-out rows of stage {source.record.get('label')}", own=True)
            why = "its stage holds no rows out"
        except (BurnishError, ValidationError) as error:
            why = f"its stage's data cannot be read: {str(error).splitlines()[0][:200]}"
    try:
        found = prepare_data(SftSettings(data=FALLBACK), tokenizer, context=context)
        return Rows(found.train[:64], f"rows of {FALLBACK} ({why})", own=False)
    except BurnishError:
        return Rows(draw_rows(len(tokenizer.backend.get_vocab())), f"random ids ({why})", own=False)


def merge_adapter(
    word: str,
    *,
    root: Path,
    output: str | None = None,
    force: bool = False,
    data: str | None = None,
    save_dtype: str = "fp32",
) -> dict[str, Any]:
    """Fold an adapter into its full-precision base and write the merged model, sealed.

    Returns:
        "output", "source", "base", "difference" (of a logit), "positions", "rows"; for an adapter over a quantised base
        "quantization" and what `measure_kl` gives.

    Raises:
        UsageError, ConfigError: See the functions above; nothing is written then.
    """
    source = find_source(word, root)
    _check_seal(source)
    base = find_base_folder(source.folder)
    if inspect_model_folder(base).kind == "adapter":
        raise ConfigError(
            "the base of this adapter is an adapter itself",
            where=str(source.folder),
            found=str(base),
            remedy="merge that one first, and set base_model_name_or_path to the merged model",
        )
    place = choose_output(source, base, output, force=force)
    tokenizer_folder = next((f for f in (source.folder, base) if _has_tokenizer(f)), None)
    quantization = read_quantization(source.folder)
    rows = find_rows(source, tokenizer_folder, data)
    merged = merge_folder(source.folder, choose_rows(rows.groups))
    found: dict[str, Any] = {
        "source": str(source.folder),
        "base": str(base),
        "difference": merged.difference,
        "positions": merged.positions,
        "rows_of": rows.what,
    }
    if quantization is not None:
        found["quantization"] = str(quantization)
        if rows.own:
            found |= measure_kl(merged, source.folder, quantization, rows.groups[:KL_ROWS])
    place.parent.mkdir(parents=True, exist_ok=True)
    item = 4 if save_dtype == "fp32" else 2
    size = sum(p.numel() for p in merged.model.parameters()) * item
    with FolderWriter(place, kind=KIND, meta=found, expected=size) as writer:
        save_merged(
            merged,
            writer.folder,
            tokenizer_source=tokenizer_folder,
            dtype=SAVE_DTYPES[save_dtype],
            extra={"base_model_path": str(base), "model_type": str(source.record.get("kind") or merged.head)},
        )
    return {"output": str(place), **found}


def _check_seal(source: Source) -> None:
    if not source.record:
        return
    try:
        verify_folder(source.folder)
    except DamagedFolder as error:
        raise DamagedFolder(
            f"the adapter is damaged: {error.message}",
            where=str(source.folder),
            remedy="remove final/ and give the run's command again: the stage is then run anew",
        ) from None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES if name != "chat_template.jinja")
