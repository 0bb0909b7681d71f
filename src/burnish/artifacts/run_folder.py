"""The run folder: what ran, with what, how far it came. Plain files that other programs may read.

    runs/<name>/ run.json  recipe.yaml  resolved.yaml  environment.json  log.txt  report.html
                 [<model>/] 01-sft/ stage.json  metrics.jsonl  timing.jsonl  checkpoint-N/  final/
                 superseded/ …

`run.json` is the run's own record and what makes a folder a run; `stage.json` is each stage's.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from burnish import __version__
from burnish.artifacts.environment import describe_environment
from burnish.artifacts.files import TEMPORARY, dump_json, write_file, write_json_file
from burnish.artifacts.folder import check_format, clean_leftovers
from burnish.artifacts.lock import LOCK, RunLock, lock_holder
from burnish.artifacts.redact import redact, redact_tree
from burnish.clock import wall
from burnish.disk import disk_error
from burnish.errors import BurnishError, UsageError

FORMAT = 1
RUN = "run.json"
STAGE = "stage.json"
GRID = "grid.json"  # in the folder of a grid, beside run.json
LOG = "log.txt"
SUPERSEDED = "superseded"
STATES = ("running", "done", "failed", "interrupted")
_OWN_BEFORE_RUN_JSON = {LOCK, LOG, "recipe.yaml", "resolved.yaml", "environment.json"}
_OWN_TEMPORARY = f"{TEMPORARY}{RUN}-"  # run.json is written first
_CLEARED = ("reference",)  # folders of a stage that hold sealed folders of their own


class RunFolder:
    """A run's folder, opened for writing by the one process that holds its lock.

    Make one with `open` (creates or continues) or `attach` (no lock: further ranks and readers). Use as a context
    manager, or call `close`.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: RunLock | None, *, fresh: bool) -> None:
        self.path, self.record, self._lock, self.fresh = Path(path), record, lock, fresh
        self.notes: list[str] = []

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        *,
        recipe_text: str,
        resolved: Mapping[str, Any],
        command: list[str] | None = None,
        environment: Mapping[str, Any] | None = None,
        remarks: Sequence[str] = (),
    ) -> RunFolder:
        """Create `root/name`, or open it again if it belongs to the same recipe; locked until `close`.

        Args:
            root: The folder of all runs.
            name: The run's name, one plain path component.
            recipe_text: The recipe as the user wrote it (YAML); secrets are masked before it is stored.
            resolved: All settings as they hold, plain JSON; `resolved["name"]` is the recipe's name.
            command: The command line, for the record.
            environment: Further facts for environment.json (threads, device, ranks).
            remarks: Texts that stand above resolved.yaml as comments.

        Raises:
            UsageError: A bad name, a folder that is no run, another recipe's run, or one in use.
            ResourceError: The folder cannot be made or written.
        """
        path = Path(root) / check_name(name)
        _find_record(path, resolved)  # before the first write: nothing is changed in a folder that is not this run's
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise disk_error(exc, path, doing="make the run folder") from exc
        lock = RunLock(path).acquire()
        try:
            record = _find_record(path, resolved)
            cleaned = clean_leftovers(path)
            fresh = record is None
            settings = redact_tree(resolved)
            if record is None:
                record = {
                    "format": FORMAT,
                    "run_id": secrets.token_hex(8),
                    "name": name,
                    "recipe": settings.get("name"),
                    "created": wall(),
                    "starts": 0,
                }
            start = {
                "state": "running",
                "started": wall(),
                "command": redact_tree(command or []),
                "burnish": __version__,
            }
            record = {**record, **start, "starts": record.get("starts", 0) + 1}
            for key in ("ended", "seconds", "exit_code", "error"):
                record.pop(key, None)
            run = cls(path, record, lock, fresh=fresh)
            run.notes += cleaned
            run.update()
            run._store("recipe.yaml", redact(recipe_text))
            comments = "".join(f"# {line}\n" for text in remarks for line in redact(text).splitlines())
            run._store("resolved.yaml", comments + dump_yaml(settings))
            run._store("environment.json", dump_json(describe_environment(dict(environment or {}))))
        except BaseException:
            lock.release()
            raise
        return run

    @classmethod
    def attach(cls, path: Path) -> RunFolder:
        """A run's folder without the lock, for reading and for ranks other than 0."""
        return cls(Path(path), load_run(path), None, fresh=False)

    @property
    def run_id(self) -> str:
        """Random id made with the folder; stays over interruptions."""
        return self.record["run_id"]

    @property
    def log_path(self) -> Path:
        """Where the run's log goes."""
        return self.path / LOG

    def update(self, **fields: Any) -> None:
        """Change fields of run.json (state, models, stages, exit_code, error, seconds …)."""
        self.record = {**self.record, **redact_tree(fields)}
        write_json_file(self.path / RUN, self.record)

    def finish(self, state: str, *, seconds: float, exit_code: int, error: str | None = None) -> None:
        """Record how the run ended this time; `seconds` from the monotonic clock (`seconds_total` adds up starts)."""
        if state not in STATES:
            raise ValueError(f"{state!r} is not one of {STATES}")
        extra = {"error": error} if error else {}
        total = round(float(self.record.get("seconds_total") or 0) + seconds, 3)
        self.update(state=state, ended=wall(), seconds=seconds, seconds_total=total, exit_code=exit_code, **extra)

    def stage_dir(self, index: int, name: str, model: str | None = None) -> Path:
        """`[<model>/]01-sft`, created; `index` counts from 1; unfinished writes of a killed run are cleared away."""
        return self.make_stage_dir(self.stage_path(index, name, model))

    def make_stage_dir(self, folder: Path) -> Path:
        """A stage's folder at a place of its own, created and cleared like `stage_dir`'s."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise disk_error(exc, folder, doing="make the stage's folder") from exc
        if self._lock is not None:
            for place in (folder, *(folder / name for name in _CLEARED)):
                self.notes += clean_leftovers(place)
        return folder

    def stage_path(self, index: int, name: str, model: str | None = None) -> Path:
        """Where `stage_dir` makes the folder."""
        base = self.path / plain_name(model) if model else self.path
        return base / f"{index:02d}-{plain_name(name)}"

    def supersede(self, stage: Path) -> Path | None:
        """Move a stage's folder to `superseded/`, under a number not used before; None when there is none."""
        relative = stage.relative_to(self.path)
        if not stage.exists():
            return None
        number = 1
        while True:
            target = self.path / SUPERSEDED / relative.with_name(f"{relative.name}.{number}")
            if not target.exists():
                break
            number += 1
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stage.rename(target)
        except OSError as exc:
            raise disk_error(exc, stage, doing=f"move the old {relative} to {SUPERSEDED}/") from exc
        return target

    def _store(self, name: str, data: str | bytes) -> None:
        """Write a file; a different earlier version is kept in `superseded/`."""
        place = self.path / name
        raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        if place.exists():
            if place.read_bytes() == raw:
                return
            self.supersede(place)
        write_file(place, raw)

    def close(self) -> None:
        """Free the lock."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _find_record(path: Path, resolved: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the run that is there, if it is the same recipe's; None in an empty folder."""
    try:
        begun = (path / RUN).exists()
        names = sorted(p.name for p in path.iterdir()) if not begun and path.is_dir() else []
    except OSError as exc:
        raise disk_error(exc, path, doing="read the run folder") from exc
    if not begun:
        strangers = [n for n in names if n not in _OWN_BEFORE_RUN_JSON and not n.startswith(_OWN_TEMPORARY)]
        if strangers:
            raise UsageError(
                f"the folder holds {strangers[0]!r} and is none of burnish's runs",
                where=str(path),
                found=strangers[:5],
                remedy="choose another --run-name or --output-dir, or empty the folder",
            )
        return None
    record = load_run(path)
    wanted = redact_tree(resolved)
    if record.get("recipe") != wanted.get("name"):
        old: dict[str, Any] = {}
        with contextlib.suppress(OSError, yaml.YAMLError):
            old = yaml.safe_load((path / "resolved.yaml").read_text(encoding="utf-8")) or {}
        lines = describe_differences(old, wanted)
        raise UsageError(
            f"this folder is a run of another recipe, {record.get('recipe')!r}, not of {wanted.get('name')!r}:"
            + "".join(f"\n    {line}" for line in lines),
            where=str(path),
            found=record.get("recipe"),
            remedy="give this run a name of its own with --run-name, or delete the old one with `burnish runs delete`",
        )
    return record


def load_run(path: Path) -> dict[str, Any]:
    """Read run.json.

    Raises:
        UsageError: No run, or one that only a later version reads.
    """
    return _load_record(Path(path) / RUN, "run")


def load_stage(stage_dir: Path) -> dict[str, Any] | None:
    """Read a stage's record; None when the stage never began.

    Raises:
        UsageError: It cannot be read, or only a later version reads it.
    """
    place = Path(stage_dir) / STAGE
    return _load_record(place, "stage") if place.exists() else None


def save_stage(stage_dir: Path, record: Mapping[str, Any]) -> None:
    """Write a stage's record: state, key, inputs, figures, timings …; secrets masked, the format added."""
    if record.get("state") not in STATES:
        raise ValueError(f"state {record.get('state')!r} is not one of {STATES}")
    write_json_file(Path(stage_dir) / STAGE, {"format": FORMAT, **redact_tree(record)})


def _load_record(place: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(place.read_bytes())
        version = found["format"]
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"no {what} of burnish here: {place.name} is missing",
            where=str(place.parent),
            remedy="name a folder that `burnish runs list` shows",
        ) from None
    except OSError as exc:
        raise disk_error(exc, place, doing=f"read {place.name}") from exc
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(
            f"{place.name} is damaged: no readable record of a {what}",
            where=str(place),
            remedy="restore the file from a backup, or move the folder away and run again",
        ) from None
    check_format(version, found, place, FORMAT)
    if type(version) is not int or version < 1 or not isinstance(found.get("state"), str):
        raise UsageError(
            f"{place.name} is none of burnish's: no record of a {what} in format 1 to {FORMAT}",
            where=str(place),
            found=version,
            remedy="it is another program's folder: choose another --run-name or --output-dir",
        )
    return found


def list_runs(root: Path) -> list[dict[str, Any]]:
    """All runs directly under `root`, newest first: name, state, recipe, created, stages; damaged ones `problem`.

    A run whose record says "running" and whose lock nobody holds was killed: its state is given as "interrupted".
    """
    rows: list[dict[str, Any]] = []
    folders = sorted(Path(root).iterdir()) if Path(root).is_dir() else []
    for folder in folders:
        if folder.is_symlink() or folder.name.startswith(".") or not (folder / RUN).is_file():
            continue
        row: dict[str, Any] = {"name": folder.name, "path": str(folder), "state": "damaged", "stages": []}
        try:
            record = load_run(folder)
            row.update(
                {k: record.get(k) for k in ("run_id", "recipe", "created", "started", "ended", "seconds", "state")}
            )
            row["holder"] = lock_holder(folder)
            if row["state"] == "running" and row["holder"] is None:
                row["state"] = "interrupted"
            row["stages"] = [
                {"stage": p.relative_to(folder).as_posix(), "state": _stage_state(p, alive=row["holder"] is not None)}
                for p in stage_folders(folder)
            ]
        except BurnishError as exc:
            row["problem"] = exc.message
        rows.append(row)
    return sorted(rows, key=lambda r: (r.get("created") or "", r["name"]), reverse=True)


def stage_folders(run_dir: Path) -> list[Path]:
    """Folders of a run's stages, in order, those of several models one model after the other."""
    run = Path(run_dir)
    if (run / GRID).exists():  # its cells are runs of their own
        return []
    found = [p.parent for p in run.glob(f"*/{STAGE}")] + [p.parent for p in run.glob(f"*/*/{STAGE}")]
    return sorted(p for p in found if not p.relative_to(run).as_posix().startswith((SUPERSEDED, ".")))


def _stage_state(stage: Path, *, alive: bool) -> str:
    try:
        state = (load_stage(stage) or {}).get("state", "damaged")
    except UsageError:
        return "damaged"
    return "interrupted" if state == "running" and not alive else state


def check_name(name: str) -> str:
    """A run's name, if it can be one plain folder on any system.

    Raises:
        UsageError: It cannot.
    """
    bad = not name.strip() or name in (".", "..") or name[0] in ".-" or name[-1] in ". "
    bad = bad or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name) or len(name.encode("utf-8", "replace")) > 200
    if bad:
        raise UsageError(
            f"{name!r} cannot be the name of a run",
            found=name,
            remedy="use up to 200 bytes of letters, digits, spaces, '.', '_' and '-', not beginning with '.' or '-'",
        )
    return name


def plain_name(text: str) -> str:
    """Any text (a hub id, a path) as one path component."""
    plain = re.sub(r'[/\\:*?"<>|\x00-\x1f]+', "--", text.strip()).strip(". -") or "unnamed"
    while len(plain.encode("utf-8", "replace")) > 120:
        plain = plain[1:]
    return plain


def dump_yaml(obj: Mapping[str, Any]) -> str:
    """Plain YAML in the order given."""
    return yaml.safe_dump(json.loads(json.dumps(obj)), sort_keys=False, allow_unicode=True, width=110)


def describe_differences(old: Any, new: Any, *, limit: int = 20) -> list[str]:
    """What differs between two JSON-like objects, a line for each place: `stages.1.beta: 0.1 → 0.05`."""
    lines = list(_differences(old, new, ""))
    more = len(lines) - limit
    return lines if more <= 0 else [*lines[:limit], f"… and {more} more"]


def _differences(old: Any, new: Any, at: str) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(k for k in new if k not in old)]
        return [
            d
            for k in keys
            for d in _differences(old.get(k, _ABSENT), new.get(k, _ABSENT), f"{at}.{k}" if at else f"{k}")
        ]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        pairs = range(max(len(old), len(new)))
        return [
            d
            for i in pairs
            for d in _differences(old[i] if i < len(old) else _ABSENT, new[i] if i < len(new) else _ABSENT, f"{at}.{i}")
        ]
    return [] if old is not _ABSENT and new is not _ABSENT and old == new else [f"{at}: {_short(old)} → {_short(new)}"]


_ABSENT = object()


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
