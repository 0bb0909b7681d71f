"""Outputs and tables of several micro-batches as those of one: the whole step, in data order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from burnish.core.batch import Outputs, Table, find_slot_rows, move, sum_slots

_PER_TOKEN = ("logprobs", "entropy", "values")


def is_per_token(name: str) -> bool:
    """Whether a field of Outputs has one row per scored token (else: one per completion)."""
    return name in _PER_TOKEN or name.startswith("functionals.")


def concat_steps(tables: Sequence[Table], outputs: Sequence[dict[str, Tensor]]) -> tuple[Outputs, Table]:
    """Join micro-batches into one, groups in `group_order`, completions in slot order, parts of a cut group reunited.

    The order is found on the host, so nothing waits for the device.

    Args:
        tables: One per micro-batch, all on one device.
        outputs: `Outputs.named()` of each; gradients flow back through the result to these tensors.

    Returns:
        Outputs (S, …)/(C, …) and Table of the whole, on that device.
    """
    device = tables[0].token_completion.device
    joined, rows, tokens = _join([t.on_host() for t in tables])
    places = {True: move(tokens, device), False: move(rows, device)}
    table = joined.to(device)
    for name in tables[0].token_columns.keys() - joined.token_columns.keys():  # made on the device
        table.token_columns[name] = torch.cat([t.token_columns[name] for t in tables])[places[True]]
    named = {name: torch.cat([o[name] for o in outputs])[places[is_per_token(name)]] for name in outputs[0]}
    return Outputs.from_named(named), table


def _join(tables: Sequence[Table]) -> tuple[Table, Tensor, Tensor]:
    """The joined table; (C,) and (S,) int64, where its completions and scored tokens stand in the tables laid end to end."""
    orders = [t.group_order[t.completion_group] for t in tables]
    order, slot = torch.cat(orders), torch.cat([t.completion_slot for t in tables])
    completions = order.shape[0]
    width = int(slot.max()) + 1 if completions else 1
    rows = torch.argsort(order * width + slot, stable=True)
    place = torch.empty_like(rows)
    place[rows] = torch.arange(completions)

    offsets = _offsets([t.completion_group.shape[0] for t in tables])
    owner = place[torch.cat([t.token_completion + off for t, off in zip(tables, offsets, strict=True)])]
    tokens = torch.argsort(owner, stable=True)
    group_order, group_of = torch.unique(order[rows], return_inverse=True)
    first = _first_of_each(tables, group_order)
    scored = torch.cat([t.completion_scored for t in tables])[rows]
    table = Table(
        token_completion=owner[tokens],
        token_position=torch.cat([t.token_position for t in tables])[tokens],
        completion_group=group_of,
        completion_slot=slot[rows],
        completion_scored=scored,
        completion_tokens=torch.cat([t.completion_tokens for t in tables])[rows],
        group_order=group_order,
        group_ids=tuple(tables[m].group_ids[g] for m, g in first),
        columns={n: torch.cat([t.columns[n] for t in tables])[rows] for n in tables[0].columns},
        token_columns={n: torch.cat([t.token_columns[n] for t in tables])[tokens] for n in tables[0].token_columns},
        group_columns={
            n: torch.stack([tables[m].group_columns[n][g] for m, g in first]) for n in tables[0].group_columns
        },
        slot_scored=sum_slots(slot[rows].tolist(), scored.tolist()),
        slot_rows=find_slot_rows(slot[rows].tolist()),
    )
    return table, rows, tokens


def _offsets(sizes: Sequence[int]) -> list[int]:
    out, total = [], 0
    for size in sizes:
        out.append(total)
        total += size
    return out


def _first_of_each(tables: Sequence[Table], group_order: Tensor) -> list[tuple[int, int]]:
    """Where each group of the step is found first: (micro-batch, row)."""
    where: dict[int, tuple[int, int]] = {}
    for m, table in enumerate(tables):
        for g, position in enumerate(table.group_order.tolist()):
            where.setdefault(position, (m, g))
    return [where[position] for position in group_order.tolist()]
