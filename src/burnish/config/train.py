"""Settings that all training stages share."""

from __future__ import annotations

from typing import Literal

from burnish.config.base import Settings, setting
from burnish.config.data import DataSettings
from burnish.config.distributed import DistributedSettings

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Attention = Literal["auto", "varlen", "flex", "sdpa", "padded"]
Optimizer = Literal["adamw", "adafactor", "adamw_8bit", "sgd"]
Quantize = Literal["none", "nf4", "fp4", "int8"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]


class LoraSettings(Settings):
    """Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

    r: int = setting(16, "Rank of the update.", ge=1)
    alpha: float = setting(32.0, "Scale: the update is alpha / r · BA (rsLoRA: alpha / √r).", gt=0)
    dropout: float = setting(0.0, "Dropout on the adapter's input.", ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = setting("none", "Which biases are trained.")
    use_rslora: bool = setting(False, "Rank-stabilised scale alpha / √r (arXiv 2312.03732).")
    use_dora: bool = setting(False, "Weight-decomposed adapters (DoRA, arXiv 2402.09353).")
    target_modules: list[str] | Literal["auto", "all-linear"] = setting(
        "auto", "Module names; auto = the attention projections of the architecture; all-linear = every linear layer."
    )


class TrainSettings(DataSettings):
    """A training stage: model, data, optimisation, evaluation, saving."""

    kind: str = setting(..., "What the stage does.")
    name: str | None = setting(None, "Name of the stage within the recipe; default: its kind.")
    init_from: str | None = setting(None, "Start from the result of this earlier stage instead of `model`.")
    model: str | None = setting(None, "Base model: bundled name, folder or hub id.")
    revision: str | None = setting(None, "Revision of a hub model.")
    trust_remote_code: bool = setting(False, "Allow code from the model's repository to run.")
    seed: int = setting(42, "Seed of data order, initialisation and dropout.", ge=0)

    lora: LoraSettings | None = setting(None, "Train low-rank adapters instead of the whole model.")
    quantize: Quantize = setting(
        "none", "Keep the frozen base in 4 bits (nf4, fp4) or 8 (int8) under `lora` (QLoRA, arXiv 2305.14314)."
    )
    bnb_4bit_use_double_quant: bool = setting(
        True, "4 bits: store the scales of the blocks in 8 bits (4.13 bits a weight instead of 4.5)."
    )
    top_k: int | None = setting(
        None, "Train only the last K blocks, the final norm and the head; 0 = everything.", ge=0
    )
    untie_embeddings: bool = setting(False, "Untie input embedding and head, so that `top_k` freezes the embedding.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in backward: less memory, more time.")
    attention: Attention = setting(
        "auto", "Attention backend: auto, varlen or flex (CUDA, packed), sdpa (packed), padded."
    )
    precision: Precision = setting(
        "auto", "Compute type; trainable weights keep fp32 masters. auto = what the device does fast."
    )
    deterministic: bool = setting(True, "Bit-equal reruns where the device allows; off may be faster on CUDA.")
    devices: list[int] | None = setting(None, "CUDA devices to use, e.g. [0, 1].")
    distributed: DistributedSettings = setting(DistributedSettings(), "How several processes share the stage.")

    learning_rate: float = setting(1e-5, "Peak learning rate.", gt=0)
    head_learning_rate: float | None = setting(None, "Own learning rate for a new head (reward score).", gt=0)
    optim: Optimizer = setting("adamw", "Optimizer: adamw (fused), adafactor (little memory), adamw_8bit (CUDA), sgd.")
    adam_beta1: float = setting(0.9, "AdamW's β1.", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "AdamW's β2.", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "AdamW's ε.", gt=0)
    weight_decay: float = setting(0.0, "Weight decay; never on norms and biases.", ge=0)
    max_grad_norm: float = setting(1.0, "Clip the gradient's norm at this; 0 = off.", ge=0)
    lr_scheduler_type: Schedule = setting("linear", "Learning-rate schedule after warm-up.")
    warmup_steps: int = setting(0, "Optimizer steps of linear warm-up.", ge=0)
    warmup_ratio: float = setting(0.0, "Warm-up as a share of all steps (if warmup_steps is 0).", ge=0, lt=1)
    decay_ratio: float = setting(0.2, "wsd: share of all steps in the final linear decay.", gt=0, le=1)
    min_lr_ratio: float = setting(0.0, "Learning rate at the end, as a share of the peak.", ge=0, le=1)

    num_train_epochs: float = setting(1.0, "Passes over the data.", gt=0)
    max_steps: int = setting(-1, "Stop after this many optimizer steps; -1 = by epochs.", ge=-1)
    batch_size: int | None = setting(None, "Examples per optimizer step over everything; default 8.", ge=1)
    per_device_train_batch_size: int | None = setting(None, "At most this many examples in one micro-batch.", ge=1)
    gradient_accumulation_steps: int | None = setting(
        None, "batch_size = per_device_train_batch_size × this × processes.", ge=1
    )
    micro_batch_tokens: int | Literal["auto"] = setting(
        "auto", "Tokens in one micro-batch at most; bounds memory. auto on a GPU: by its free memory."
    )
    shuffle: bool = setting(True, "Shuffle the data in each epoch.")

    eval_steps: int = setting(-1, "Evaluate every N steps; -1 = only at the end, 0 = at the end of each epoch.", ge=-1)
    eval_on_start: bool = setting(False, "Evaluate before the first step too.")
    save_steps: int = setting(
        -1, "Checkpoint every N steps; -1 = about four times a stage, 0 = at the end of each epoch.", ge=-1
    )
    save_total_limit: int = setting(2, "Checkpoints to keep (newest, best and pinned ones always stay); 0 = all.", ge=0)
    save_dtype: Literal["fp32", "source", "bf16"] = setting(
        "fp32",
        "Type of saved full weights: fp32 keeps what was learnt; source = as the base was stored, half the disk.",
    )
    logging_steps: int = setting(1, "Write metrics every N steps.", ge=1)
    metric_for_best_model: str | None = setting(
        None, "Evaluation metric that names the best checkpoint; default eval_loss."
    )
    greater_is_better: bool | None = setting(None, "Direction of that metric; default: False for losses, else True.")
    load_best_model_at_end: bool = setting(False, "The stage's result is the best checkpoint, not the last.")
    early_stopping_patience: int | None = setting(None, "Stop after this many evaluations without improvement.", ge=1)
    max_bad_steps: int = setting(3, "Stop (exit 4) after this many non-finite steps in a row; 1 = at the first.", ge=1)
    report_to: list[Literal["tensorboard", "wandb"]] = setting([], "Further sinks for metrics beside metrics.jsonl.")
    wandb_project: str = setting("burnish", "W&B project.")
