"""Shared fixtures: the real data where they are at hand, tiny models, tiny groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("BURNISH_TESTING", "1")

ROOT = Path(__file__).resolve().parent.parent


def find_shared() -> Path | None:
    """The folder with real data: BURNISH_SHARED, or `shared` beside the repository."""
    for candidate in (os.environ.get("BURNISH_SHARED"), ROOT.parent / "shared"):
        if candidate and (Path(candidate) / "data").is_dir():
            return Path(candidate)
    return None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data; the test is skipped where there is none."""
    found = find_shared()
    if found is None:
        pytest.skip("needs the real data: set BURNISH_SHARED to the folder that holds data/hh-harmless.jsonl.gz")
    return found


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a tokenised-data cache of its own."""
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path_factory.getbasetemp() / "burnish-cache"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny matrices: one thread is faster, and sums keep one order."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
