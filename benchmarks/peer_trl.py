"""The other side of the benchmark: TRL's trainers, used as its users do, on the same rows, model and settings."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workload import LORA_ALPHA, LORA_RANK, TOP_K, Pair, Plan

for _key, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}.items():
    os.environ.setdefault(_key, _value)


def build_rows(method: str, pairs: Sequence[Pair]) -> list[dict[str, str]]:
    """Rows of text in the columns that TRL's trainer of this method takes."""
    if method == "sft":
        return [{"prompt": p.prompt, "completion": p.chosen} for p in pairs]
    if method == "kto":
        return [{"prompt": p.prompt, "completion": p.answer, "label": p.is_good} for p in pairs]
    return [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]


def check_ids(method: str, prepared: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> None:
    """Raise unless TRL's own preparation gave exactly the ids of `pairs`, in their order."""
    assert len(prepared) == len(pairs), f"TRL kept {len(prepared)} of {len(pairs)} rows"
    for row, pair in zip(prepared, pairs, strict=True):
        if method in ("kto", "orpo"):  # their prepared columns have other names; texts and tokenizer are the same
            continue
        if method == "dpo":
            found = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
            wanted = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
        elif method == "reward":
            found = row["chosen_ids"], row["rejected_ids"]
            wanted = pair.prompt_ids + pair.chosen_ids, pair.prompt_ids + pair.rejected_ids
        else:
            labels = [-100] * len(pair.prompt_ids) + pair.chosen_ids
            found = row["input_ids"], row["labels"]
            wanted = pair.prompt_ids + pair.chosen_ids, labels
        if tuple(map(list, found)) != tuple(wanted):
            raise AssertionError(f"{pair.id}: TRL's token ids differ from the other side's")


def build_arguments(plan: Plan, mode: str, folder: Path) -> dict[str, Any]:
    """Trainer arguments: what the comparison fixes; the rest at TRL's defaults, or at its best.

    Args:
        mode: "defaults"; "tuned": no gradient checkpointing, the reference's log-probs computed ahead, on a CUDA device flash
            attention where it is installed, and then rows without padding where the trainer has that; "accumulated": tuned,
            with a quarter of the rows at a time.
    """
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": plan.batch_size,
        "num_train_epochs": 1,
        "learning_rate": plan.learning_rate,
        "max_grad_norm": plan.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "use_cpu": plan.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": plan.seed,
        "bf16": plan.precision == "bf16",
    }
    if plan.method in ("dpo", "kto", "orpo"):
        arguments["beta"] = plan.beta
    if plan.method == "orpo":
        arguments["max_length"] = 1024
    if mode == "accumulated":
        arguments["per_device_train_batch_size"] = max(plan.batch_size // 4, 1)
        arguments["gradient_accumulation_steps"] = plan.batch_size // arguments["per_device_train_batch_size"]
    if mode != "defaults":
        arguments["gradient_checkpointing"] = False
        if plan.method in ("dpo", "kto"):
            arguments["precompute_ref_log_probs"] = True
        if plan.device == "cuda" and find_spec("flash_attn") is not None:
            arguments["model_init_kwargs"] = {"attn_implementation": "flash_attention_2"}
            if plan.method in ("sft", "dpo"):
                arguments["padding_free"] = True
    return arguments


def _watch(trainer: Any) -> list[float]:
    """The list to which `trainer` will append the loss of each step."""
    losses: list[float] = []
    compute_loss = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = watched
    return losses


def _build_lora(plan: Plan) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="SEQ_CLS" if plan.method == "reward" else "CAUSAL_LM",
        modules_to_save=["score"] if plan.method == "reward" else None,
    )


def freeze_all_but_top(model: Any, layers: int) -> None:
    """Leave the last TOP_K blocks, the final norm and the head trainable, as `top_k` does on the other side."""
    last = tuple(f"model.layers.{i}." for i in range(layers - TOP_K, layers))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith((*last, "model.norm.", "lm_head.", "score.")))


def _build_trainer(plan: Plan, mode: str, folder: Path, data: Any, tokenizer: Any, seconds: dict[str, float]) -> Any:
    trl: Any = import_module("trl")
    arguments, path = build_arguments(plan, mode, folder), str(folder / "model")
    common: dict[str, Any] = {"train_dataset": data, "processing_class": tokenizer}
    if plan.setting == "lora":
        common["peft_config"] = _build_lora(plan)
    if plan.method == "dpo":

        class TimedDpo(trl.DPOTrainer):
            def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
                start, start_cpu = time.perf_counter(), time.process_time()
                found = super()._precompute_ref_logps(*args, **kwargs)
                seconds["reference"] = time.perf_counter() - start
                seconds["reference_cpu"] = time.process_time() - start_cpu
                return found

        # The path, not an object: the reference then is the same checkpoint.
        return TimedDpo(path, args=trl.DPOConfig(**arguments), **common)
    if plan.method == "kto":
        return trl.KTOTrainer(path, args=trl.KTOConfig(**arguments), **common)
    if plan.method == "orpo":
        orpo: Any = import_module("trl.experimental.orpo")
        return orpo.ORPOTrainer(path, args=orpo.ORPOConfig(**arguments), **common)
    if plan.method == "reward":
        return trl.RewardTrainer(path, args=trl.RewardConfig(**arguments), **common)
    return trl.SFTTrainer(path, args=trl.SFTConfig(**arguments), **common)


def run_trl(plan: Plan, pairs: Sequence[Pair], folder: Path, mode: str) -> dict[str, Any]:
    """Train once over `pairs` in their order.

    Returns:
        `losses`, one a step; `seconds`, all of the time between the end of the warm-up steps and the end of the last
        step, plus the timed rows' share of the reference's log-probs if computed ahead; `cpu_seconds`, the processor time
        of the same stretch; `reference_seconds`.
    """
    os.environ["HF_DATASETS_CACHE"] = str(folder / f"cache-{os.getpid()}")  # log-probs are computed, never found
    import datasets
    from transformers import AutoTokenizer, TrainerCallback

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = datasets.Dataset.from_list(build_rows(plan.method, pairs))
    seconds = {"reference": 0.0, "reference_cpu": 0.0}
    trainer = _build_trainer(plan, mode, folder, data, tokenizer, seconds)
    check_ids(plan.method, list(trainer.train_dataset), pairs)
    if plan.setting == "top_k":
        freeze_all_but_top(trainer.model, plan.shape.layers)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    losses, ends, cpu = _watch(trainer), [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())
            cpu.append(time.process_time())

    trainer.add_callback(Clock())
    trainer.train()
    timed = 1.0 - plan.warmup_steps * plan.batch_size / len(pairs)
    first = plan.warmup_steps - 1
    return {
        "losses": losses if mode != "accumulated" else [],
        "trainable": trainable,
        "seconds": ends[-1] - ends[first] + seconds["reference"] * timed,
        "cpu_seconds": cpu[-1] - cpu[first] + seconds["reference_cpu"] * timed,
        "reference_seconds": seconds["reference"],
    }
