"""Named fault points for the tests: `BURNISH_FAULT=<point>:<nth>:<kill|enospc|eio|nan|hang|raise>`.

Inert unless `BURNISH_TESTING=1` is set as well. A point that is reached for the n-th time in a process fires once; `*`
stands for any part of a name (`folder.*:5:kill`: the fifth operation of the writer of folders).
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


def fault_point(name: str) -> bool:
    """Pass a named point. Returns True when the fault `nan` is due here; other faults act at once."""
    if not _ACTIVE:
        return False
    _SEEN[name] += 1
    point, nth, action = _SPEC.split(":")
    if not fnmatchcase(name, point):
        return False
    reached = sum(count for seen, count in _SEEN.items() if fnmatchcase(seen, point))
    if reached != int(nth):
        return False
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    if action == "eio":
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)
    if action == "hang":
        time.sleep(3600)
    if action == "raise":
        raise RuntimeError(f"fault injected at {name}")
    return action == "nan"
