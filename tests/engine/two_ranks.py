"""Run by test_step in two processes: each method's gradient on two ranks against one rank."""

from __future__ import annotations

import json
import sys

import torch

from burnish.engine.runtime import build_runtime
from tests.engine.test_step import METHODS, run_step


def main() -> None:
    torch.set_num_threads(1)
    n = int(sys.argv[1])
    runtime = build_runtime()
    rows = []
    for name in METHODS:
        expected, alone = run_step(name, 10_000, n=n)
        for budget, cap in ((10_000, None), (30, None), (10_000, 1))[: 1 if n == 1 else 3]:
            found, gradient = run_step(name, budget, cap, n=n, world=2, runtime=runtime)
            ranks = runtime.gather((gradient, found.figures, found.state))
            rows.append(
                {
                    "method": name,
                    "budget": budget,
                    "error": float((gradient - alone).norm() / alone.norm()),
                    "figures": max(abs(found.figures[k] - v) for k, v in expected.figures.items()),
                    "equal_on_ranks": torch.equal(ranks[0][0], ranks[1][0]) and ranks[0][1:] == ranks[1][1:],
                }
            )
    if runtime.rank == 0:
        print(json.dumps({"rows": rows}))
    runtime.close()


if __name__ == "__main__":
    main()
