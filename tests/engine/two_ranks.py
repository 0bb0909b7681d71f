"""Run by test_step in two processes: each method's gradient on two ranks against one rank; and one of them out of memory."""

from __future__ import annotations

import json
from typing import Any

import torch

from burnish import faults
from burnish.engine.runtime import Runtime, build_runtime
from burnish.errors import is_out_of_memory
from tests.engine.test_step import METHODS, run_step
from tests.engine.tiny import flatten

# Methods, and where the second rank runs out of memory; coupled ones in both passes.
MEMORY = [
    ("sft", "step.backward:1"),
    ("sigmoid", "step.forward:2"),
    ("dpo aot", "step.forward:1"),
    ("dpo aot", "step.backward:1"),
]


def run_out_of_memory(name: str, point: str, runtime: Runtime) -> dict[str, Any]:
    """What both ranks meet when the second one has no memory, and whether the step can be done again."""
    _, alone = run_step(name, 30)
    faults._SEEN.clear()
    faults._SPEC, faults._ACTIVE = f"{point}:oom@1", True
    try:
        run_step(name, 30, world=2, runtime=runtime)
        met = "nothing"
    except Exception as error:
        met = "memory" if is_out_of_memory(error) else repr(error)
    faults._SPEC, faults._ACTIVE = "", False
    _, gradient = run_step(name, 30, world=2, runtime=runtime)
    error = float((gradient - alone).norm() / alone.norm())
    return {"method": name, "point": point, "met": runtime.gather(met), "error": error}


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
    memory = [run_out_of_memory(name, point, runtime) for name, point in MEMORY]
    if runtime.rank == 0:
        print(json.dumps({"rows": rows, "memory": memory}))
    runtime.close()


if __name__ == "__main__":
    main()
