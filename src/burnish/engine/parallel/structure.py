"""Models without the values of their parameters: what rank 0 tells the others of a model that it has built."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import nn

from burnish.errors import BurnishError


class _Stripping(pickle.Pickler):
    """Leaves parameters out and numbers them; buffers, which are small, go along."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.parameters: dict[int, nn.Parameter] = {}
        self.numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, nn.Parameter):
            return None
        number = self.numbers.setdefault(id(obj), len(self.numbers))
        self.parameters[number] = obj
        return number, tuple(obj.shape), obj.dtype, obj.requires_grad


class _Rebuilding(pickle.Unpickler):
    """Puts parameters without values, on the meta device, where parameters were; a tied one is one again."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.parameters: dict[int, nn.Parameter] = {}

    def persistent_load(self, pid: Any) -> nn.Parameter:
        number, shape, dtype, trains = pid
        if number not in self.parameters:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.parameters[number] = nn.Parameter(empty, requires_grad=trains)
        return self.parameters[number]


def strip(value: Any) -> tuple[bytes, list[nn.Parameter]]:
    """The object as bytes, without the values of its parameters, and these parameters in order.

    Raises:
        BurnishError: A part of it cannot be sent to another process.
    """
    out = io.BytesIO()
    pickler = _Stripping(out)
    try:
        pickler.dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise BurnishError(
            f"this model cannot be described to the other processes: {error}",
            where="distributed.strategy",
            remedy="use strategy: replicated",
        ) from error
    return out.getvalue(), list(pickler.parameters.values())


def rebuild(data: bytes) -> tuple[Any, list[nn.Parameter]]:
    """What `strip` was given, with parameters on the meta device, and these in the same order."""
    unpickler = _Rebuilding(data)
    value = unpickler.load()
    return value, [unpickler.parameters[i] for i in range(len(unpickler.parameters))]
