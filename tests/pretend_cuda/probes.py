"""Small things tried on the pretended device, each in a child of the server; they return JSON values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from burnish.config.train import TrainSettings
from burnish.core.batch import Table
from burnish.engine.context import StepContext
from burnish.engine.optimizer import build_optimizer, build_parameter_groups
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.state import TrainState
from burnish.engine.step import compute_gradient
from tests.engine.tiny import build_groups, build_method, build_policy, trainable
from tests.pretend_cuda.device import Mixed, Waits

READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "by a mask": lambda x: x[x > 0],
    "set by a mask": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "equal": lambda x: torch.equal(x, x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: torch.unique(x),
    "copied from the host": lambda x: torch.ones(3).to("cuda"),
    "made from a list": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "indexed from the host": lambda x: x[torch.tensor([0, 2])],
}
QUIET = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "made on the device": lambda x: torch.zeros(3, device="cuda") + x,
    "copied through pinned memory": lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "indexed on the device": lambda x: x[torch.zeros(2, dtype=torch.int64, device="cuda")],
    "a number from the host": lambda x: x + torch.tensor(2.0),
}


def count_reads(waits: Waits) -> dict[str, int]:
    """How many waits each of `READS` and `QUIET` makes."""
    x, found = torch.ones(3, device="cuda"), {}
    for name, read in (READS | QUIET).items():
        before = waits.found.total()
        read(x)
        found[name] = waits.found.total() - before
    return found


def mix_devices(waits: Waits) -> list[str]:
    """What is said of operations that take tensors of both devices."""
    x, weight = torch.ones(3, device="cuda"), torch.nn.Parameter(torch.ones(3, device="cuda"))
    weight.grad = torch.ones(3, device="cuda")
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    optimizer.state[weight]["step"] = torch.tensor(1.0)  # where the CPU's own fused optimizer would have it

    def add() -> None:
        x + torch.ones(3)

    return [_mixing(add), _mixing(optimizer.step), _mixing(x.numpy)]


def leave_a_tensor_behind(waits: Waits) -> str:
    """A defect put in on purpose: a column of the table stays on the host; a training step must trip over it."""
    move = Table.to

    def forgetful(self: Table, device: Any) -> Table:
        return replace(move(self, device), token_completion=self.token_completion)

    Table.to = forgetful
    method, head, k, reference = build_method("sigmoid")
    policy = build_policy(head, dtype=torch.float32).to("cuda")
    groups = build_groups(4, k=k, reference=reference)
    parallel = build_parallel(Runtime(policy.device))
    ctx = StepContext({"policy": policy}, method, parallel, list(trainable(policy).values()), seed=0)
    return _mixing(lambda: compute_gradient(ctx, groups, build_plan(groups, budget=60), {}, 0))


def restore_moments(waits: Waits) -> dict[str, str]:
    """Where the state of fused AdamW lies after a restored checkpoint, by name; and whether it can step on."""
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    settings = TrainSettings(kind="sft")

    def build() -> TrainState:
        groups = build_parameter_groups({"policy.w": weight}, settings, no_decay=(), head=())
        return TrainState({"policy.w": weight}, build_optimizer(groups, settings), {})

    first, second = build(), build()
    weight.grad = torch.ones(3, device="cuda")
    first.optimizer.step()
    model, moments, meta = first.to_tree()
    second.load_tree({n: t.cpu() for n, t in model.items()}, {n: t.cpu() for n, t in moments.items()}, meta)
    second.optimizer.step()
    return {key: value.device.type for key, value in second.optimizer.state[weight].items()}


def _mixing(call: Any) -> str:
    try:
        call()
    except Mixed as error:
        return str(error)
    return "not noticed"
