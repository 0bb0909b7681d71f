"""bitsandbytes: the only file that imports it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from burnish.errors import ConfigError


def build_adamw_8bit(groups: list[dict], *, betas: tuple[float, float], eps: float) -> Any:
    """AdamW with 8-bit moments (Dettmers et al., arXiv 2110.02861); CUDA only.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        bitsandbytes = import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(
            "optim: adamw_8bit needs bitsandbytes",
            where="optim",
            remedy="pip install 'burnish[quant]', or use adafactor",
        ) from error
    return bitsandbytes.optim.AdamW8bit(groups, betas=betas, eps=eps)
