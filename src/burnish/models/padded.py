"""The ordinary rectangular batch: one right-padded row per prompt + completion.

It is what packed rows are compared with, and the way for architectures that cannot be packed exactly (position biases by
row index, recurrent layers, attention outside the library's registry). Right padding is safe for every causal model: no
real token comes after a padded one.

Shapes: C completions (rows), L tokens of the longest row, S scored tokens, h hidden size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from burnish.core.batch import PackedBatch, move


@dataclass
class PaddedRows:
    """A packed batch as rows.

    Attributes:
        input_ids: (C, L) int64; padding repeats the row's first token and is never read.
        attention_mask: (C, L) int64, 1 = real. position_ids: (C, L) int64.
        source_row, source_column: (S,) int64, where the hidden state that predicts each scored token lies.
        last_column: (C,) int64, each row's last real token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    source_row: Tensor
    source_column: Tensor
    last_column: Tensor


def build_padded_rows(batch: PackedBatch, side: str = "right") -> PaddedRows:
    """Rows of a packed batch.

    Args:
        batch: The packed batch, on its device.
        side: "right", or "left" (tests only: then the positions of padding are 0 and those of tokens start at 0).
    """
    rows = [
        np.r_[group.start : group.start + group.prompt, c.start : c.start + c.length]
        for group in batch.layout.groups
        for c in group.completions
    ]
    width = max(len(row) for row in rows)
    index = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    shift = np.zeros(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        shift[i] = width - len(row) if side == "left" else 0
        index[i] = row[0]
        index[i, shift[i] : shift[i] + len(row)] = row
        mask[i, shift[i] : shift[i] + len(row)] = 1
    positions = np.clip(np.arange(width)[None] - shift[:, None], 0, None)
    device = batch.input_ids.device
    ends = np.array([len(row) - 1 for row in rows], dtype=np.int64)
    cells, real, place, moved, last = (move(torch.from_numpy(x), device) for x in (index, mask, positions, shift, ends))
    owner = batch.table.token_completion
    return PaddedRows(
        input_ids=batch.input_ids[cells],
        attention_mask=real,
        position_ids=place,
        source_row=owner,
        source_column=batch.position_ids[batch.source_index] + moved[owner],
        last_column=last + moved,
    )


def compute_padded_hidden(backbone: nn.Module, rows: PaddedRows) -> Tensor:
    """(C, L, h) hidden states of the rows; padded positions hold anything."""
    given = {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids, "use_cache": False}
    taken = {name: value for name, value in given.items() if name in _parameters(type(backbone))}
    return backbone(rows.input_ids, **taken)[0]


@lru_cache
def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the arguments that a model class's forward declares."""
    return frozenset(inspect.signature(kind.forward).parameters)
