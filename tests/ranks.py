"""Runs a function on several ranks: one cold start, then a fork for each rank.

`run_ranks("tests.engine.parallel.cases:check", 2, {...})` calls `check(runtime, argument)` on every rank of a gloo group and returns
what each gave, in rank order (JSON values).
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 540  # seconds: a hang fails the test, it does not hang the suite


def run_ranks(function: str, world: int, argument: Any = None) -> list[Any]:
    """What each rank's call gave.

    Raises:
        AssertionError: A rank failed; with its traceback.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "tests.ranks", function, str(world), json.dumps(argument), folder]
        done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(world)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run_rank(function: Any, argument: Any, out: Path) -> int:
    from burnish.engine.runtime import build_runtime

    try:
        runtime = build_runtime()
        found = function(runtime, argument)
        out.write_text(json.dumps(found))
        runtime.close()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def main() -> int:
    spec, world, argument, folder = sys.argv[1:]
    module, _, name = spec.partition(":")
    import torch

    torch.set_num_threads(1)
    function = getattr(importlib.import_module(module), name)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": world}
    children = []
    for rank in range(int(world)):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            status = _run_rank(function, json.loads(argument), Path(folder) / str(rank))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in children)


if __name__ == "__main__":
    sys.exit(main())
