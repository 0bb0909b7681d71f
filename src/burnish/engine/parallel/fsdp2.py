"""Parameters, gradients and moments in shards: torch's `fully_shard` over the blocks of each model, then over the model.

Embedding, final norm and head form one unit with the model's own call, because burnish's head reads its weight outside the head's
`forward`. Parameters are gathered in their own type (fp32 masters under autocast) and gradients are added in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from burnish.engine.parallel.files import describe_tensors, read_shards, write_shards
from burnish.engine.parallel.ordered import OrderedReduceScatter
from burnish.engine.parallel.single import Single, scale_in_place
from burnish.engine.parallel.structure import rebuild, strip
from burnish.engine.runtime import Runtime, peers
from burnish.errors import ConfigError
from burnish.models.freeze import list_blocks

T = TypeVar("T")

_WHOLE = ("variance/", "row_var/", "col_var/")  # Adafactor's state: not sharded, whatever its shape
_NEEDED = ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms", "set_custom_reduce_scatter")


class Fsdp2(Single):
    """Each rank holds a part of every parameter, in rows.

    Args:
        ordered: Gradients are added in rank order, equal to the bit each time; else in the order that the backend chooses.
        reshard: Drop a block's gathered parameters after its forward and gather them again for its backward.
        offload: Shards and moments lie in the CPU's memory.

    Raises:
        ConfigError: This version of torch lacks what is needed.
    """

    kind = "fsdp2"
    sharded = True

    def __init__(self, runtime: Runtime, *, ordered: bool, reshard: bool = True, offload: bool = False) -> None:
        super().__init__(runtime)
        if not all(hasattr(FSDPModule, name) for name in _NEEDED):
            raise ConfigError(
                f"strategy fsdp2 needs a newer torch than {torch.__version__}",
                where="distributed.strategy",
                remedy="upgrade torch, or use strategy: replicated",
            )
        self.ordered, self.reshard, self.offload = ordered, reshard, offload
        self.mesh = DeviceMesh.from_group(dist.distributed_c10d._get_default_group(), runtime.device.type)
        self._values: dict[nn.Parameter, Tensor] = {}  # of models that rank 0 has built, until they are prepared
        self._roots: list[FSDPModule] = []

    # -- models -----------------------------------------------------------------------------------------------------

    def build(self, make: Callable[[], T]) -> T:
        """Rank 0 makes it; every rank gets its structure, with parameters on the meta device. Rank 0 keeps their values."""
        made: list[nn.Parameter] = []

        def describe() -> bytes:
            data, parameters = strip(make())
            made.extend(parameters)
            return data

        value, parameters = rebuild(self.runtime.run_on_main(describe))
        self._values |= {p: full.detach() for p, full in zip(parameters, made, strict=False)}
        return value

    def prepare(self, models: Mapping[str, nn.Module]) -> None:
        """Shard the models; parameters on the meta device get their values from rank 0, one after the other."""
        for model in models.values():
            self._prepare(model)

    def _prepare(self, model: nn.Module) -> None:
        warnings.filterwarnings(
            "ignore", message=r"(?s)FSDP2-wrapped module .* returned a view"
        )  # nothing writes to it
        first = next(model.parameters(), None)
        empty = first is not None and first.is_meta
        values = {name: self._values.pop(p) for name, p in model.named_parameters() if p in self._values}
        if not empty:
            model.to(self.runtime.device)
        policy = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        given: dict[str, Any] = {
            "mesh": self.mesh,
            "offload_policy": policy,
            "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
        }
        for block in list_blocks(model):
            fully_shard(block, reshard_after_forward=self.reshard, **given)
        fully_shard(model, reshard_after_forward=False, **given)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # a factor of its own is no operation of gloo
                if self.ordered:
                    module.set_custom_reduce_scatter(OrderedReduceScatter())  # pyright: ignore[reportArgumentType]
        if hasattr(model, "head_input"):
            register_fsdp_forward_method(model, "head_input")
        if empty:
            self._fill(model, values)
        self._roots.append(model)  # pyright: ignore[reportArgumentType]

    def _fill(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        """Give the shards of a model on the meta device their memory, and their rows of rank 0's values."""
        buffers = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False)]
        model.to_empty(device="cpu" if self.offload else self.runtime.device)
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.to(self.runtime.device)
        for name, parameter in model.named_parameters():
            shard = _local(parameter.detach())
            rows = -(-parameter.shape[0] // self.runtime.world)
            part = torch.zeros(rows, *parameter.shape[1:], dtype=parameter.dtype, device=self.runtime.device)
            with peers():
                dist.scatter(part, _split_rows(values.pop(name), part, self.runtime.world) if values else None, src=0)
            shard.copy_(part[: len(shard)])

    # -- steps ------------------------------------------------------------------------------------------------------

    def finish(self, parameters: Sequence[Tensor], scale: float | None) -> Tensor:
        """Undo the loss scale (gradients were added over ranks in each backward); returns (), the norm over all shards."""
        grads = [_local(p.grad) for p in parameters if p.grad is not None]
        if scale is not None and grads:
            scale_in_place(grads, 1.0 / scale)
        own = get_total_norm(grads).to(self.runtime.device).reshape(1)
        every = own.new_empty(self.runtime.world)
        with peers():
            dist.all_gather(list(every.split(1)), own)
        return torch.linalg.vector_norm(every)

    def clip_and_step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], max_norm: float, norm: Tensor
    ) -> None:
        """Scale the gradients to at most `max_norm` (0: not at all) and let the optimizer step, on the shards."""
        grads = [_local(p.grad) for p in parameters if p.grad is not None]
        if max_norm and grads:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            scale_in_place(grads, factor.to(grads[0].device))
        if isinstance(optimizer, torch.optim.Adafactor):
            _step_whole(optimizer)
        else:
            optimizer.step()

    # -- checkpoints and export -------------------------------------------------------------------------------------

    def save_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]], folder: Path | None) -> None:
        """Each rank writes its shards into a file of its own."""
        place = self.runtime.gather(None if folder is None else str(folder))[0]
        assert place is not None
        write_shards(Path(place), {n: t for part in tensors.values() for n, t in part.items()}, self.runtime.control)

    def load_tensors(self, folder: Path, parameters: Mapping[str, Tensor], *, only: str = "") -> dict[str, Tensor]:
        """The shards of this rank: of what has a parameter's shape, laid out as the parameter; of the rest, all."""
        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in describe_tensors(folder, only).items():
            like = parameters.get(name.partition("/")[2])
            if like is not None and like.shape == shape and not name.startswith(_WHOLE):
                found[name] = torch.empty_like(like.detach(), dtype=dtype)
            else:
                found[name] = torch.empty(shape, dtype=dtype)
        read_shards(folder, found, self.runtime.control)
        for module in (m for root in self._roots for m in _modules(root) if isinstance(m, FSDPModule)):
            module.reshard()  # what was gathered for an earlier forward is stale once these are copied
        return found

    def full_tensors(self, model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Each tensor whole on rank 0, in the CPU's memory; the others send their rows."""
        held = model.state_dict(keep_vars=True)
        for name in (n for n in names if n in held):
            tensor = held[name].detach()
            if isinstance(tensor, DTensor):
                tensor = self._collect(tensor)
            if self.runtime.is_main:
                yield name, tensor.cpu()

    def _collect(self, tensor: DTensor) -> Tensor:
        """A sharded tensor, whole on rank 0; on the others an empty one."""
        shard, world = _local(tensor).to(self.runtime.device), self.runtime.world
        rows = -(-tensor.shape[0] // world)
        part = shard.new_zeros(rows, *tensor.shape[1:])
        part[: len(shard)] = shard
        parts = [torch.empty_like(part) for _ in range(world)] if self.runtime.is_main else None
        with peers():
            dist.gather(part, parts, dst=0)
        return part[:0] if parts is None else torch.cat(parts)[: tensor.shape[0]]

    def identity(self) -> dict[str, Any]:
        """The number of ranks and the order of sums."""
        order = "in rank order" if self.ordered else "as the backend does"
        return {"strategy": self.kind, "ranks": self.runtime.world, "sums": order}


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _modules(root: Any) -> Iterator[nn.Module]:
    return root.modules()


def _split_rows(full: Tensor, like: Tensor, world: int) -> list[Tensor]:
    """Equally many rows for each rank, filled up with zeros, on the device."""
    parts = []
    for rank in range(world):
        part = torch.zeros_like(like)
        rows = full[rank * len(like) : (rank + 1) * len(like)]
        part[: len(rows)] = rows
        parts.append(part)
    return parts


def _step_whole(optimizer: torch.optim.Adafactor) -> None:
    """A step of an optimizer that reads whole matrices: each rank takes it for one gathered parameter after the other, with
    the bits of one process, and keeps its rows. The state, which is small, is whole on every rank."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            with torch.no_grad():
                whole = nn.Parameter(parameter.full_tensor())
                whole.grad = parameter.grad.full_tensor()
            alone = torch.optim.Adafactor([{**group, "params": [whole]}])
            if optimizer.state.get(parameter):
                alone.state[whole] = optimizer.state[parameter]
            alone.step()
            optimizer.state[parameter] = alone.state[whole]
            shard = _local(parameter.detach())
            first = dist.get_rank() * -(-whole.shape[0] // dist.get_world_size())
            shard.copy_(whole.detach()[first : first + len(shard)])
