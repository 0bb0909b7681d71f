"""Which checkpoints a stage has, which is the newest good one, which may go: by manifests, never by names or times."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from burnish.artifacts.files import temporary_name
from burnish.artifacts.folder import MANIFEST, PINNED, DamagedFolder, FolderWriter, Manifest, verify_folder
from burnish.disk import disk_error
from burnish.faults import fault_point

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

KIND = "checkpoint"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A sealed checkpoint: where it is and what its manifest says."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done when it was made."""
        return int(self.manifest.meta["step"])

    @property
    def run_id(self) -> str | None:
        """Id of the run that made it."""
        return self.manifest.meta.get("run_id")

    @property
    def pinned(self) -> bool:
        """A file `pinned` lies in the folder: it is never deleted."""
        return (self.path / PINNED).exists()


def checkpoint_writer(stage_dir: Path, step: int, *, meta: dict, expected: int | None = None) -> FolderWriter:
    """The writer of `checkpoint-<step>`; `meta` gains the step."""
    final = Path(stage_dir) / f"checkpoint-{step}"
    return FolderWriter(final, kind=KIND, meta={**meta, "step": step}, expected=expected)


@contextmanager
def hold_checkpoint(path: Path) -> Iterator[None]:
    """While open, `prune` of any process leaves this checkpoint: it is being read.

    The operating system drops the hold when the reader dies. Without file locks (Windows, some network disks) nothing
    happens.
    """
    held = _lock(path, shared=True)
    try:
        yield
    finally:
        if held is not None and held >= 0:
            os.close(held)


def _lock(path: Path, *, shared: bool) -> int | None:
    """A descriptor that locks the checkpoint's manifest; None when another holds it; −1 where there are no locks."""
    if fcntl is None:
        return -1
    try:
        fd = os.open(Path(path) / MANIFEST, os.O_RDONLY)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        return -1
    return fd


def verify_checkpoint(path: Path, *, sizes_only: bool = False) -> CheckpointRef:
    """Check one checkpoint folder against its manifest.

    Raises:
        DamagedFolder: Naming the file and how.
    """
    manifest = verify_folder(path, sizes_only=sizes_only)
    if not _is_checkpoint(manifest):
        raise DamagedFolder(
            f"a {manifest.kind} folder, not a checkpoint",
            where=str(path),
            remedy="name a checkpoint-N folder of a stage",
        )
    return CheckpointRef(Path(path), manifest)


def list_checkpoints(stage_dir: Path, *, run_id: str | None = None) -> list[CheckpointRef]:
    """Checkpoints with a sound manifest and files of the right sizes, by step, oldest first.

    Contents are not hashed here: `newest_valid` and `verify_checkpoint` do that.

    Args:
        stage_dir: The stage's folder.
        run_id: Leave out those of other runs.
    """
    return _scan(stage_dir, run_id)[0]


def newest_valid(
    stage_dir: Path, *, run_id: str | None = None, sizes_only: bool = False
) -> tuple[CheckpointRef | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each folder that should have been one and is not.

    Every file of the one returned has been hashed (unless `sizes_only`). None with problems means: checkpoints were
    there and all are damaged; the caller must not start afresh in silence.
    """
    refs, problems = _scan(stage_dir, run_id)
    chosen: CheckpointRef | None = None
    for ref in reversed(refs):
        try:
            chosen = verify_checkpoint(ref.path, sizes_only=sizes_only)
            break
        except DamagedFolder as exc:
            problems.append((ref.step, f"{ref.path.name}: {exc.message}"))
    used = f"{chosen.path.name} is used instead" if chosen else "no earlier checkpoint is whole"
    ordered = sorted(problems, key=lambda p: -p[0])
    lines = [
        f"{text}; {used}" if chosen is None or step > chosen.step else f"{text}; ignored" for step, text in ordered
    ]
    return chosen, lines


def prune(
    stage_dir: Path, keep: int, protect: set[int], *, run_id: str | None = None, known_good: int | None = None
) -> list[int]:
    """Delete checkpoints beyond the newest `keep`, by the manifests' steps only. Returns the steps deleted.

    Never deleted: the newest whole one and all after it, pinned ones, steps in `protect` (the best), those that any
    process reads at the moment (`hold_checkpoint`), other runs' and anything that is not a sound checkpoint.

    Args:
        stage_dir: The stage's folder.
        keep: How many to keep; 0 = all.
        protect: Steps that must stay.
        run_id: Whose checkpoints these are; those of other runs are left alone.
        known_good: A step that this process has just sealed, so that it need not be hashed again.
    """
    refs = list_checkpoints(stage_dir, run_id=run_id)
    good = len(refs) - 1
    while good >= 0 and not _is_whole(refs[good], known_good):
        good -= 1
    if keep <= 0 or good < 0:
        return []
    deleted = []
    for ref in refs[: max(0, good + 1 - keep)]:
        if ref.step in protect or ref.pinned or ref.step == refs[good].step:
            continue
        if delete_checkpoint(ref):
            deleted.append(ref.step)
    return deleted


def delete_checkpoint(ref: CheckpointRef) -> bool:
    """Delete one checkpoint unless it is being read; it loses its name first: a crash leaves all of it or none.

    Raises:
        ResourceError: The folder cannot be written.
    """
    held = _lock(ref.path, shared=False)
    if held is None:
        return False
    doomed = temporary_name(ref.path)
    try:
        fault_point("prune.rename")
        ref.path.rename(doomed)
        fault_point("prune.remove")
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError as exc:
        raise disk_error(exc, ref.path, doing=f"remove {ref.path.name}") from exc
    finally:
        if held >= 0:
            os.close(held)
    return True


def _is_whole(ref: CheckpointRef, known_good: int | None) -> bool:
    try:
        verify_checkpoint(ref.path, sizes_only=ref.step == known_good)
    except DamagedFolder:
        return False
    return True


def _is_checkpoint(manifest: Manifest) -> bool:
    step = manifest.meta.get("step")
    return manifest.kind == KIND and isinstance(step, int) and not isinstance(step, bool) and step >= 0


def _scan(stage_dir: Path, run_id: str | None) -> tuple[list[CheckpointRef], list[tuple[int, str]]]:
    """Sound checkpoints by step, and (step by name, problem) of folders that look like one."""
    refs: list[CheckpointRef] = []
    problems: list[tuple[int, str]] = []
    folders = sorted(Path(stage_dir).iterdir()) if Path(stage_dir).is_dir() else []
    for folder in folders:
        if folder.name.startswith(".") or folder.is_symlink() or not folder.is_dir():
            continue
        named = _NAME.fullmatch(folder.name)
        try:
            manifest = verify_folder(folder, sizes_only=True)
        except DamagedFolder as exc:
            if named:
                problems.append((int(named[1]), f"{folder.name}: {exc.message}"))
            continue
        if not _is_checkpoint(manifest):
            continue
        ref = CheckpointRef(folder, manifest)
        if run_id is not None and ref.run_id != run_id:
            problems.append((ref.step, f"{folder.name}: made by another run ({ref.run_id})"))
            continue
        refs.append(ref)
    return sorted(refs, key=lambda r: (r.step, r.path.name)), problems
