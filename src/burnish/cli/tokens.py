"""Access tokens from `.env` for the libraries that ask the environment for them; no other variable is exported."""

from __future__ import annotations

import os
from pathlib import Path

from burnish.config.environment import SECRET_NAMES, read_dotenv


def export_tokens(path: Path = Path(".env")) -> None:
    """Put HF_TOKEN, HUGGINGFACE_TOKEN and WANDB_API_KEY into the environment where it lacks them."""
    found = read_dotenv(path)
    for name in SECRET_NAMES:
        if found.get(name):
            os.environ.setdefault(name, found[name])
    if os.environ.get("HUGGINGFACE_TOKEN"):
        os.environ.setdefault("HF_TOKEN", os.environ["HUGGINGFACE_TOKEN"])
