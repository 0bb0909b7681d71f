"""Run by test_step in two processes: each method's gradient on two ranks against one rank."""

from __future__ import annotations

import json

import torch

from burnish.engine.runtime import build_runtime
from tests.engine.test_step import METHODS, run_step
from tests.engine.tiny import flatten


def main() -> None:
    torch.set_num_threads(1)
    runtime = build_runtime()
    rows = []
    for n, name in ((n, name) for n in (7, 1) for name in METHODS):
        expected, alone = run_step(name, 10_000, n=n)
        for budget, cap in ((10_000, None), (30, None), (10_000, 1))[: 1 if n == 1 else 3]:
            found, gradient = run_step(name, budget, cap, n=n, world=2, runtime=runtime)
            row = found.record.row if found.record else None
            ranks = runtime.gather((gradient, found.figures, found.state, row))
            one, two = (flatten([r.state, r.record.row if r.record else None]) for r in (expected, found))
            rows.append(
                {
                    "method": name,
                    "n": n,
                    "budget": budget,
                    "error": float((gradient - alone).norm() / alone.norm()),
                    "figures": max(abs(found.figures[k] - v) for k, v in expected.figures.items()),
                    "state": max([abs(two[k] - v) for k, v in one.items() if isinstance(v, float)], default=0.0)
                    if one.keys() == two.keys()
                    else 1.0,
                    "factor": ((found.state or {}).get("losses") or {}).get("epsilon", {}).get("factor"),
                    "equal_on_ranks": torch.equal(ranks[0][0], ranks[1][0]) and ranks[0][1:] == ranks[1][1:],
                }
            )
    if runtime.rank == 0:
        print(json.dumps({"rows": rows}))
    runtime.close()


if __name__ == "__main__":
    main()
