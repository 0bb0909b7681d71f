"""One file, written so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from burnish.artifacts.disk import fsync_folder
from burnish.disk import disk_error
from burnish.faults import fault_point

TEMPORARY = ".tmp-"


def dump_json(obj: Any) -> bytes:
    """Readable JSON as bytes, always the same for the same object; keys stay in the caller's order."""
    return (json.dumps(obj, ensure_ascii=False, indent=1, allow_nan=True) + "\n").encode("utf-8", "surrogatepass")


def temporary_name(final: Path) -> Path:
    """A fresh hidden name beside `final`."""
    return final.with_name(f"{TEMPORARY}{final.name[:60]}-{secrets.token_hex(4)}")


def write_file(path: Path, data: bytes | str) -> None:
    """Write one file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    temporary = temporary_name(path)
    try:
        fault_point("file.write")
        with temporary.open("xb") as stream:
            stream.write(raw)
            stream.flush()
            fault_point("file.fsync")
            os.fsync(stream.fileno())
        fault_point("file.rename")
        temporary.replace(path)
        fault_point("file.fsync_parent")
        fsync_folder(path.parent)
    except BaseException as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise disk_error(exc, path, doing=f"write {path.name}", needed=len(raw)) from exc
        raise


def write_json_file(path: Path, obj: Any) -> None:
    """`write_file` for JSON."""
    write_file(path, dump_json(obj))
