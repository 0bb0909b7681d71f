"""burnish post-trains language models: one recipe, every stage exact, nothing recomputed.

From Python: `burnish.run`, `burnish.train`, `burnish.load_record` (see `burnish.pipeline.api`). They load on first use.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_record", "run", "train"]

_LAZY = ("load_record", "run", "train")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module("burnish.pipeline.api"), name)
    raise AttributeError(f"module 'burnish' has no attribute {name!r}")
