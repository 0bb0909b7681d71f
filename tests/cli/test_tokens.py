"""Tokens from .env reach the libraries that need them, and no file."""

from __future__ import annotations

import os

import pytest

from burnish.cli.tokens import export_tokens


def test_s1_16_tokens_come_from_dotenv_and_are_optional(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """S1-16: HUGGINGFACE_TOKEN serves as HF_TOKEN; what the environment has wins; without a file nothing happens."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    export_tokens()
    assert "HF_TOKEN" not in os.environ
    (tmp_path / ".env").write_text("HUGGINGFACE_TOKEN=first\nWANDB_API_KEY=second\nOTHER=third\n")
    monkeypatch.setenv("WANDB_API_KEY", "mine")
    export_tokens()
    assert (os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]) == ("first", "mine")
    assert "OTHER" not in os.environ
    assert sorted(p.name for p in tmp_path.iterdir()) == [".env"]
