"""Metrics for Weights & Biases. Without an API key or a connection it records offline; training never waits for it."""

from __future__ import annotations

import contextlib
import hashlib
import netrc
import os
from collections.abc import Callable, Mapping
from typing import Any

from burnish.track.log import get_logger
from burnish.track.sinks import SinkContext, missing_library


class WandbSink:
    """One W&B run for a stage; a resumed stage goes on in the same one."""

    def __init__(self, context: SinkContext) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as exc:
            raise missing_library("wandb") from exc
        self._wandb = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if mode == "offline" and not has_key():
            get_logger().warning(
                "report_to: no WANDB_API_KEY is set; W&B records offline in %s/wandb (later: `wandb sync`)",
                context.folder,
            )
        try:
            self._run = self._start(context, mode)
        except Exception as exc:  # no connection, a wrong key, a server's error: none may stop training
            if mode != "online":
                raise
            get_logger().warning("W&B cannot be reached (%s); recording offline", context.redact(str(exc)))
            self._run = self._start(context, "offline")

    def _start(self, context: SinkContext, mode: str) -> Any:
        identity = hashlib.sha256(f"{context.run_id}/{context.stage}".encode()).hexdigest()[:16]
        return self._wandb.init(
            project=context.project,
            name=f"{context.run}/{context.stage}",
            group=context.run,
            id=identity,
            resume="allow",
            dir=str(context.folder),
            mode=mode,
            config=_mask(dict(context.settings), context.redact),
            settings=self._wandb.Settings(disable_git=True, save_code=False, console="off", init_timeout=30),
        )

    def write(self, row: Mapping[str, float], step: int) -> None:
        """The numbers of one step."""
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _mask(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {k: _mask(v, redact) for k, v in value.items()}
    return [_mask(v, redact) for v in value] if isinstance(value, (list, tuple)) else value


def has_key() -> bool:
    """Whether W&B could log in without asking: a key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError, TypeError):
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
        return "api.wandb.ai" in hosts
    return False
