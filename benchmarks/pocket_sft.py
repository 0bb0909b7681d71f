"""Fine-tuning of the bundled model pocket on its own chat data: tokens a second of burnish and of TRL at its defaults.

    python benchmarks/pocket_sft.py --json

Here a step takes tens of milliseconds, so that the cost of each call counts, not only that of each product. Both sides get
the same token ids and masks (pocket/chat, the last turn scored) in the same order, 16 a step, at the same learning rate; all
else is each side's default. Every measurement is a fresh process, the sides in turn; the last line of standard output is
one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH_SIZE = 16
LEARNING_RATE = 1e-4
ASSETS = Path(__file__).resolve().parents[1] / "src" / "burnish" / "assets"
MODEL = ASSETS / "models" / "pocket"


def save_rows(path: Path, count: int) -> None:
    """The first `count` rows of pocket/chat with their last turn as the completion."""
    with gzip.open(ASSETS / "data" / "pocket" / "chat" / "train.jsonl.gz", "rt", encoding="utf-8") as source:
        rows = [json.loads(line)["messages"] for line, _ in zip(source, range(count))]
    text = "".join(json.dumps({"prompt": m[:-1], "completion": m[-1:]}) + "\n" for m in rows)
    path.write_text(text, encoding="utf-8")


def build_settings(rows: Path) -> Any:
    """burnish's settings: what the comparison fixes, the rest at its defaults."""
    from burnish.config.stages import SftSettings

    return SftSettings(
        model=str(MODEL), data=str(rows), batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, shuffle=False
    )


def save_ids(rows: Path, out: Path) -> None:
    """Token ids and labels of the rows, as TRL takes them (its own preparation would also score the line end)."""
    from burnish.pipeline.train_stage import load_inputs

    with out.open("w", encoding="utf-8") as file:
        for group in load_inputs(build_settings(rows), str(MODEL), str).data.train:
            prompt, completion = group.prompt.tolist(), group.completions[0]
            labels = [i if scored else -100 for i, scored in zip(completion.ids.tolist(), completion.mask, strict=True)]
            ids = prompt + completion.ids.tolist()
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * len(prompt) + labels}) + "\n")


class Clock:
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())


def run_burnish(rows: Path, clock: Clock) -> dict[str, Any]:
    """Train once over the rows; losses, token counts of the rows, precision."""
    from burnish.engine.job import TrainJob, build_source
    from burnish.engine.loop import run_training
    from burnish.engine.runtime import build_runtime
    from burnish.methods.sft import Sft
    from burnish.models.load import build_model
    from burnish.models.policy import Policy
    from burnish.models.precision import resolve_precision
    from burnish.pipeline.train_stage import load_inputs

    settings = build_settings(rows)
    inputs = load_inputs(settings, str(MODEL), str)
    runtime, method = build_runtime(), Sft(settings)
    hidden = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    precision = resolve_precision(settings.precision, runtime.device, hidden)
    built = build_model(settings, inputs.path, head="lm", seed=settings.seed, compute_dtype=precision.compute)
    policy = Policy(built.model, head="lm", compute_dtype=precision.compute)
    losses: list[float] = []

    def watch(step: int, figures: Any, seconds: float) -> None:
        losses.append(float(figures["loss"]))
        clock.tick()

    run_training(
        TrainJob(
            models={"policy": policy},
            method=method,
            settings=settings,
            source=build_source(settings, inputs.data.train, runtime.world, method),
            held_out=[],
            runtime=runtime,
            trainable=built.trainable,
            no_decay=built.no_decay,
            head=built.head_parameters,
            on_step=watch,
        )
    )
    tokens = [[g.tokens, sum(c.scored for c in g.completions)] for g in inputs.data.train]
    return {"losses": losses, "tokens": tokens, "precision": precision.name}


def run_trl(rows: Path, clock: Clock) -> dict[str, Any]:
    """The same by TRL's SFTTrainer."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    os.environ["HF_DATASETS_CACHE"] = str(rows.parent / f"cache-{os.getpid()}")
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    datasets.disable_progress_bars()
    lines = rows.with_name("ids.jsonl").read_text(encoding="utf-8").splitlines()
    data = datasets.Dataset.from_list([json.loads(line) for line in lines])
    config = SFTConfig(
        output_dir=str(rows.parent / "trl"),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    trainer = SFTTrainer(
        str(MODEL), args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(MODEL)
    )

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    trainer.add_callback(Watch())
    trainer.train()
    prepared: Any = trainer.train_dataset
    tokens = [[len(row["input_ids"]), sum(label != -100 for label in row["labels"])] for row in prepared]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"losses": losses, "tokens": tokens, "precision": "bf16" if config.bf16 else "fp32"}


def run_worker(side: str, rows: Path, warmup: int, out: Path) -> None:
    """One measurement in this process (or the token ids: "prepare"); figures go to `out`."""
    if side == "prepare":
        save_ids(rows, out)
        return
    import resource

    import torch

    clock = Clock()
    found = (run_burnish if side == "burnish" else run_trl)(rows, clock)
    seconds = clock.ends[-1] - clock.ends[warmup - 1]
    timed = sum(n for n, _ in found["tokens"][warmup * BATCH_SIZE :])
    cpu = clock.cpu[-1] - clock.cpu[warmup - 1]
    found |= {
        "seconds": seconds,
        "tokens_per_second": timed / seconds,
        "step_ms": 1e3 * seconds / (len(clock.ends) - warmup),
        "busy": cpu / seconds / torch.get_num_threads(),
        "cpu_seconds": cpu,
        "threads": torch.get_num_threads(),
        "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
    }
    out.write_text(json.dumps(found), encoding="utf-8")


def start(side: str, rows: Path, warmup: int, out: Path) -> None:
    """Run a worker in a fresh process."""
    words = ["--worker", side, "--rows-file", str(rows), "--out", str(out), "--warmup", str(warmup)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the worker ({side}) ended with status {done.returncode}\n{done.stderr[-4000:]}")


def measure(side: str, rows: Path, warmup: int) -> dict[str, Any]:
    """Figures of a fresh process."""
    out = rows.parent / "result.json"
    out.unlink(missing_ok=True)
    start(side, rows, warmup, out)
    found = json.loads(out.read_text(encoding="utf-8"))
    line = f"  {side}: {found['tokens_per_second']:.0f} tokens/s, {found['step_ms']:.1f} ms a step, busy {found['busy']:.2f}"
    print(line, file=sys.stderr, flush=True)
    return found


def compute_row(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The JSON object: medians, ratios burnish ÷ TRL in tokens a second, agreement of losses and counts of tokens."""
    row: dict[str, Any] = {"benchmark": "pocket_sft", "batch_size": BATCH_SIZE}
    for side, found in runs.items():
        for name in ("tokens_per_second", "step_ms", "cpu_seconds", "busy", "gb"):
            row[f"{side}_{name}"] = round(statistics.median(r[name] for r in found), 3)
        row[f"{side}_precision"], row["threads"] = found[0]["precision"], found[0]["threads"]
        row[f"{side}_runs"] = [round(r["tokens_per_second"]) for r in found]
    if "trl" in runs:
        ours, theirs = runs["burnish"][0], runs["trl"][0]
        row["ratio"] = round(row["burnish_tokens_per_second"] / row["trl_tokens_per_second"], 2)
        row["cpu_time_ratio"] = round(row["trl_cpu_seconds"] / row["burnish_cpu_seconds"], 2)
        row["equal_tokens"] = ours["tokens"] == theirs["tokens"]
        row["loss_max_abs_diff"] = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["trl", "none"], default="trl")
    parser.add_argument("--steps", type=int, default=40, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them")
    parser.add_argument("--alternations", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="accepted for clarity: the last line always is JSON")
    for hidden in ("--worker", "--rows-file", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        run_worker(given.worker, Path(given.rows_file), given.warmup, Path(given.out))
        return 0
    sides = ["burnish"] + (["trl"] if given.peer == "trl" else [])
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as name:
        rows = Path(name) / "rows.jsonl"
        save_rows(rows, BATCH_SIZE * (given.steps + given.warmup))
        start("prepare", rows, given.warmup, rows.with_name("ids.jsonl"))
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(given.alternations):
            for side in sides:
                runs[side].append(measure(side, rows, given.warmup))
    print(json.dumps(compute_row(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
