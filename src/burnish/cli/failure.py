"""How a command that fails ends: what it says on stderr, and its exit status."""

from __future__ import annotations

import errno
import os
import sys
import traceback

import click

from burnish.errors import BurnishError, PeerLost, is_out_of_memory
from burnish.track.whereabouts import BEAT_VARIABLE, PEER_LOST


def report_failure(error: BaseException, *, verbose: bool = False) -> int:
    """Says on stderr what went wrong, and returns the exit status that belongs to it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, PeerLost) and BEAT_VARIABLE in os.environ:
        return PEER_LOST
    if isinstance(error, BurnishError):
        if verbose:
            _say("".join(traceback.format_exception(error)).rstrip())
        _say(f"error: {error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    if is_out_of_memory(error):
        if verbose:
            _say("".join(traceback.format_exception(error)).rstrip())
        detail = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        _say(
            f"error: out of memory: {detail}\n  → set micro_batch_tokens to less (the same gradient), or use a smaller model"
        )
        return 5
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(
            f"error: {error.filename or 'disk'}: no space left\n  → free some space and run the same command again",
            file=sys.stderr,
        )
        return 5
    _say("".join(traceback.format_exception(error)).rstrip())
    _say(f"error: {type(error).__name__}: {error}\n  → this is a fault in burnish; please report it with these lines")
    return 1


def _say(text: str) -> None:
    """To stderr, without the secrets that an error's text or a traceback may hold."""
    from burnish.artifacts.redact import redact

    print(redact(text), file=sys.stderr)
