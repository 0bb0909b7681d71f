"""TrainState: everything that changes while a stage trains, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from burnish.errors import ResourceError


@dataclass
class Counters:
    """Numbers that move from step to step; JSON values only.

    Attributes:
        step: Optimizer steps attempted = position in the data.
        updates: Steps that changed the parameters = position in the schedule.
        bad_steps: Non-finite steps in a row.
        tokens: Tokens computed so far.
        ledger: Hash chain over the contents of all examples consumed.
        best_value, best_step: Of the best checkpoint's metric; None before the first evaluation.
        stale_evaluations: Evaluations since the best one.
        metrics_mark, timing_mark: Bytes of metrics.jsonl and timing.jsonl that belong to this state.
        overflows: fp16 overflows skipped by the loss scaler.
        auto_budget: Tokens in a micro-batch at most, as the device's free memory allowed at the start; 0: not sized.
        budget_limit: The same, found when memory ran out; 0: it did not.
    """

    step: int = 0
    updates: int = 0
    bad_steps: int = 0
    tokens: int = 0
    ledger: str = ""
    best_value: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0
    metrics_mark: int = 0
    timing_mark: int = 0
    overflows: int = 0
    auto_budget: int = 0
    budget_limit: int = 0


@dataclass
class TrainState:
    """All that changes while training. What is saved is all of it.

    Attributes:
        trainable: name → parameter, over all named trainable modules ("policy.…", "value.…").
        buffers: name → buffer of trainable modules that training changes (batch statistics); most models have none.
        optimizer: Its groups carry `names`.
        method: The method's own state (controllers, running moments); JSON values.
        counters: See `Counters`.
        scale: fp16 loss scale; None when not fp16.
        window: The committed window of samples in progress: first and last step, and key; None without one.
    """

    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    method: dict[str, Any]
    counters: Counters = field(default_factory=Counters)
    scale: float | None = None
    window: dict[str, Any] | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def to_tree(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(model tensors, optimizer tensors, JSON values): the whole state."""
        model = {f"parameter/{n}": p.detach() for n, p in self.trainable.items()}
        model |= {f"buffer/{n}": b for n, b in self.buffers.items()}
        moments, scalars = self._optimizer_tree()
        meta = {
            "counters": vars(self.counters).copy(),
            "method": self.method,
            "scale": self.scale,
            "window": self.window,
            "optimizer": scalars,
        }
        return model, moments, meta

    def load_tree(self, model: Mapping[str, Tensor], moments: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restore everything; missing or extra keys are errors.

        Raises:
            ResourceError: The tree does not fit this stage (another model, other trainable parts, another version).
        """
        current_model, _, current_meta = self.to_tree()
        _require_same("model tensors", current_model, model)
        _require_same("state", current_meta, meta)
        counters = {"auto_budget": 0, "budget_limit": 0, **meta["counters"]}  # absent in what older versions wrote
        _require_same("counters", current_meta["counters"], counters)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(model[f"parameter/{name}"])
            for name, buffer in self.buffers.items():
                buffer.copy_(model[f"buffer/{name}"])
        self.counters = Counters(**counters)
        self.method = dict(meta["method"])
        self.scale, self.window = meta["scale"], meta["window"]
        self._load_optimizer(moments, meta["optimizer"])

    def _optimizer_tree(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"{key}/{name}"] = value
                    elif value is not None:
                        scalars[f"{key}/{name}"] = value
        return tensors, scalars

    def _load_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        parameters: dict[str, nn.Parameter] = {}
        follows: set[str] = set()  # a fused or capturable optimizer reads its count of steps where the parameter lies
        for group in self.optimizer.param_groups:
            parameters |= dict(zip(group["names"], group["params"], strict=True))
            follows |= set(group["names"] if group.get("fused") or group.get("capturable") else ())
        self.optimizer.state.clear()
        for path, value in {**tensors, **scalars}.items():
            key, _, name = path.partition("/")
            if name not in parameters:
                raise ResourceError(
                    f"the checkpoint holds optimizer state for {name}, which this stage does not train",
                    remedy="resume with the settings it was made with, or start over with --fresh",
                )
            parameter = parameters[name]
            if isinstance(value, Tensor):
                moves = key != "step" or name in follows
                value = value.to(parameter.device if moves else "cpu", copy=True)
            self.optimizer.state[parameter][key] = value


def _require_same(what: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise ResourceError(
            f"the checkpoint's {what} do not fit this stage: missing {missing[:5]}, unexpected {extra[:5]}",
            remedy="resume with the settings and version it was made with, or start over with --fresh",
        )
