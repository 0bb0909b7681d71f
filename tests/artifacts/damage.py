"""Ways in which a sealed folder may be damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

DAMAGES = ("truncate", "flip", "delete", "zero", "stray", "swap", "empty")


def damage(folder: Path, name: str, how: str, files: Iterable[str]) -> None:
    """Damage the file `name`; `swap` exchanges it with another one of `files`."""
    path = folder / name
    raw = path.read_bytes()
    if how == "truncate":
        path.write_bytes(raw[:-1])
    elif how == "flip":
        middle = len(raw) // 2
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    elif how == "delete":
        path.unlink()
    elif how == "zero":
        path.write_bytes(b"\0" * len(raw))
    elif how == "stray":
        path.with_name(path.name + ".bak").write_bytes(raw)
    elif how == "swap":
        other, spare = folder / next(n for n in files if n != name), folder / "spare"
        path.rename(spare), other.rename(path), spare.rename(other)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        raise ValueError(how)
