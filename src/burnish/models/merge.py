"""Folding an adapter into the full-precision base: merged, checked on real tokens, written as a plain model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from burnish.core.batch import PackedBatch, build_packed_batch
from burnish.core.group import Completion, Group
from burnish.core.logits import Functional
from burnish.errors import ConfigError
from burnish.models.adapters import attach_adapter, merge_attached
from burnish.models.export import export_model
from burnish.models.folder import find_adapter_base, inspect_model_folder
from burnish.models.load import BuiltModel, Head, LoadedFrom, fetch_model_folder, load_model, resolve_model_path
from burnish.models.policy import Policy
from burnish.models.quantise import Quantization
from burnish.models.stored import plan_batches

LIMIT = 1e-4  # of a logit, between merged and base + adapter
CHECK_TOKENS = 512  # positions that are compared, in rows of at most 128
_ROW = 128
_BUDGET = 4096


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model with what was found of it.

    Attributes:
        model: The merged model, fp32, in evaluation mode.
        difference: The largest difference of a logit (or score) between it and base + adapter.
        positions: Positions that were compared.
        dtype: What both were computed in: fp32, or fp64 where the rounding of fp32 alone was above the limit.
    """

    model: PreTrainedModel
    loaded: LoadedFrom
    head: Head
    difference: float
    positions: int
    dtype: torch.dtype


def find_base_folder(adapter: Path) -> Path:
    """The local folder of the full-precision base that an adapter names.

    Raises:
        ConfigError: It is not there, or an adapter itself.
    """
    config = inspect_model_folder(adapter).config
    name = resolve_model_path(find_adapter_base(adapter, config))
    return fetch_model_folder(name, revision=config.get("revision"))


def merge_folder(adapter: Path, rows: Sequence[Sequence[int]]) -> Merged:
    """Add a saved adapter to its base in fp32, and compare the two on token ids.

    Args:
        adapter: A folder with adapter_config.json; it is only read.
        rows: Token ids that the model would read.

    Raises:
        ConfigError: The merged model differs from base + adapter by more than LIMIT, or the adapter cannot be merged.
    """
    head: Head = "score" if inspect_model_folder(adapter).config.get("task_type") == "SEQ_CLS" else "lm"
    merged = _merge(adapter, head, rows, torch.float32)
    if merged.difference > LIMIT:  # rounding, or a wrong merge? In fp64 only the latter is left
        merged = replace(_merge(adapter, head, rows, torch.float64), model=merged.model)
    if not merged.difference <= LIMIT:
        raise ConfigError(
            f"merged and base + adapter differ by {merged.difference:.3g} in a logit (at most {LIMIT:g}); nothing is written",
            where=str(adapter),
            found=merged.difference,
            remedy="the adapter is of a kind that cannot be folded into the weights: use base + adapter",
        )
    return merged


def _merge(adapter: Path, head: Head, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Merged:
    model, base = load_model(str(find_base_folder(adapter)), head=head, dtype=dtype, disable_dropout=True)
    wrapped = attach_adapter(model, adapter).to(dtype).eval()
    before = _compute_logits(wrapped, rows)
    merged = merge_attached(wrapped).requires_grad_(False).eval()
    if dtype == torch.float64:  # what will be written is fp32
        merged = merged.float().double()
    after = _compute_logits(merged, rows)
    gaps = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
    worst = max(gaps) if all(np.isfinite(gaps)) else float("inf")
    loaded = replace(base, folder=adapter, kind="adapter", merged=True, fresh_head=False)
    return Merged(merged, loaded, head, worst, sum(len(row) for row in rows), dtype)


@torch.no_grad()
def _compute_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([list(row)])).logits[0] for row in rows]


def choose_rows(groups: Sequence[Group]) -> list[list[int]]:
    """Token ids of prompts and first completions, about CHECK_TOKENS in all."""
    rows: list[list[int]] = []
    for group in groups:
        row = [*group.prompt.tolist(), *group.completions[0].ids.tolist()][:_ROW]
        if row:
            rows.append(row)
        if sum(map(len, rows)) >= CHECK_TOKENS:
            break
    return rows


def measure_kl(merged: Merged, adapter: Path, quantization: Quantization, groups: Sequence[Group]) -> dict[str, Any]:
    """How far the merged model is from the one that was trained, the adapter over the quantised base.

    Returns:
        "kl": mean over scored tokens of KL(merged ‖ quantised base + adapter), nats, over the whole vocabulary; its
        largest value "kl_max"; "tokens", "rows". For a reward model "score_gap", the mean |difference| of a score.
    """
    trained, _ = load_model(
        str(adapter),
        head=merged.head,
        dtype=torch.float32,
        disable_dropout=True,
        quantization=quantization,
        attach=True,
    )
    ours = Policy(merged.model, head=merged.head, attention="padded").eval()
    theirs = Policy(trained, head=merged.head, attention="padded").eval()
    batches = [build_packed_batch([groups[i] for i in batch]) for batch in plan_batches(groups, _BUDGET)]
    if merged.head == "score":
        gaps = torch.cat([_gap_scores(ours, theirs, batch) for batch in batches])
        return {"score_gap": float(gaps.mean()), "rows": len(groups)}
    values = torch.cat([_measure_batch(ours, theirs, batch) for batch in batches])
    return {"kl": float(values.mean()), "kl_max": float(values.max()), "tokens": len(values), "rows": len(groups)}


@torch.no_grad()
def _gap_scores(ours: Policy, theirs: Policy, batch: PackedBatch) -> Tensor:
    want = frozenset({"scores"})
    first, second = ours(batch, want).scores, theirs(batch, want).scores
    assert first is not None and second is not None
    return (first - second).abs()


@torch.no_grad()
def _measure_batch(ours: Policy, theirs: Policy, batch: PackedBatch) -> Tensor:
    found = ours(batch, frozenset(), against=theirs, functionals=[Functional("kl", _compute_kl, needs_against=True)])
    return found.functionals["kl"].double()


def _compute_kl(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    """Σ_v p(v) (log p(v) − log q(v)), p from `logits`, q from `against`: (B, V) each → (B,)."""
    assert against is not None
    p, q = logits.double().log_softmax(-1), against.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def save_merged(
    merged: Merged, folder: Path, *, tokenizer_source: Path | None, dtype: Any, extra: dict[str, Any]
) -> None:
    """Write the merged model as plain transformers loads it; the caller seals the folder."""
    trainable = dict(merged.model.named_parameters())
    built = BuiltModel(
        model=merged.model,
        head=merged.head,
        trainable=trainable,
        notes=[],
        fresh_adapter=False,
        share=1.0,
        head_parameters=frozenset(),
        no_decay=frozenset(),
        loaded=merged.loaded,
    )
    export_model(
        built,
        folder,
        tokenizer_source=tokenizer_source,
        head=merged.head,
        extra=extra,
        dtype=dtype,
    )


def draw_rows(vocabulary: int, count: int = 4) -> list[Group]:
    """Groups of random ids, for an adapter that comes without a tokenizer."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, (count, _ROW)).astype(np.int32)
    return [Group(f"r{i}", row[:1], (Completion(row[1:], np.ones(_ROW - 1, bool)),)) for i, row in enumerate(ids)]
