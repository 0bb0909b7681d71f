"""Run folders made by hand, as real runs leave them, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from burnish.artifacts.run_folder import RunFolder, save_stage
from burnish.track.metrics import dump_row

TRAIN_ROWS = {"count": 0, "rows": []}


def split(read: int, kept: int, **named: tuple[int, list[str]]) -> dict[str, Any]:
    """A split's report, as `data.report.SplitReport` writes it."""
    out: dict[str, Any] = {
        "rows_read": read,
        "kept": kept,
        "groups": kept,
        "prompt_tokens": kept * 31,
        "completion_tokens": kept * 24,
        "scored_tokens": kept * 25,
        "sources": {"pocket/chat": kept},
        "unused": 0,
        "notes": [],
    }
    for key in ("malformed", "over_length", "cut", "identical", "made_equal", "leaked", "duplicates", "apart"):
        count, rows = named.get(key, (0, []))
        out[key] = {"count": count, "rows": rows}
    return out


def rows_of(kind: str, steps: int, rng: random.Random, *, every: int = 50, logged: int = 1) -> list[dict[str, Any]]:
    """Metrics of a stage that went well."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        t = step / steps
        rate = 2e-4 * min(1.0, step / (0.05 * steps)) * max(0.0, 1 - t)
        row: dict[str, Any] = {"step": step, "epoch": round(2 * t, 4), "kind": "train", "learning_rate": rate}
        row["grad_norm"] = 0.6 + 2.5 * math.exp(-12 * t) + abs(rng.gauss(0, 0.2))
        if kind == "sft":
            row["loss"] = 0.82 + 1.6 * math.exp(-6 * t) + rng.gauss(0, 0.07)
            row["mean_token_accuracy"] = 0.78 - 0.35 * math.exp(-6 * t) + rng.gauss(0, 0.015)
            row["entropy"] = 0.9 + 1.2 * math.exp(-5 * t) + rng.gauss(0, 0.05)
        elif kind == "reward":
            row["loss"] = 0.35 + 0.34 * math.exp(-5 * t) + rng.gauss(0, 0.06)
            row["accuracy"] = min(1.0, max(0.0, 0.86 - 0.36 * math.exp(-6 * t) + rng.gauss(0, 0.07)))
            row["scores/chosen"] = 1.3 * t + rng.gauss(0, 0.2)
            row["scores/rejected"] = -1.1 * t + rng.gauss(0, 0.2)
            row["margin"] = row["scores/chosen"] - row["scores/rejected"]
        else:
            margin = 1.9 * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.2)
            row["loss"] = math.log1p(math.exp(-margin))
            row["rewards/accuracies"] = min(1.0, max(0.0, 0.9 - 0.4 * math.exp(-4 * t) + rng.gauss(0, 0.06)))
            row["rewards/chosen"] = -0.25 * t + rng.gauss(0, 0.1)
            row["rewards/rejected"] = row["rewards/chosen"] - margin
            row["rewards/margins"] = margin
            row["logps/chosen"] = -38 - 3 * t + rng.gauss(0, 1)
            row["logps/rejected"] = -44 - 22 * t + rng.gauss(0, 1)
            row["rewards/ties"] = 0.0
        if step % logged == 0 or step == steps:
            rows.append(row)
        if step % every == 0 or step == steps:
            held: dict[str, Any] = {"step": step, "kind": "eval", "eval_loss": row["loss"] + 0.05 + 0.05 * t}
            if "rewards/accuracies" in row:
                held["eval_rewards/accuracies"] = row["rewards/accuracies"] - 0.04
                held["eval_rewards/margins"] = row["rewards/margins"] - 0.1
            if kind == "reward":
                held["eval_accuracy"] = row["accuracy"] - 0.03
            rows.append(held)
    return rows


def margins_of(steps: int, rng: random.Random, *, risk: bool = True) -> list[dict[str, Any]]:
    """Records of margins as a stage under the risk controller leaves them."""
    rows = []
    for step in range(1, steps + 1):
        t = step / steps
        middle, spread = 12 * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.8), 1 + 8 * t + rng.gauss(0, 0.5)
        row: dict[str, Any] = {"step": step, "epoch": round(2 * t, 4), "batch_size": 16, "mean": middle, "std": spread}
        row |= {f"p{p}": middle + z * spread for p, z in ((10, -1.28), (90, 1.28))}
        row |= {"min": middle - 1.8 * spread, "median": middle, "max": middle + 1.8 * spread, "sample": [middle]}
        row |= {"pos_frac": 0.9, "zero_frac": 1.0 if step == 1 else 0.0}
        row |= {"chosen_ratio": -2 * t + rng.gauss(0, 0.3), "rejected_ratio": -2 * t - middle, "beta_used": 0.1}
        row |= {"chosen_tokens": 16 + rng.gauss(0, 1), "rejected_tokens": 19 + rng.gauss(0, 1)}
        if risk:
            beta = 0.1 * math.exp(2 * math.sin(4 * t))
            row |= {"beta_used": beta, "beta_range": [beta, 1.02 * beta], "risk/tau": middle + 1.28 * spread, "held": 0}
            row |= {"risk/p_hat": max(0.0, 0.1 + rng.gauss(0, 0.06)), "controller": {"type": "risk", "beta": beta}}
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(map(dump_row, rows)))


def settings_of(kind: str, **changed: Any) -> dict[str, Any]:
    """A stage's settings as the pipeline stores them: all of them, defaults included."""
    from burnish.config.registry import KINDS, load_object

    defaults = load_object(KINDS[kind].settings)().model_dump(mode="json")
    return {**defaults, "kind": kind, "name": kind, **changed}


def add_training(run: RunFolder, index: int, kind: str, *, model: str | None = None, seed: int = 0, **kw: Any) -> Path:
    """One finished training stage."""
    rng = random.Random(seed + index)
    steps = kw.pop("steps", 300)
    folder = run.stage_dir(index, kind, model)
    rows = rows_of(kind, steps, rng, logged=kw.pop("logged", 1))
    data = {"sft": "pocket/chat", "reward": "pocket/preferences", "dpo": "pocket/preferences"}[kind]
    write_rows(folder / "metrics.jsonl", rows)
    if kind == "dpo":
        write_rows(folder / "margins.jsonl", margins_of(steps, rng))
    write_rows(
        folder / "timing.jsonl",
        [
            {"step": s, "seconds": round(rng.uniform(0.2, 0.3), 4), "tokens": rng.randint(800, 1200)}
            for s in range(1, steps)
        ],
    )
    record: dict[str, Any] = {
        "state": "done",
        "kind": kind,
        "name": kind,
        "key": "0" * 64,
        "inputs": {"model": "ab" * 32, "data": "cd" * 32},
        "settings": settings_of(
            kind,
            model="pocket",
            data=data,
            learning_rate=2e-4,
            batch_size=16,
            num_train_epochs=2.0,
            warmup_ratio=0.05,
            lora={"r": 16, "alpha": 32.0} if kind == "dpo" else None,
        ),
        "figures": {
            "steps": steps,
            "updates": steps,
            "seconds": 74.213,
            "tokens": 304_211,
            "train_loss": rows[-2]["loss"],
            "eval": {},
            "best_step": None,
            "stopped_early": False,
        },
        "data": {
            "splits": {
                "train": split(6000, 5991, over_length=(7, ["train:18", "train:401"]), malformed=(2, ["train:7"])),
                "held_out": split(400, 400),
            },
            "held_out_from": "the source's own test split",
            "notes": [],
        },
        "trainable": {"parameters": 1_415_616 if kind != "dpo" else 98_304, "of": 1_415_616},
        "precision": "fp32",
        "attention": "sdpa",
        "resumed_from": None,
        "seconds": 81.5,
    }
    save_stage(folder, {**record, **kw})
    return folder


def proportion(subject: str, task: str, metric: str, value: float, n: int = 400) -> dict[str, Any]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return {
        "subject": subject,
        "task": task,
        "metric": metric,
        "value": value,
        "low": value - half,
        "high": value + half,
        "n": n,
        "higher_is_better": True,
    }


def evaluation() -> dict[str, Any]:
    """Figures of an evaluation: something better, something worse, something unchanged."""
    table = [
        proportion("base", "pocket/maths", "accuracy", 0.1175),
        proportion("sft", "pocket/maths", "accuracy", 0.4125),
        proportion("dpo", "pocket/maths", "accuracy", 0.4050),
        proportion("base", "preferences", "accuracy", 0.5125),
        proportion("sft", "preferences", "accuracy", 0.6200),
        proportion("dpo", "preferences", "accuracy", 0.8475),
        proportion("reward", "preferences", "accuracy", 0.9025),
        *(
            {
                "subject": s,
                "task": "held-out text",
                "metric": "loss",
                "value": v,
                "low": v - 0.03,
                "high": v + 0.03,
                "n": 400,
                "higher_is_better": False,
            }
            for s, v in (("base", 2.431), ("sft", 0.914), ("dpo", 1.003))
        ),
        proportion("dpo", "pocket/chat", "win_rate", 0.6125, 200),
    ]
    comparisons = [
        {
            "task": "pocket/maths",
            "metric": "accuracy",
            "a": "base",
            "b": "sft",
            "difference": 0.295,
            "low": 0.241,
            "high": 0.344,
            "p_value": 3e-22,
            "test": "McNemar exact",
            "n": 400,
        },
        {
            "task": "pocket/maths",
            "metric": "accuracy",
            "a": "sft",
            "b": "dpo",
            "difference": -0.0075,
            "low": -0.0301,
            "high": 0.0151,
            "p_value": 0.6291,
            "test": "McNemar exact",
            "n": 400,
        },
        {
            "task": "preferences",
            "metric": "accuracy",
            "a": "sft",
            "b": "dpo",
            "difference": 0.2275,
            "low": 0.18,
            "high": 0.27,
            "p_value": 1e-15,
            "test": "mcnemar",
            "n": 400,
        },
        {
            "task": "preferences",
            "metric": "accuracy",
            "a": "base",
            "b": "sft",
            "difference": 0.1075,
            "low": 0.04,
            "high": 0.17,
            "p_value": 0.0021,
            "test": "mcnemar",
            "n": 400,
        },
        {
            "task": "held-out text",
            "metric": "loss",
            "a": "base",
            "b": "sft",
            "difference": -1.517,
            "low": -1.55,
            "high": -1.48,
            "p_value": 1e-30,
            "test": "paired bootstrap",
            "n": 400,
        },
        {
            "task": "held-out text",
            "metric": "loss",
            "a": "sft",
            "b": "dpo",
            "difference": 0.089,
            "low": 0.06,
            "high": 0.12,
            "p_value": 0.0004,
            "test": "paired bootstrap",
            "n": 400,
        },
    ]
    table.append(proportion("dpo", "win_rate", "vs_sft/win_rate", 0.7, 60))
    comparisons.append(
        {
            "task": "win_rate",
            "metric": "vs_sft/win_rate",
            "a": "sft",
            "b": "dpo",
            "difference": 0.2,
            "low": 0.08,
            "high": 0.3,
            "p_value": 0.003,
            "test": "sign",
            "n": 60,
        }
    )
    spread = {"mean": 0.2, "std": 0.6, "min": -1.4, "q1": -0.2, "median": 0.2, "q3": 0.8, "max": 1.3}
    report = {
        "pairs": 400,
        "accuracy": {"value": 0.9025, "low": 0.87, "high": 0.93},
        "log_loss": 0.31,
        "chosen": spread,
        "differences": {"positive": 360, "negative": 38, "zero": 2, "positive_ratio": 0.9},
        "rejected": spread,
        "difference": spread,
        "pearson": {"r": 0.1, "p_value": 0.3},
        "spearman": {"r": 0.11, "p_value": 0.2},
        "length_bias": {"r": 0.31, "p_value": 1e-6, "prefers_longer": 0.62, "pairs_of_unequal_length": 390},
        "by_source": {"harmless": {"accuracy": 0.9, "pairs": 200}, "helpful": {"accuracy": 0.91, "pairs": 200}},
    }
    notes = ["pocket/maths: 3 items have no final number in their reference, left out: a, b, c"]
    return {"table": table, "comparisons": comparisons, "reward_reports": {"reward": report}, "notes": notes}


SAMPLES = [
    {
        "task": "pocket/maths",
        "id": "test:12",
        "reference": "14",
        "prompt": "Mira has 5 baskets with 4 pears each. She gives 6 pears to Tom. How many pears are left?",
        "answers": {
            "base": "Mira has 5 baskets with 4 pears each. Mira has 5 baskets with 4 pears each. Mira has",
            "sft": "5 baskets with 4 pears each are 5 * 4 = 20 pears.\nShe gives away 6: 20 - 6 = 14.\n#### 14",
            "dpo": "5 * 4 = 20 pears. 20 - 6 = 14 pears.\n#### 14",
        },
        "marks": {"base": False, "sft": True, "dpo": True},
    },
    {
        "task": "pocket/maths",
        "id": "test:31",
        "reference": "9",
        "prompt": "A train has 3 wagons. Each wagon carries 7 people; 12 get off. How many people stay?",
        "answers": {"base": "", "sft": "3 * 7 = 21. 21 - 12 = 8.\n#### 8", "dpo": "3 * 7 = 21, 21 - 12 = 9.\n#### 9"},
        "marks": {"base": False, "sft": False, "dpo": True},
    },
    {
        "task": "pocket/chat",
        "id": "test:3",
        "reference": None,
        "prompt": [{"role": "user", "content": "Where does Elna live, and what is the town known for?"}],
        "answers": {
            "base": "Elna Elna Elna",
            "sft": "Elna lives in Tarn. It is known for its <b>bells</b> & bridges.",
            "dpo": "Elna lives in Tarn, a town known for its bells.",
        },
        "marks": {},
    },
]


def resolved_of(name: str, kinds: tuple[str, ...], **extra: Any) -> dict[str, Any]:
    return {
        "name": name,
        "model": "pocket",
        "seed": 7,
        **extra,
        "stages": [{"kind": k, "name": k, "learning_rate": 2e-4, "batch_size": 16} for k in kinds],
    }


def make_quickstart(root: Path, *, steps: int = 300) -> Path:
    """A run of the whole pipeline, finished."""
    resolved = resolved_of("quickstart", ("sft", "reward", "dpo", "evaluate"))
    with RunFolder.open(
        root,
        "quickstart",
        recipe_text="name: quickstart\nmodel: pocket\nseed: 7\n",
        resolved=resolved,
        command=["/usr/bin/burnish", "run", "quickstart", "seed=7"],
        environment={"threads": 2, "device": "cpu", "processes": 1},
    ) as run:
        for index, kind in enumerate(("sft", "reward", "dpo"), 1):
            add_training(run, index, kind, steps=steps)
        folder = run.stage_dir(4, "evaluate")
        save_stage(
            folder,
            {
                "state": "done",
                "kind": "evaluate",
                "name": "evaluate",
                "figures": evaluation(),
                "seconds": 41.0,
                "settings": settings_of("evaluate", tasks=["pocket/maths", "preferences", "loss", "win_rate"]),
            },
        )
        write_rows(folder / "samples.jsonl", SAMPLES)
        run.finish("done", seconds=312.4, exit_code=0)
        return run.path


def make_hostile(root: Path) -> Path:
    """A run in which every text that a user or a model can choose tries to break out of the page."""
    evil = """</script><script>alert(1)</script><img src=x onerror=alert(1)>"'&<style>*{display:none}</style>"""
    resolved = {**resolved_of("evil", ("sft",)), "note": evil, "seed": evil, "model": evil}
    with RunFolder.open(
        root,
        "evil",
        recipe_text=evil,
        resolved=resolved,
        command=["burnish", evil],
        environment={"device": evil, evil: evil},
    ) as run:
        folder = add_training(
            run,
            1,
            "sft",
            steps=20,
            error=evil,
            precision=evil,
            attention=evil,
            data={
                "splits": {evil: {**split(5, 4), "malformed": {"count": 1, "rows": [evil]}, "notes": [evil]}},
                "held_out_from": evil,
                "notes": [evil],
            },
        )
        rows = [{"step": s, "kind": "train", "loss": 1.0, evil: 2.0} for s in range(20)]
        write_rows(folder / "metrics.jsonl", rows)
        figures = {
            "table": [{"subject": evil, "task": evil, "metric": evil, "value": 0.5, "low": 0.4, "high": 0.6, "n": 3}]
            * 2,
            "comparisons": [
                {"task": evil, "metric": evil, "a": evil, "b": evil, "difference": 0.1, "p_value": 0.01, "test": evil}
            ],
        }
        other = run.stage_dir(2, "evaluate")
        save_stage(
            other, {"state": "done", "kind": "evaluate", "name": evil, "figures": figures, "settings": {evil: evil}}
        )
        sample = {
            "task": evil,
            "id": evil,
            "prompt": evil,
            "reference": evil,
            "answers": {evil: evil},
            "marks": {evil: evil},
        }
        write_rows(other / "samples.jsonl", [sample])
        run.finish("failed", seconds=1.0, exit_code=1, error=evil + "\n" + evil)
        return run.path


def make_several_models(root: Path) -> Path:
    """Two models through the same stages; the second one failed."""
    resolved = {**resolved_of("grid", ("sft", "evaluate")), "model": None, "models": ["pocket", "org/pocket-small"]}
    with RunFolder.open(
        root, "grid", recipe_text="", resolved=resolved, environment={"threads": 2, "device": "cpu"}
    ) as run:
        for model in ("pocket", "org/pocket-small"):
            add_training(run, 1, "sft", model=model, seed=len(model), steps=120)
        folder = run.stage_dir(2, "evaluate", "pocket")
        save_stage(folder, {"state": "done", "kind": "evaluate", "name": "evaluate", "figures": evaluation()})
        small = run.stage_dir(2, "evaluate", "org/pocket-small")
        save_stage(small, {"state": "done", "kind": "evaluate", "name": "evaluate", "figures": evaluation()})
        bad = run.stage_dir(3, "evaluate", "org/pocket-small")
        save_stage(bad, {"state": "failed", "kind": "evaluate", "name": "evaluate", "error": "the task has no rows"})
        run.finish("failed", seconds=99.0, exit_code=2, error="evaluate: the task has no rows\n  → name another task")
        return run.path


def make_troubled(root: Path) -> Path:
    """Interrupted, with a spike, skipped steps, non-finite values, overfitting and a torn last line."""
    with RunFolder.open(
        root, "troubled", recipe_text="", resolved=resolved_of("troubled", ("dpo",)), environment={"device": "cuda:0"}
    ) as run:
        folder = add_training(run, 1, "dpo", state="interrupted", figures={}, steps=200, resumed_from=50)
        rows = rows_of("dpo", 200, random.Random(1), every=20)
        held = [r for r in rows if r["kind"] == "eval"]
        for at, row in enumerate(held):
            row["eval_loss"] = 0.4 + 0.02 * (at - 3) ** 2
        train = [r for r in rows if r["kind"] == "train"]
        train[40]["loss"] = 180.0
        train[41]["loss"] = math.nan
        train[42]["grad_norm"] = math.inf
        rows.insert(60, {"step": 60, "kind": "skipped", "what": "loss", "rows": ["train:3"]})
        write_rows(folder / "metrics.jsonl", rows)
        with (folder / "metrics.jsonl").open("ab") as stream:
            stream.write(b'{"step": 201, "kind": "tr')
        run.update(
            state="interrupted", error="stopped by a signal after step 200\n  → give the same command again to go on"
        )
        return run.path


def make_all(root: Path) -> list[Path]:
    return [make_quickstart(root), make_hostile(root), make_several_models(root), make_troubled(root)]


if __name__ == "__main__":
    import sys

    from burnish.report.html import render_report

    for place in make_all(Path(sys.argv[1])):
        print(render_report(place), json.dumps(place.name))
