"""Fingerprints follow content, nothing else, and need no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from burnish.config.stages import SftSettings
from burnish.config.train import LoraSettings
from burnish.errors import ConfigError
from burnish.models import fingerprint
from burnish.models.export import export_model
from burnish.models.fingerprint import fingerprint_model
from burnish.models.load import build_model
from tests.models.small import build_tokenizer, edit_json, save_small


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("f") / "base", tokenizer=build_tokenizer())


def test_same_content_same_fingerprint(base: Path, tmp_path: Path) -> None:
    first = fingerprint_model(base)
    other = tmp_path / "elsewhere"
    shutil.copytree(base, other)
    os.utime(other / "model.safetensors", (0, 0))
    assert fingerprint_model(other) == first and len(first) == 64
    for name in ("generation_config.json", "README.md", "training_info.pt", "manifest.json"):
        (other / name).write_text("{}")
    assert fingerprint_model(other) == first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_any_change_of_content_shows(base: Path, tmp_path: Path, name: str) -> None:
    other = tmp_path / "m"
    shutil.copytree(base, other)
    first = fingerprint_model(other)
    raw = (other / name).read_bytes() if (other / name).exists() else b""
    (other / name).write_bytes(raw[:-1] + b"!")
    assert fingerprint_model(other) != first


def test_files_are_read_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint_model(base)

    def never(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", never)
    fingerprint_model(base)
    os.utime(base / "config.json")
    with pytest.raises(AssertionError, match="read again"):
        fingerprint_model(base)


def test_adapter_counts_its_base_by_content(base: Path, tmp_path: Path) -> None:
    built = build_model(SftSettings(lora=LoraSettings(r=2)), str(base), head="lm", seed=0)
    folder = tmp_path / "a"
    folder.mkdir()
    export_model(built, folder, tokenizer_source=base, head="lm", extra={})
    first = fingerprint_model(folder)
    shutil.copytree(base, tmp_path / "moved")
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "moved"))
    assert fingerprint_model(folder) == first
    save_small(tmp_path / "moved", seed=9, dtype=torch.float32)
    assert fingerprint_model(folder) != first


def test_nothing_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="no safetensors weights"):
            fingerprint_model(folder)


def test_without_torch(base: Path) -> None:
    code = (
        "import sys; from burnish.models.fingerprint import fingerprint_model; print(fingerprint_model(sys.argv[1]));"
        "from burnish.models.folder import inspect_model_folder; inspect_model_folder(sys.argv[1]);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(base)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fingerprint_model(base)
