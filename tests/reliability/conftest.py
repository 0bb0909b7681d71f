"""A fork server, and inputs for whole recipes: a tiny model and a few rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forkserver import ForkServer
from tests.pipeline.tiny_folder import build_model_folder, write_rows


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Forks a child for each command; shared by the reliability checks."""
    found = ForkServer()
    yield found
    found.close()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, chat.jsonl and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("inputs")
    build_model_folder(folder / "model")
    write_rows(folder / "chat.jsonl", "pocket/chat", 24)
    write_rows(folder / "pairs.jsonl", "pocket/preferences", 24)
    return folder
