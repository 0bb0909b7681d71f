"""Named fault points for the tests: `BURNISH_FAULT=<point>:<nth>:<action>[@rank]`.

Actions: kill, stop (SIGSTOP), hang, raise, enospc, eio, oom, nan, inf. Inert unless `BURNISH_TESTING=1` is set as well.
A point that is reached for the n-th time in a process fires once, with `+` behind the number also each time after; with
`@rank` in that process of several only. `*` stands for any part of a name (`folder.*:5:kill`: the fifth operation of the
writer of folders).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections import Counter
from fnmatch import fnmatchcase

_SPEC = os.environ.get("BURNISH_FAULT", "")
_ACTIVE = bool(_SPEC) and os.environ.get("BURNISH_TESTING") == "1"
_SEEN: Counter[str] = Counter()

if _SPEC and not _ACTIVE:
    sys.stderr.write("burnish: BURNISH_FAULT is set outside the test suite and is ignored\n")


def fault_point(name: str) -> float | None:
    """Pass a named point. Returns the number that the faults `nan` and `inf` put there; other faults act at once."""
    if not _ACTIVE:
        return None
    _SEEN[name] += 1
    point, nth, action = _SPEC.split(":")
    action, _, rank = action.partition("@")
    if not fnmatchcase(name, point) or (rank and rank != os.environ.get("RANK", "0")):
        return None
    reached = sum(count for seen, count in _SEEN.items() if fnmatchcase(seen, point))
    if reached != int(nth.rstrip("+")) and not (nth.endswith("+") and reached > int(nth.rstrip("+"))):
        return None
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == "oom":  # a point that computes is only reached once torch is loaded
        raise sys.modules["torch"].OutOfMemoryError(f"injected at {name}: tried to allocate 7.00 GiB")
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    if action == "eio":
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)
    if action == "hang":
        time.sleep(3600)
    if action == "raise":
        raise RuntimeError(f"fault injected at {name}")
    return float(action) if action in ("nan", "inf") else None
