"""Numbers that a fixed model gives once and that are kept on disk: log-probs of a reference, scores of a reward model."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from burnish.artifacts.folder import DamagedFolder, FolderWriter, NewerFormat, verify_folder
from burnish.config.data import DataSettings
from burnish.core.group import Group
from burnish.disk import disk_error

log = logging.getLogger("burnish")

COUNTS = "counts.npy"
Row = NDArray[np.float32]


@dataclass(frozen=True)
class StoredNumbers:
    """Some numbers for each of many items, on disk: a sealed folder for each key, written at once or not at all.

    A class of such numbers says `kind` (what begins the folder's name), `file` (which holds the numbers) and `what` (how
    messages call them).

    Attributes:
        folder: Where the caches lie.
        key: See `build_stored_key`; any difference makes another cache.
    """

    folder: Path
    key: Mapping[str, Any]

    kind: ClassVar[str]
    file: ClassVar[str]
    what: ClassVar[str]

    @property
    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{self.kind}-{digest[:24]}"

    def load_rows(self, counts: Sequence[int]) -> list[Row] | None:
        """One array an item; None if there are none, or of other counts, or damaged ones (said aloud).

        Args:
            counts: How many numbers each item has.
        """
        if not self.path.exists():
            return None
        try:
            meta = verify_folder(self.path).meta
            values = np.load(self.path / self.file, allow_pickle=False)
            stored = np.load(self.path / COUNTS, allow_pickle=False)
        except (DamagedFolder, NewerFormat, ValueError, OSError) as e:
            log.warning("the cached %s are damaged and are computed again: %s", self.what, str(e).splitlines()[0])
            return None
        if meta.get("key") != json.loads(json.dumps(self.key)) or stored.tolist() != list(counts):
            log.warning("the cached %s in %s are not of these data and are computed again", self.what, self.path)
            return None
        return np.split(values, np.cumsum(stored)[:-1]) if len(stored) else []

    def save_rows(self, rows: Sequence[Row]) -> None:
        """Write one array an item, replacing what is there."""
        values = np.concatenate(rows) if rows else np.zeros(0, dtype=np.float32)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise disk_error(exc, self.folder, doing=f"keep the {self.what}") from exc
        size = values.nbytes + 8 * len(rows)
        with FolderWriter(self.path, kind=self.kind, meta={"key": dict(self.key)}, expected=size) as writer:
            writer.write_bytes(self.file, _to_npy(values.astype(np.float32)))
            writer.write_bytes(COUNTS, _to_npy(np.array([len(r) for r in rows], dtype=np.int64)))


def fingerprint_groups(groups: Sequence[Group]) -> str:
    """SHA-256 of what a log-prob or a score depends on: every prompt, completion and mask, in order."""
    total = hashlib.sha256(b"burnish groups 1\n")
    for group in groups:
        total.update(np.array([len(group.prompt), len(group.completions)], dtype=np.int64).tobytes())
        total.update(np.ascontiguousarray(group.prompt, dtype=np.int32).tobytes())
        for c in group.completions:
            total.update(np.array([len(c.ids)], dtype=np.int64).tobytes())
            total.update(np.ascontiguousarray(c.ids, dtype=np.int32).tobytes())
            total.update(np.ascontiguousarray(c.mask, dtype=np.bool_).tobytes())
    return total.hexdigest()


def build_stored_key(
    *, model: str, groups: Sequence[Group], settings: DataSettings, template: str | None, form: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a stored number depends on.

    Args:
        model: Fingerprint of the model that gives it.
        settings: Lengths and truncation.
        template: The chat template in use.
        form: How the model is kept and run: types, quantisation, attention, device.
    """
    return {
        "model": model,
        "data": fingerprint_groups(groups),
        "template": hashlib.sha256((template or "").encode()).hexdigest(),
        "max_length": settings.max_length,
        "max_prompt_length": settings.max_prompt_length,
        "max_completion_length": settings.max_completion_length,
        "truncation": settings.truncation,
        **form,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "format": 1,
    }


def plan_batches(groups: Sequence[Group], budget: int, least: int = 0) -> list[list[int]]:
    """Positions of the groups, longest first, in batches of at most `budget` tokens (a longer group is alone).

    Args:
        least: So many batches at least; the further ones are empty.
    """
    order = sorted(range(len(groups)), key=lambda i: -groups[i].tokens)
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if not batches or groups[i].tokens > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= groups[i].tokens
    return batches + [[] for _ in range(least - len(batches))]


def _to_npy(values: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()
