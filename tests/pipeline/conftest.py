"""Inputs that the pipeline's tests share: a tiny model and a few rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.tiny_folder import build_model_folder, write_rows


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, chat.jsonl and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    build_model_folder(folder / "model")
    write_rows(folder / "chat.jsonl", "pocket/chat", 24)
    write_rows(folder / "pairs.jsonl", "pocket/preferences", 24)
    return folder
