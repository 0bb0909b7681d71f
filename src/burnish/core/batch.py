"""Groups laid end to end without padding, as tensors.

Letters of shapes: T tokens of the row, S scored tokens, C completions, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.group import Group


@dataclass(frozen=True, slots=True)
class CompletionSpan:
    """Where a completion lies in the packed row: [start, start + length)."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where a group lies in the packed row: its prompt, directly followed by its completions."""

    start: int
    prompt: int
    completions: tuple[CompletionSpan, ...]

    @property
    def end(self) -> int:
        if not self.completions:
            return self.start + self.prompt
        last = self.completions[-1]
        return last.start + last.length


@dataclass(frozen=True, slots=True)
class Layout:
    """The attention structure of a packed row, in plain integers.

    A prompt attends causally to itself; a completion to its prompt and, causally, to itself; nothing else.
    """

    total: int
    groups: tuple[GroupSpan, ...]


@dataclass
class Table:
    """All that a loss may read beside the model's outputs; flat, for one micro-batch or a whole optimizer step.

    Attributes:
        token_completion: (S,) int64, the completion (row of C) that each scored token belongs to.
        token_position: (S,) int64, index of each scored token within its completion.
        completion_group: (C,) int64, the group (row of G) of each completion.
        completion_slot: (C,) int64, 0 … K−1 within its group (pairs: 0 = chosen, 1 = rejected).
        completion_scored: (C,) int64, scored tokens of each completion.
        completion_tokens: (C,) int64, all tokens of each completion.
        group_order: (G,) int64, canonical position of each group within the optimizer step (data order).
        group_ids: G names, for messages.
        columns: name → (C,) float32. token_columns: name → (S,) float32. group_columns: name → (G,) float32.
        slot_rows: slot → (n,) int64, its completions (rows of C); made with the batch, so that reading a slot never asks the
            device where it is.
        slot_scored: slot → scored tokens of its completions, on the host: the count of a term over one side's tokens.
        host: The same table as it was on the host, where this one was moved to another device: what it says is read there
            without waiting for the device. None on the host itself.
    """

    token_completion: Tensor
    token_position: Tensor
    completion_group: Tensor
    completion_slot: Tensor
    completion_scored: Tensor
    completion_tokens: Tensor
    group_order: Tensor
    group_ids: tuple[str, ...]
    columns: dict[str, Tensor] = field(default_factory=dict)
    token_columns: dict[str, Tensor] = field(default_factory=dict)
    group_columns: dict[str, Tensor] = field(default_factory=dict)
    slot_rows: dict[int, Tensor] = field(default_factory=dict)
    slot_scored: dict[int, int] = field(default_factory=dict)
    host: Table | None = field(default=None, repr=False, compare=False)

    def to(self, device: torch.device | str) -> Table:
        """The table with all tensors on `device`; back on the host only what was added elsewhere is copied."""
        if torch.device(device).type == "cpu":
            if self.host is None:
                return self
            added = {n: c.cpu() for n, c in self.token_columns.items() if n not in self.host.token_columns}
            return replace(self.host, token_columns=self.host.token_columns | added)
        moved = {f.name: _move(getattr(self, f.name), device) for f in fields(self) if f.name != "host"}
        return Table(**moved, host=self.on_host())

    def on_host(self) -> Table:
        """The table on the host; without what was added to the one on the device."""
        return self if self.host is None else self.host

    def sum_tokens(self, per_token: Tensor) -> Tensor:
        """(S,) → (C,): sum over the scored tokens of each completion; 0 where a completion has none."""
        out = per_token.new_zeros(self.completion_group.shape[0])
        return out.index_add(0, self.token_completion, per_token)

    def slot(self, values: Tensor, slot: int) -> Tensor:
        """(C,) → (G,): the value of completion `slot` of every group.

        Raises:
            ValueError: A group has no such completion.
        """
        rows = self.slot_rows.get(slot)
        found = 0 if rows is None else rows.shape[0]
        if found != len(self.group_ids):
            raise ValueError(f"only {found} of {len(self.group_ids)} groups have a completion {slot}")
        return values[:0] if rows is None else values.index_select(0, rows)


@dataclass
class Outputs:
    """What one model call returns; fields that were not wanted are None.

    Attributes:
        logprobs: (S,) log-probabilities of the scored tokens, at least fp32, nats.
        entropy: (S,) entropy of the distribution each scored token was drawn from, nats.
        scores: (C,) scalar score of each completion, read at its last token.
        values: (S,) value estimate at each scored token.
        functionals: name → (S,) further functionals of the vocabulary's distribution (see `core.head`).
    """

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    scores: Tensor | None = None
    values: Tensor | None = None
    functionals: dict[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """All tensors by name, functionals as "functionals.<name>"."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "functionals"}
        found = {name: value for name, value in plain.items() if value is not None}
        return found | {f"functionals.{name}": value for name, value in self.functionals.items()}

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor]) -> Outputs:
        """The inverse of `named`."""
        out = cls()
        known = {f.name for f in fields(cls)}
        for name, value in tensors.items():
            if not name.startswith("functionals.") and name not in known:
                raise ValueError(f"unknown output {name!r}")
            if name.startswith("functionals."):
                out.functionals[name.removeprefix("functionals.")] = value
            else:
                setattr(out, name, value)
        return out


@dataclass
class PackedBatch:
    """Some groups as one row without padding: prompt | completion 1 | … | completion K | next prompt …

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64; each completion restarts at its prompt's length.
        source_index: (S,) int64, the row position whose hidden state predicts each scored token. The last position of a
            prompt predicts the first token of all its completions.
        target_ids: (S,) int64, the scored tokens themselves.
        last_index: (C,) int64, row position of each completion's last token (where a reward model reads its score).
        layout: The attention structure.
        table: What the loss reads.
    """

    input_ids: Tensor
    position_ids: Tensor
    source_index: Tensor
    target_ids: Tensor
    last_index: Tensor
    layout: Layout
    table: Table

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch with all tensors on `device`."""
        if torch.device(device).type == "cpu" and self.input_ids.device.type == "cpu":
            return self
        tensors = (self.input_ids, self.position_ids, self.source_index, self.target_ids, self.last_index)
        return PackedBatch(*(move(x, device) for x in tensors), layout=self.layout, table=self.table.to(device))


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; to a CUDA device through pinned memory, so that the host does not wait for the copy."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _move(value: Any, device: torch.device | str) -> Any:
    """Tensors, and dicts of tensors, on `device`; anything else as it is."""
    if isinstance(value, Tensor):
        return move(value, device)
    return {k: _move(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def _stack_columns(rows: Sequence[Mapping[str, float]], owners: Sequence[str], what: str) -> dict[str, Tensor]:
    """Rows of named numbers → name → (n,) float32; every row must have the same names."""
    if not rows:
        return {}
    names = set(rows[0])
    for row, owner in zip(rows, owners, strict=True):
        if set(row) != names:
            raise ValueError(f"{what} columns differ between rows: {owner} has {sorted(row)}, not {sorted(names)}")
    return {n: torch.tensor([row[n] for row in rows], dtype=torch.float32) for n in sorted(names)}


def build_packed_batch(
    groups: Sequence[Group], order: Sequence[int] | None = None, slots: Sequence[Sequence[int]] | None = None
) -> PackedBatch:
    """Lay groups end to end.

    Args:
        groups: The groups of one micro-batch; none is allowed (T = S = C = G = 0).
        order: Canonical position of each group within the optimizer step; default 0 … G−1.
        slots: For each group the slots of its completions, where a group is only a part of one; default 0 … K−1.

    Raises:
        ValueError: Columns differ between groups, or a prompt or completion is empty.
    """
    ids, positions, spans = [], [], []
    source, target, last = [], [], []
    token_completion, token_position, completion_group, slot_of, scored, tokens = [], [], [], [], [], []
    rows: list[Mapping[str, float]] = []
    token_rows: list[dict[str, np.ndarray]] = []
    cursor = 0
    for g, group in enumerate(groups):
        p = len(group.prompt)
        if p == 0 or any(len(c.ids) == 0 for c in group.completions):
            raise ValueError(f"{group.id}: an empty prompt or completion cannot be packed")
        start, completions = cursor, []
        ids.append(group.prompt)
        positions.append(np.arange(p))
        cursor += p
        for slot, c in zip(slots[g] if slots else range(len(group.completions)), group.completions, strict=True):
            n = len(c.ids)
            where = np.flatnonzero(c.mask)
            before = np.where(where == 0, start + p - 1, cursor + where - 1)
            row = len(completion_group)
            source.append(before)
            target.append(c.ids[where])
            token_completion.append(np.full(len(where), row))
            token_position.append(where)
            completion_group.append(g)
            slot_of.append(slot)
            scored.append(len(where))
            tokens.append(n)
            last.append(cursor + n - 1)
            rows.append(c.columns)
            token_rows.append({name: values[where] for name, values in c.token_columns.items()})
            ids.append(c.ids)
            positions.append(np.arange(p, p + n))
            completions.append(CompletionSpan(cursor, n))
            cursor += n
        spans.append(GroupSpan(start, p, tuple(completions)))
    owners = [groups[g].id for g in completion_group]
    table = Table(
        token_completion=_long(token_completion),
        token_position=_long(token_position),
        completion_group=torch.tensor(completion_group, dtype=torch.int64),
        completion_slot=torch.tensor(slot_of, dtype=torch.int64),
        completion_scored=torch.tensor(scored, dtype=torch.int64),
        completion_tokens=torch.tensor(tokens, dtype=torch.int64),
        group_order=torch.tensor(list(order) if order is not None else range(len(groups)), dtype=torch.int64),
        group_ids=tuple(group.id for group in groups),
        columns=_stack_columns(rows, owners, "completion"),
        token_columns=_concat_token_columns(token_rows, owners),
        group_columns=_stack_columns([g.columns for g in groups], [g.id for g in groups], "group"),
        slot_rows=find_slot_rows(slot_of),
        slot_scored=sum_slots(slot_of, scored),
    )
    return PackedBatch(
        input_ids=_long(ids),
        position_ids=_long(positions),
        source_index=_long(source),
        target_ids=_long(target),
        last_index=torch.tensor(last, dtype=torch.int64),
        layout=Layout(cursor, tuple(spans)),
        table=table,
    )


def find_slot_rows(slots: Sequence[int]) -> dict[int, Tensor]:
    """slot → (n,) int64, the places where it stands in `slots`."""
    array = np.asarray(slots, dtype=np.int64)
    return {int(s): torch.from_numpy(np.flatnonzero(array == s)) for s in np.unique(array)}


def sum_slots(slots: Sequence[int], values: Sequence[int]) -> dict[int, int]:
    """slot → sum of the values that stand in its places."""
    total: dict[int, int] = {}
    for slot, value in zip(slots, values, strict=True):
        total[slot] = total.get(slot, 0) + value
    return total


def _long(parts: Sequence[np.ndarray]) -> Tensor:
    if not parts:
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _concat_token_columns(rows: Sequence[Mapping[str, np.ndarray]], owners: Sequence[str]) -> dict[str, Tensor]:
    if not rows:
        return {}
    names = set(rows[0])
    for row, owner in zip(rows, owners, strict=True):
        if set(row) != names:
            raise ValueError(f"token columns differ between rows: {owner} has {sorted(row)}, not {sorted(names)}")
    joined = {n: np.concatenate([r[n] for r in rows]) for n in sorted(names)}
    return {n: torch.from_numpy(v if v.dtype == np.float64 else v.astype(np.float32)) for n, v in joined.items()}
