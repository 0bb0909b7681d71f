"""Equal bits on every run: what torch and cuBLAS have to be told, and what to say where an operation cannot do it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from burnish.errors import ConfigError

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_REFUSED = "does not have a deterministic implementation"


def prepare_cublas() -> None:
    """Give cuBLAS a workspace of its own for each stream, without which its products may differ from run to run.

    Called before CUDA starts: cuBLAS reads the variable once. A value that the user has set stays.
    """
    os.environ.setdefault(CUBLAS_VARIABLE, ":4096:8")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch choose operations that give equal bits each time, and refuse those that have no such form.

    Not merely warn: told to warn, the backward of flash and of memory-efficient attention keep their atomic additions.

    Raises:
        ConfigError: An operation has no deterministic form on this device; it is named.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # filling fresh memory costs time and helps only to find defects
    filling = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted)
    switches.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if _REFUSED not in str(error):
            raise
        operation = str(error).split(_REFUSED)[0].strip().splitlines()[-1]
        raise ConfigError(
            f"deterministic is on, and {operation} has no deterministic form on this device",
            where="deterministic",
            found=True,
            remedy="set deterministic: false (the same numbers up to rounding; a resumed run may differ in the last bits)",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = filling
