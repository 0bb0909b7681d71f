"""Counting parameters without weights: the model on torch's meta device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from burnish.config.registry import find_method_spec
from burnish.config.train import TrainSettings
from burnish.models.adapters import build_lora
from burnish.models.folder import find_adapter_base, inspect_model_folder
from burnish.models.freeze import compute_share, freeze_all_but_top, untie_embeddings


def compute_trainable_share(settings: TrainSettings, folder: Path) -> str:
    """The line "trainable: … of … parameters (…)" that training would print, from the configuration alone."""
    head = find_method_spec(settings.kind).result.head
    found = inspect_model_folder(folder)
    base = find_adapter_base(found.path, found.config) if found.kind == "adapter" else folder
    config = AutoConfig.from_pretrained(str(base), local_files_only=True)
    cls = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    if head == "score":
        config.num_labels = 1
    with torch.device("meta"):
        model = cls.from_config(config)
        model.tie_weights()
        if settings.untie_embeddings:
            untie_embeddings(model)
        if settings.lora is not None:
            return str(compute_share(build_lora(model, settings.lora, head=head, seed=0)))
        freeze_all_but_top(model, settings.top_k or 0, head=head)
    return str(compute_share(model))
