"""Sums over ranks. In rank order they have the same bits each time, and on every rank; the traffic is that of an all-reduce.

Each rank adds up one piece of a chunk (all-to-all, then a sum over ranks in order) and the pieces are collected (all-gather).
A rank sends and receives about twice the data, whatever the number of ranks, and holds two chunks beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from burnish.engine.runtime import peers

CHUNK = 1 << 22  # elements exchanged at a time: 16 MB in fp32


def sum_in_rank_order(tensors: Sequence[Tensor], *, chunk: int = CHUNK) -> None:
    """Replace contiguous tensors by their sums over ranks, added in rank order; alike in number and shapes on all ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for pieces in _cut(tensors, chunk):
        count = sum(p.numel() for p in pieces)
        flat = pieces[0].new_zeros(-(-count // world) * world)
        torch.cat(list(pieces), out=flat[:count])
        received = torch.empty_like(flat)
        with peers():
            dist.all_to_all_single(received, flat)
            own = flat.view(world, -1)[rank].clone()
            add_in_order(received, own)
            dist.all_gather(list(flat.view(world, -1)), own)
        _put_back(flat, pieces)


def sum_in_any_order(tensors: Sequence[Tensor], *, chunk: int = 8 * CHUNK) -> None:
    """Replace contiguous tensors by their sums over ranks, in the order that the backend chooses."""
    for pieces in _cut(tensors, chunk):
        flat = torch.cat(list(pieces))
        with peers():
            dist.all_reduce(flat)
        _put_back(flat, pieces)


def add_in_order(received: Tensor, out: Tensor) -> None:
    """The sum of equally long parts, one of each rank, from first to last.

    Args:
        received: (world × n,). out: (n,).
    """
    first, *others = received.view(-1, out.numel()) if out.numel() else [out]
    out.copy_(first)
    for other in others:
        out += other


class OrderedReduceScatter:
    """FSDP2's reduce-scatter (`FSDPModule.set_custom_reduce_scatter`) that adds in rank order."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is exchanged."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        """output (n,) ← Σ over ranks of their part of input (world × n,); `op` is a sum."""
        received = torch.empty_like(input_tensor)
        with peers():
            dist.all_to_all_single(received, input_tensor, group=group)
        add_in_order(received, output_tensor)


def _cut(tensors: Sequence[Tensor], chunk: int) -> Iterator[list[Tensor]]:
    """Flat views of the tensors, in runs of one type and at most `chunk` elements; large tensors are cut."""
    pieces: list[Tensor] = []
    room = chunk
    for tensor in tensors:
        flat = tensor.view(-1)
        while len(flat):
            if pieces and (not room or pieces[0].dtype != flat.dtype):
                yield pieces
                pieces, room = [], chunk
            pieces.append(flat[:room])
            flat = flat[room:]
            room -= pieces[-1].numel()
    if pieces:
        yield pieces


def _put_back(flat: Tensor, pieces: Sequence[Tensor]) -> None:
    start = 0
    for piece in pieces:
        piece.copy_(flat[start : start + piece.numel()])
        start += piece.numel()
