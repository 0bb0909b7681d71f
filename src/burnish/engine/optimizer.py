"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import nn

from burnish.config.train import TrainSettings
from burnish.errors import ConfigError


def build_parameter_groups(
    trainable: Mapping[str, nn.Parameter],
    settings: TrainSettings,
    *,
    no_decay: Collection[str] = (),
    head: Collection[str] = (),
    rates: Mapping[str, float] | None = None,
) -> list[dict]:
    """Parameters by (decays, peak rate): norms and biases do not decay; a new head and each model may have their own rate.

    Each group carries `peak_lr` (the schedule multiplies it) and `names` in the order of its parameters.

    Args:
        trainable: "<model>.<parameter>" → parameter.
        rates: Model → its own peak learning rate; a head's rate goes before it.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in trainable.items():
        decays, is_head = name not in no_decay, name in head
        model = name.partition(".")[0]
        own = (rates or {}).get(model, settings.learning_rate)
        peak = settings.head_learning_rate if is_head and settings.head_learning_rate else own
        group = groups.setdefault(
            (decays, is_head, peak),
            {
                "params": [],
                "names": [],
                "weight_decay": settings.weight_decay if decays else 0.0,
                "peak_lr": peak,
                "lr": peak,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(groups: list[dict], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that `settings.optim` names.

    AdamW: Loshchilov & Hutter, arXiv 1711.05101 (one fused pass). Adafactor: Shazeer & Stern, arXiv 1804.04235
    (torch's; second moments factored into rows and columns, no first moment).
    """
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.optim == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=settings.adam_epsilon, fused=True)
    if settings.optim == "adafactor":
        return torch.optim.Adafactor(groups)
    if settings.optim == "sgd":
        return torch.optim.SGD(groups)
    if not torch.cuda.is_available():
        raise ConfigError(
            "optim: adamw_8bit needs a CUDA device",
            where="optim",
            found=settings.optim,
            remedy="use adamw, or adafactor to save memory",
        )
    from burnish.models.bnb import build_adamw_8bit

    return build_adamw_8bit(groups, betas=betas, eps=settings.adam_epsilon)


def compute_lr_factor(update: int, total: int, settings: TrainSettings) -> float:
    """The factor on the peak learning rate for update `update` (0-based) of `total`.

    Warm-up rises linearly to 1 at update `warmup`; then constant, linear or cosine down to `min_lr_ratio`, or
    wsd: constant until the last `decay_ratio` of all updates, then linear down.
    """
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    floor = settings.min_lr_ratio
    span = max(total - warmup, 1)
    done = min((update - warmup) / span, 1.0)
    if settings.lr_scheduler_type == "constant":
        return 1.0
    if settings.lr_scheduler_type == "linear":
        return floor + (1 - floor) * (1 - done)
    if settings.lr_scheduler_type == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    decay = max(round(settings.decay_ratio * total), 1)
    left = total - update
    return 1.0 if left > decay else floor + (1 - floor) * left / decay
