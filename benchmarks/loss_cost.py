"""What a step of each preference loss costs against plain DPO, and what the losses of whole distributions hold in memory.

    python benchmarks/loss_cost.py --json

One process holds one model and one step of HH rows; each round takes the gradient of every loss once, DPO before and after, so
that a slow minute of the machine meets all of them. The ratios are medians over rounds. Every loss gets the same 8 pairs, KTO 8
answers with their partners; stored reference log-probs are ready, a live reference runs within the step. Memory: one process a
loss, its peak above that of the loaded models. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from train_step import describe_machine, note, start_worker
from workload import Pair, Plan, Shape, find_data, load_workload, save_workload

PAIRS = 8
SEVERAL = 4  # micro-batches of a step, where there is more than one
BASELINE = "dpo sigmoid"
CONTROLLERS: dict[str, dict[str, Any]] = {
    "risk": {"type": "risk", "warmup": 0},
    "risk, units of 4 pairs": {"type": "risk", "warmup": 0, "unit": {"pairs": 4}},
    "beta_dpo": {"type": "beta_dpo"},
    "linear": {"type": "linear", "beta_end": 0.2, "steps": 100},
}
WHOLE = ("tdpo1", "tdpo2", "radpo1", "radpo2", "epsilon")
DISTILL = "distill (chosen answers)"


@dataclass(frozen=True)
class Variant:
    """A method with settings.

    Attributes:
        group: "uncoupled", "coupled" (the loss needs the whole step), "whole" (it reads whole distributions of a live model).
        live: The reference runs in the step.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    group: str = "uncoupled"
    live: bool = False


def list_variants() -> list[Variant]:
    """Every loss of the registry, controllers, and DPO with a live reference."""
    from burnish.config.registry import LOSS_TYPES

    found = []
    for name, entry in LOSS_TYPES["dpo"].items():
        group = "whole" if name in WHOLE else "coupled" if entry.coupled else "uncoupled"
        if name != "sft":
            found.append(Variant(f"dpo {name}", "dpo", {"loss_type": name}, group, live=name in WHOLE))
    found += [
        Variant("dpo sigmoid + sft (RPO)", "dpo", {"loss_type": ["sigmoid", "sft"]}),
        Variant("dpo sigmoid, ld_alpha", "dpo", {"ld_alpha": 0.5}),
        Variant("dpo sigmoid, use_weighting (WPO)", "dpo", {"use_weighting": True}),
        Variant("dpo sigmoid, js_divergence", "dpo", {"f_divergence_type": "js_divergence"}),
        Variant("dpo sigmoid, live reference", "dpo", {}, "whole", live=True),
        Variant("cpo", "cpo", {}),
        Variant("simpo", "simpo", {}),
        Variant("orpo", "orpo", {}),
        Variant("kto", "kto", {}, "coupled"),
    ]
    for name, settings in CONTROLLERS.items():
        coupled = "unit" in settings or settings["type"] == "beta_dpo"
        found.append(
            Variant(f"dpo sigmoid, {name}", "dpo", {"dynamic_beta": settings}, "coupled" if coupled else "uncoupled")
        )
    return found


def build_step(
    variant: Variant, plan: Plan, pairs: Sequence[Pair], model: Any, reference: Any
) -> Callable[[int], None]:
    """A function from a token budget to one gradient of this loss on the pairs."""
    from side_burnish import build_groups

    from burnish.config.registry import KINDS, load_object
    from burnish.engine.context import StepContext
    from burnish.engine.method import arrange_groups, build_initial_state
    from burnish.engine.parallel.choose import build_parallel
    from burnish.engine.plan import build_plan
    from burnish.engine.runtime import build_runtime
    from burnish.engine.step import compute_gradient
    from burnish.models.reference import attach_table

    settings = load_object(KINDS[variant.kind].settings)(model="m", data="d", batch_size=PAIRS, **variant.settings)
    method = load_object(KINDS[variant.kind].runner)(settings)
    rows = "sft" if variant.kind == "distill" else variant.kind
    groups = list(arrange_groups(method, build_groups(replace(plan, method=rows), pairs)))
    if "logprobs" in method.reference and not variant.live:  # any numbers: only the cost matters
        stored = [[np.full(len(c.ids), -6.0, dtype=np.float32) for c in g.completions] for g in groups]
        groups = attach_table(groups, stored)
    context = StepContext(
        models={"policy": model},
        method=method,
        parallel=build_parallel(build_runtime()),
        parameters=[p for p in model.parameters() if p.requires_grad],
        seed=0,
        reference=reference if variant.live else None,
    )
    state = build_initial_state(method)

    def take(budget: int) -> None:
        found = compute_gradient(context, groups, build_plan(groups, budget=budget, coupled=method.coupled), state, 0)
        assert not found.bad, found.bad

    return take


def load_models(folder: Path) -> tuple[Plan, list[Pair], Any, Any]:
    """(plan, pairs, policy, reference) of the workload."""
    from side_burnish import build_side

    from burnish.models.policy import Policy
    from burnish.models.reference import Reference

    plan, pairs = load_workload(folder)
    _, _, built, policy = build_side(plan, folder / "model")
    frozen = copy.deepcopy(built.model).requires_grad_(False)
    return plan, pairs, policy, Reference(Policy(frozen, head="lm", compute_dtype=policy.compute_dtype), "copy")


def run_times(folder: Path, rounds: int, only: str = "") -> dict[str, Any]:
    """Name → figures of every variant whose name holds `only`, for a step of one micro-batch and of several."""
    from side_burnish import build_groups

    plan, pairs, policy, reference = load_models(folder)
    variants = [v for v in list_variants() if v.name == BASELINE or only in v.name]
    steps = {v.name: build_step(v, plan, pairs, policy, reference) for v in variants}
    tokens = sum(g.tokens for g in build_groups(plan, pairs))
    budgets = {"one": 1 << 20, "several": max(-(-tokens // SEVERAL), max(p.longest for p in pairs) + 300)}
    found: dict[str, Any] = {v.name: {"group": v.group} for v in variants}
    for case, budget in budgets.items():
        ratios: dict[str, list[tuple[float, float]]] = {v.name: [] for v in variants}
        for step in steps.values():
            step(budget)
        for number in range(rounds):
            before = measure_once(steps[BASELINE], budget)
            taken = {v.name: measure_once(steps[v.name], budget) for v in variants if v.name != BASELINE}
            after = measure_once(steps[BASELINE], budget)
            base = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
            for name, times in taken.items():
                ratios[name].append((times[0] / base[0], times[1] / base[1]))
            ratios[BASELINE].append((after[0] / before[0], after[1] / before[1]))
            note(f"{case} micro-batch{'es' if case == 'several' else ''}: round {number + 1} of {rounds}")
        for name, pair in ratios.items():
            wall, cpu = zip(*pair, strict=True)
            found[name][case] = {
                "time": round(statistics.median(wall), 3),
                "processor": round(statistics.median(cpu), 3),
                "spread": [round(min(wall), 3), round(max(wall), 3)],
            }
    return {"variants": found, "tokens": tokens, "budgets": budgets}


def measure_once(step: Callable[[int], None], budget: int) -> tuple[float, float]:
    """(seconds, seconds of processor time) of one gradient."""
    start, used = time.perf_counter(), time.process_time()
    step(budget)
    return time.perf_counter() - start, time.process_time() - used


def run_memory(folder: Path, name: str) -> dict[str, float]:
    """Peak memory of a few steps of one variant, MB above the loaded models."""
    plan, pairs, policy, reference = load_models(folder)
    distill = Variant(DISTILL, "distill", {"teacher": "t", "loss_type": "jsd"}, "whole", live=True)
    variant = next(v for v in [*list_variants(), distill] if v.name == name)
    scale = 1024.0 if sys.platform != "darwin" else 1024.0**2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    step = build_step(variant, plan, pairs, policy, reference)
    for _ in range(2):
        step(1 << 20)
    return {"above_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale - before}


def build_section(found: dict[str, Any]) -> str:
    """The tables of a measurement, as text for the page."""
    groups = {
        "uncoupled": "A sum over pairs",
        "coupled": "Coupled: the loss needs the whole step",
        "whole": "A reference that runs in the step; whole distributions",
    }
    lines = [
        f"{found['cpu']}; burnish {found['commit']}. Steps of {PAIRS} pairs, {found['tokens']:,} tokens, "
        f"{found['layers']} layers; "
        f"medians of {found['rounds']} rounds; in brackets the extremes.",
        "",
    ]
    for group, title in groups.items():
        lines += [f"| {title} | one micro-batch | several micro-batches |", "|---|---|---|"]
        for name, row in found["variants"].items():
            if row["group"] == group and name != BASELINE:
                cells = [
                    f"{row[c]['time']:.2f} ({row[c]['spread'][0]:.2f}–{row[c]['spread'][1]:.2f})"
                    for c in ("one", "several")
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    same = found["variants"][BASELINE]
    lines += [
        f"DPO against itself, the second time in a round by the first: {same['one']['time']:.2f} and "
        f"{same['several']['time']:.2f} ({same['several']['spread'][0]:.2f}–{same['several']['spread'][1]:.2f}).",
        "",
        f"Peak memory above the loaded models in one micro-batch; logits of all {found['scored']:,} scored tokens would be "
        f"{found['logits_mb']:,.0f} MB a model in fp32:",
        "",
        "| loss | MB |",
        "|---|---|",
        *(f"| {name} | {mb:,.0f} |" for name, mb in found["memory_mb"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", help="HH rows (chosen/rejected), .jsonl or .jsonl.gz")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default="", help="measure the times of losses whose name holds this, and no memory")
    parser.add_argument("--json", action="store_true", help="accepted for clarity: the last line always is JSON")
    for hidden in ("--worker", "--folder", "--out", "--name"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker == "prepare":
        plan = Plan(method="dpo", batch_size=PAIRS, shape=Shape(layers=given.layers))
        found: Any = save_workload(Path(given.folder), plan, find_data(given.data), PAIRS, 1024)
    elif given.worker == "memory":
        found = run_memory(Path(given.folder), given.name)
    if given.worker:
        Path(given.out).write_text(json.dumps(found), encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory(prefix="burnish-cost-") as name:
        folder, out = Path(name), Path(name) / "out.json"
        words = ["--folder", name, "--out", str(out), "--layers", str(given.layers)]
        data = ["--data", given.data] if given.data else []
        start_worker(Path(__file__), ["--worker", "prepare", *words, *data])
        memory: dict[str, float] = {}
        for variant in (
            () if given.only else (BASELINE, "dpo sigmoid, live reference", *(f"dpo {n}" for n in WHOLE), DISTILL)
        ):
            start_worker(Path(__file__), ["--worker", "memory", "--name", variant, *words])
            memory[variant] = round(json.loads(out.read_text(encoding="utf-8"))["above_mb"], 1)
            note(f"{variant}: {memory[variant]:.0f} MB above the models")
        _, pairs = load_workload(folder)
        scored = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
        facts = {
            "layers": given.layers,
            "rounds": given.rounds,
            "scored": scored,
            "logits_mb": round(scored * Shape().vocabulary * 4 / 2**20, 1),
            "memory_mb": memory,
        }
        print(json.dumps(run_times(folder, given.rounds, given.only) | facts | describe_machine()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
