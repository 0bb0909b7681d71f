"""One call for every method: a packed batch in, flat tensors over scored tokens and completions out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.core.attention import NAMES, PLAN_KWARG, PackingRefused, attach_plan
from burnish.core.batch import (
    CompletionSpan,
    GroupSpan,
    Layout,
    Outputs,
    PackedBatch,
    build_packed_batch,
)
from burnish.core.group import Completion, Group
from burnish.core.head import compute_token_logprobs
from burnish.core.logits import Functional, HeadInput
from burnish.core.segments import AttentionPlan, build_attention_plan
from burnish.core.varlen import explain_missing
from burnish.errors import UsageError
from burnish.models.fuse import fuse_blocks, split_blocks
from burnish.models.lm_head import build_head_input, get_backbone
from burnish.models.padded import build_padded_rows, compute_padded_hidden
from burnish.models.self_check import check_architecture
from burnish.models.tied import TiedEmbedding, find_tied_embedding

log = logging.getLogger("burnish")

_HEADS = {"lm": frozenset({"logprobs", "entropy"}), "score": frozenset({"scores", "values"})}


class Policy(nn.Module):
    """A transformers (or PEFT) model behind one call.

    The layout of a packed batch reaches the attention layers as a forward argument, so gradient checkpointing
    (`use_reentrant=False`) recomputes with the layout of its own forward. While a Policy holds a model, the model's
    attention implementation is the packed one; `unpacked()` gives the ordinary one back for a while.

    Args:
        model: The model; PEFT adapters stay in place and active.
        head: "lm": log-probabilities of a causal model; "score": a sequence-classification model's scalar, per
            completion ("scores") or per scored token ("values").
        attention: "auto" (packed if the self-check agrees, else padded: varlen on CUDA in bf16 or fp16, else sdpa), "varlen"
            or "flex" (CUDA), "sdpa", "padded". A packed backend that the self-check rejects becomes padded; `why_padded`
            says why.
        compute_dtype: bf16 or fp16: forward under autocast of this type. None or fp32: in the parameters' own.
        cache_dir: Where verdicts of the self-check are kept between runs.

        device: Where it will compute, if its parameters are elsewhere yet; None: where they are.

    Attributes:
        model: The model as given.
        backend: "sdpa", "varlen", "flex" or "padded".
        why_padded: One sentence on why the batch is padded, or "".
    """

    def __init__(
        self,
        model: Any,
        *,
        head: Literal["lm", "score"],
        attention: str = "auto",
        compute_dtype: torch.dtype | None = None,
        cache_dir: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._home = device
        if head not in _HEADS:
            raise UsageError(f"unknown head {head!r}", where="Policy", remedy="use 'lm' or 'score'")
        if attention not in ("auto", *NAMES, "padded"):
            raise UsageError(
                f"unknown attention {attention!r}", where="Policy", remedy="use auto, sdpa, varlen, flex or padded"
            )
        if any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values()):
            raise UsageError(
                "prompt-learning adapters add virtual tokens, which packed and padded rows do not have",
                where="Policy",
                remedy="use LoRA",
            )
        self.model = model
        self.head: str = head
        self.compute_dtype = compute_dtype
        self.why_padded = ""
        found = str(self.inner.config._attn_implementation or "eager")
        self._ordinary = "sdpa" if found in NAMES.values() else found  # another Policy may hold the model
        backbone: Any = self.backbone
        backbone.warn_if_padding_and_no_attention_mask = (
            _never_warn  # it reads ids in each forward: the host would wait
        )
        self._own_head = False
        self._hidden_size = int(self.inner.get_input_embeddings().weight.shape[-1])
        self.backend = self._choose_backend(attention, cache_dir)

    # ---- the wrapped model ----------------------------------------------------------------------------------------

    @property
    def inner(self) -> Any:
        """The transformers model itself, adapters in place."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self) -> nn.Module:
        """The model below its head."""
        return get_backbone(self.inner)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._home or next(self.parameters()).device

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the parameters: every call then needs all ranks."""
        return hasattr(next(self.parameters()), "device_mesh")

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[Any]:
        """The model with its ordinary attention, for `generate` and plain calls; yields the model."""
        if self.backend == "padded":
            yield self.model
            return
        packed = self.inner.config._attn_implementation
        self.inner.set_attn_implementation(self._ordinary)
        try:
            yield self.model
        finally:
            self.inner.set_attn_implementation(packed)

    def _choose_backend(self, attention: str, cache_dir: Path | None) -> str:
        verdict = check_architecture(self.inner, self.head, cache_dir)
        self._own_head = not verdict.head_agrees
        if self._own_head:
            log.info("%s computes its logits in a way of its own: its own head is used", type(self.inner).__name__)
        if attention == "padded":
            self._use_ordinary()
            return "padded"
        if attention == "flex" and self.device.type != "cuda":
            raise UsageError("attention: flex needs a CUDA device", where="Policy", remedy="use attention: auto")
        missing = self._explain_no_varlen()
        if attention == "varlen" and missing:
            raise UsageError(f"attention: varlen: {missing}", where="Policy", remedy="use attention: auto")
        if not verdict.packs:
            return self._become_padded(verdict.reason, asked=attention != "auto")
        if attention == "auto" and missing and self.device.type == "cuda":
            log.info("attention runs by scaled_dot_product_attention, one call a segment: %s", missing)
        backend = attention if attention != "auto" else "sdpa" if missing else "varlen"
        self.inner.set_attn_implementation(NAMES[backend])
        split_blocks(self.backbone)
        if verdict.fuses and self.device.type == "cpu":
            fuse_blocks(self.backbone)
        return backend

    def _explain_no_varlen(self) -> str:
        """Why this model cannot run varlen attention, one clause; "" if it can."""
        dtype = self.compute_dtype or next(self.parameters()).dtype
        if dtype not in (torch.bfloat16, torch.float16):
            return f"varlen attention takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
        return explain_missing(self.device)

    def _become_padded(self, reason: str, *, asked: bool = False) -> str:
        self.why_padded = f"{type(self.inner).__name__} runs padded, not packed: {reason}"
        log.log(logging.WARNING if asked else logging.INFO, self.why_padded)
        self._use_ordinary()
        self.backend = "padded"
        return "padded"

    def _use_ordinary(self) -> None:
        if self.inner.config._attn_implementation in NAMES.values():
            self.inner.set_attn_implementation(self._ordinary)

    # ---- the call -------------------------------------------------------------------------------------------------

    def forward(
        self,
        batch: PackedBatch,
        want: frozenset[str],
        *,
        against: Policy | HeadInput | None = None,
        temperature: float = 1.0,
        functionals: Sequence[Functional] = (),
    ) -> Outputs:
        """Compute what a loss reads.

        Args:
            batch: On this policy's device; without groups every output is empty, and its graph reaches the parameters.
            want: Some of "logprobs", "entropy" (head "lm"), "scores", "values" (head "score").
            against: A second model for functionals (or its `head_input`), without gradient.
            temperature: Divides the logits.
            functionals: Further functionals of the vocabulary's distribution.
        """
        if not want <= _HEADS[self.head]:
            remedy = f"this policy has {', '.join(sorted(_HEADS[self.head]))}"
            raise UsageError(
                f"cannot compute {', '.join(sorted(want - _HEADS[self.head]))}", where="Policy", remedy=remedy
            )
        if not batch.layout.groups:
            return self._empty(batch, want, against, temperature, functionals)
        if self.head == "lm" and self._own_head:
            logits = self._own_logits(batch)
            source = HeadInput(logits, module=_identity)
            return self._read(source, batch, want, against, temperature, functionals)
        if self.head == "lm":
            tied = None if self.backend != "sdpa" else find_tied_embedding(self.inner)
            source, _ = self._hidden(batch, source=True, tied=tied)
            head = build_head_input(self.inner, source)
            if tied is not None and tied.head is not None:
                head = replace(head, weight=tied.head)
            return self._read(head, batch, want, against, temperature, functionals)
        source, last = self._hidden(batch, source="values" in want, last="scores" in want)
        outputs = Outputs()
        if "scores" in want:
            outputs.scores = self._score(last)
        if "values" in want:
            outputs.values = self._score(source)
        return outputs

    def head_input(self, batch: PackedBatch) -> HeadInput:
        """Hidden states at the scored positions and the head, without gradient: the `against` of another policy.

        Without groups: those of the row that `forward` computes then, so that sharded models take part in collectives.
        """
        batch = batch if batch.layout.groups else _build_filler(batch.input_ids.device)
        with torch.no_grad():
            if self._own_head:
                return HeadInput(self._own_logits(batch), module=_identity)
            return build_head_input(self.inner, self._hidden(batch, source=True)[0])

    def _read(
        self,
        source: HeadInput,
        batch: PackedBatch,
        want: frozenset[str],
        against: Policy | HeadInput | None,
        temperature: float,
        functionals: Sequence[Functional],
    ) -> Outputs:
        other = against.head_input(batch) if isinstance(against, Policy) else against
        hidden, targets, count = source.hidden, batch.target_ids, len(batch.target_ids)
        spare = 0 if other is not None or source.module is not None else self._spare(count)
        if spare:
            hidden, targets = F.pad(hidden, (0, 0, 0, spare)), F.pad(targets, (0, spare))
        with self._autocast():
            found = compute_token_logprobs(
                hidden,
                source.weight,
                targets,
                bias=source.bias,
                transform=source.transform,
                want_logprobs="logprobs" in want,
                want_entropy="entropy" in want,
                temperature=temperature,
                functionals=functionals,
                against=other,
                module=source.module,
            )
        if spare:
            found = {name: column[:count] for name, column in found.items()}
        outputs = Outputs(functionals={f.name: found[f.name] for f in functionals})
        outputs.logprobs = found["logprobs"] if "logprobs" in want else None
        outputs.entropy = found.get("entropy")
        return outputs

    def _spare(self, rows: int) -> int:
        """Rows to add, so that products have few different shapes: on a CPU, PyTorch prepares a bf16 kernel for each shape."""
        if self.compute_dtype in (None, torch.float32) or self.device.type != "cpu" or not rows:
            return 0
        if self._hidden_size >= 384:  # a row costs more than the kernels of a new shape
            return -rows % 16
        return -rows % (64 if rows >= 512 else 32)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype is None or self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def _hidden(
        self, batch: PackedBatch, *, source: bool = False, last: bool = False, tied: TiedEmbedding | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the scored tokens (S, h) and those of the last tokens (C, h); (0, h) if not wanted."""
        wanted = [
            index if want else index[:0] for index, want in ((batch.source_index, source), (batch.last_index, last))
        ]
        if self.backend != "padded":
            try:
                given = _packed_arguments(batch, self._spare(batch.layout.total))
                plan: AttentionPlan = given[PLAN_KWARG]
                plan.keep = torch.cat(wanted)
                if spare := self._spare(len(plan.keep)):
                    plan.keep = F.pad(plan.keep, (0, spare), value=plan.total - 1)
                if tied is not None:
                    given["inputs_embeds"] = tied.rows(given.pop("input_ids")[0])[None]
                with self._autocast():
                    hidden = self.backbone(**given)[0][0]
                read = hidden if plan.kept else hidden.index_select(0, plan.keep)
                first, both = len(wanted[0]), len(wanted[0]) + len(wanted[1])
                return read[:first], read[first:both]
            except PackingRefused as refusal:
                self._become_padded(refusal.message)
        with self._autocast():
            rows = build_padded_rows(batch)
            hidden = compute_padded_hidden(self.backbone, rows)
        every = torch.arange(len(batch.last_index), device=hidden.device)
        read = hidden[rows.source_row, rows.source_column] if source else hidden[:0, 0]
        return read, (hidden[every, rows.last_column] if last else hidden[:0, 0])

    def _own_logits(self, batch: PackedBatch) -> Tensor:
        """(S, V) logits by the model's own head; for heads outside the table."""
        with self._autocast():
            if self.backend != "padded":
                try:
                    return self.inner(**_packed_arguments(batch), logits_to_keep=batch.source_index).logits[0]
                except PackingRefused as refusal:
                    self._become_padded(refusal.message)
            rows = build_padded_rows(batch)
            return compute_padded_hidden(self.inner, rows)[rows.source_row, rows.source_column]

    def _score(self, hidden: Tensor) -> Tensor:
        """(n, h) → (n,) scalars; the small product runs in the head's own precision, fp32 at least on the way out."""
        score = self.inner.score
        with torch.autocast(self.device.type, enabled=False):
            value = score(hidden.to(score.weight.dtype))
        if value.shape[-1] != 1:
            raise UsageError(
                f"the score head gives {value.shape[-1]} numbers", where="Policy", remedy="load it with num_labels=1"
            )
        return value[:, 0].to(torch.promote_types(value.dtype, torch.float32))

    def _empty(
        self,
        batch: PackedBatch,
        want: frozenset[str],
        against: Policy | HeadInput | None,
        temperature: float,
        functionals: Sequence[Functional],
    ) -> Outputs:
        """Outputs of no groups. A row of two tokens runs through the whole model, so that every parameter gets a zero
        gradient and sharded models take part in their collectives."""
        filler = _build_filler(batch.input_ids.device)
        plain = [f for f in functionals if not f.needs_against or against is not None]
        found = self.forward(filler, want, against=against, temperature=temperature, functionals=plain).named()
        outputs = Outputs.from_named({name: value[:0] for name, value in found.items()})
        anchor = next((v for v in outputs.named().values()), None)
        for f in functionals:
            if f.name not in outputs.functionals and anchor is not None:
                outputs.functionals[f.name] = anchor
        return outputs


def _build_filler(device: torch.device) -> PackedBatch:
    """The row of two tokens that stands for no groups."""
    token = np.zeros(1, dtype=np.int32)
    filler = build_packed_batch([Group("", token, (Completion(token, np.ones(1, dtype=np.bool_)),))])
    return filler.to(device)


def _never_warn(input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """In place of transformers' search for padding without a mask: packed rows have neither."""


def _identity(logits: Tensor) -> Tensor:
    return logits


def _packed_arguments(batch: PackedBatch, spare: int = 0) -> dict[str, Any]:
    """Forward arguments of a packed row, the attention plan among them; `spare` tokens that nothing reads are added."""
    layout, ids, positions = batch.layout, batch.input_ids, batch.position_ids
    if spare:
        filling = GroupSpan(layout.total, 0, (CompletionSpan(layout.total, spare),))
        layout = Layout(layout.total + spare, (*layout.groups, filling))
        ids = torch.cat((ids, ids.new_zeros(spare)))
        positions = torch.cat((positions, torch.arange(spare, dtype=positions.dtype)))
    plan = build_attention_plan(layout)
    positions = positions[None].clone()  # its own storage: views of it lead back to the plan
    attach_plan(positions, plan)
    return {"input_ids": ids[None], "position_ids": positions, "use_cache": False, PLAN_KWARG: plan}
