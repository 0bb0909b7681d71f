"""Single files: the old content or the new, never a part."""

from __future__ import annotations

import errno

import pytest

from burnish.artifacts import files
from burnish.artifacts.files import write_file
from burnish.errors import ResourceError


@pytest.mark.parametrize("fail_at", ["file.write", "file.fsync", "file.rename", "file.fsync_parent"])
@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(errno.ENOSPC, "full")])
def test_r04_single_files_are_atomic_too(tmp_path, monkeypatch, fail_at, error):
    path = tmp_path / "stage.json"
    write_file(path, b"old")

    def fault(name: str) -> bool:
        if name == fail_at:
            raise error
        return False

    monkeypatch.setattr(files, "fault_point", fault)
    with pytest.raises((RuntimeError, ResourceError)):
        write_file(path, "new")
    assert path.read_bytes() == (b"new" if fail_at == "file.fsync_parent" else b"old")
    assert [p.name for p in tmp_path.iterdir()] == ["stage.json"]
