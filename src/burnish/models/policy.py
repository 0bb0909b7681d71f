"""One call for every method: a packed batch in, flat tensors over scored tokens and completions out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from burnish.core.attention import PLAN_KWARG, SDPA_NAME, attach_plan, build_attention_plan
from burnish.core.batch import Outputs, PackedBatch
from burnish.core.head import Functional, HeadInput, compute_token_logprobs
from burnish.errors import UsageError
from burnish.models.dropout import disable_dropout, find_dropout
from burnish.models.padded import build_padded_rows, compute_padded_hidden

__all__ = ["Policy", "disable_dropout", "find_dropout"]

log = logging.getLogger("burnish")


class Policy(nn.Module):
    """A transformers (or PEFT) model behind one call.

    Args:
        model: The model; PEFT adapters stay in place and active.
        head: "lm": log-probabilities of a causal model; "score": a sequence-classification model's scalar.
        attention: "auto" (packed if the self-check agrees, else padded), "sdpa", "flex" (CUDA) or "padded".
        compute_dtype: bf16 or fp16: forward under autocast of this type. None: in the parameters' own.
    """

    def __init__(
        self,
        model: Any,
        *,
        head: Literal["lm", "score"],
        attention: str = "auto",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.compute_dtype = compute_dtype
        self.backend: str = "sdpa" if attention == "auto" else attention
        self.why_padded = ""
        if self.backend == "sdpa":
            self.inner.set_attn_implementation(SDPA_NAME)

    @property
    def inner(self) -> Any:
        """The transformers model itself, adapters in place."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self) -> nn.Module:
        """The model below its head."""
        inner = self.inner
        base = inner.base_model
        return inner.model if base is inner else base

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        batch: PackedBatch,
        want: frozenset[str],
        *,
        against: Policy | None = None,
        temperature: float = 1.0,
        functionals: Sequence[Functional] = (),
    ) -> Outputs:
        source, last = self._hidden(batch, want)
        outputs = Outputs()
        with self._autocast():
            if self.head == "lm":
                found = self._head_outputs(source, batch, want, temperature)
                outputs.logprobs = found.get("logprobs")
                outputs.entropy = found.get("entropy")
            if "scores" in want:
                outputs.scores = self._score(last)
            if "values" in want:
                outputs.values = self._score(source)
        return outputs

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype is None or self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def _hidden(self, batch: PackedBatch, want: frozenset[str]) -> tuple[Tensor, Tensor]:
        with self._autocast():
            if self.backend == "padded":
                rows = build_padded_rows(batch)
                hidden = compute_padded_hidden(self.backbone, rows)
                every = torch.arange(hidden.shape[0], device=hidden.device)
                return hidden[rows.source_row, rows.source_column], hidden[every, rows.last_column]
            plan = build_attention_plan(batch.layout)
            positions = batch.position_ids[None]
            attach_plan(positions, plan)
            hidden = self.backbone(
                input_ids=batch.input_ids[None], position_ids=positions, use_cache=False, **{PLAN_KWARG: plan}
            )[0][0]
            return hidden.index_select(0, batch.source_index), hidden.index_select(0, batch.last_index)

    def _head_outputs(
        self, source: Tensor, batch: PackedBatch, want: frozenset[str], temperature: float
    ) -> dict[str, Tensor]:
        head = self.inner.get_output_embeddings()
        return compute_token_logprobs(
            source, head.weight, batch.target_ids, bias=head.bias, temperature=temperature,
            want_entropy="entropy" in want,
        )

    def _score(self, hidden: Tensor) -> Tensor:
        scores = self.inner.score(hidden)[:, 0]
        return scores.to(torch.promote_types(scores.dtype, torch.float32))
