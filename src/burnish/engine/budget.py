"""Tokens in a micro-batch at most: as set, as the device's free memory allows, or less once memory ran out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.config.train import TrainSettings
from burnish.core.group import Group
from burnish.engine.memory import SHRINK
from burnish.engine.plan import StepPlan
from burnish.engine.runtime import Runtime
from burnish.engine.state import TrainState
from burnish.track.whereabouts import note_budget

log = logging.getLogger("burnish")

AUTO_BUDGET = {"cpu": 8192, "cuda": 32768}  # cuda: where a model's dimensions are not known
LEAST, MOST = 1024, 131072  # of a budget sized by free memory
SHARE = 0.75  # of the memory left for activations that they may take: the rest is for fragments, and for what is not counted
RESERVE = 3 << 29  # bytes: libraries' workspaces and the blocks of the head
_MOMENTS = {
    "adamw": 2.0,
    "adamw_8bit": 0.5,
    "adafactor": 0.1,
    "sgd": 0.0,
}  # size of the optimizer's state by that of parameters


def choose_budget(settings: TrainSettings, device: str) -> int:
    """Tokens in a micro-batch at most, before a model is loaded."""
    if settings.micro_batch_tokens != "auto":
        return int(settings.micro_batch_tokens)
    return AUTO_BUDGET.get(device, AUTO_BUDGET["cpu"])


def estimate_token_bytes(config: Any, item: int, *, checkpointing: bool) -> int:
    """Bytes that the activations of a training forward take for each token, from the dimensions of a transformer.

    A block of hidden size h keeps for its backward, under autocast: the residual stream and both norms with their inputs in
    fp32 (36 h bytes), queries, keys, values and attention's output before and after rotation (4 (q + 2 kv) items), and gate, up,
    activation and product of the feed-forward part (4 f items). With checkpointing one block keeps these, the others their
    input (4 h bytes). Counted by hand, not measured on a device.

    Args:
        config: The text model's configuration.
        item: Bytes of an item in the compute type.
    """
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    size = int(getattr(config, "head_dim", None) or -(-hidden // heads))
    stored = int(getattr(config, "num_key_value_heads", None) or heads)
    wide = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden)
    if experts := getattr(config, "num_experts_per_tok", None):
        wide = int(getattr(config, "moe_intermediate_size", None) or wide) * int(experts)
    block = 36 * hidden + item * 4 * (size * (heads + 2 * stored) + wide)
    return 8 * hidden + (4 * hidden * layers + block if checkpointing else block * layers)


def size_budget(free: int, token_bytes: int, to_come: int) -> int:
    """The largest power of two that fits, between `LEAST` and `MOST`: the same for small differences of free memory.

    Args:
        free: Free bytes of the device. token_bytes: See `estimate_token_bytes`.
        to_come: Bytes that gradients and moments will take.
    """
    fits = int(SHARE * (free - to_come - RESERVE)) // token_bytes
    return min(max(1 << max(fits, 1).bit_length() - 1, LEAST), MOST)


def find_smaller(plan: StepPlan, groups: Sequence[Group], budget: int) -> int | None:
    """A budget, halved as often as needed, under which the largest micro-batch of the step is cut; None if none can be."""
    cuttable = [
        micro.tokens
        for rank in plan.ranks
        for micro in rank
        if len(micro.parts) > 1 or any(len(part.slots or groups[part.position].completions) > 1 for part in micro.parts)
    ]
    if not cuttable:
        return None
    smaller = budget
    while smaller > SHRINK * max(cuttable) and smaller > 1:
        smaller //= 2
    return smaller if smaller < budget else None


class Budget:
    """The budget of a stage. What it found lies in the state's counters, so that a resumed run keeps it.

    Args:
        settings: Of the stage. state: Its counters are read and written.
    """

    def __init__(self, settings: TrainSettings, state: TrainState, runtime: Runtime) -> None:
        self._settings, self._state, self._runtime = settings, state, runtime

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch at most, as it holds now."""
        c = self._state.counters
        sized = c.auto_budget if self._settings.micro_batch_tokens == "auto" else 0
        base = sized or choose_budget(self._settings, self._runtime.device.type)
        return min(base, c.budget_limit) if c.budget_limit else base

    def size(self, models: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """On a CUDA device, with `micro_batch_tokens: auto`: size the budget by free memory, once in a run; ranks agree on the
        smallest. Called when all models are on the device, and before the first step."""
        c, device = self._state.counters, self._runtime.device
        if self._settings.micro_batch_tokens == "auto" and device.type == "cuda" and not c.auto_budget:
            c.auto_budget = min(self._runtime.gather(self._measure(models, parameters, device)))
            log.info("micro_batch_tokens: %d (auto: by the device's free memory)", c.auto_budget)
        note_budget(self.tokens)

    def _measure(self, models: Mapping[str, Any], parameters: Sequence[Tensor], device: torch.device) -> int:
        configs = [getattr(getattr(m, "inner", None), "config", None) for m in models.values()]
        dims = [config.get_text_config() for config in configs if config is not None]
        if len(dims) < len(configs):
            return AUTO_BUDGET["cuda"]
        compute = getattr(models["policy"], "compute_dtype", None) or torch.float32
        checkpointing = self._settings.gradient_checkpointing
        each = sum(estimate_token_bytes(d, compute.itemsize, checkpointing=checkpointing) for d in dims)
        trained = sum(p.numel() * p.element_size() for p in parameters)
        to_come = int(trained * (1 + _MOMENTS[self._settings.optim]))
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return size_budget(free, each, to_come)

    def lower(self, tokens: int) -> None:
        """Memory ran out: no more than `tokens` from here on."""
        if self._runtime.is_main:
            text = "out of memory with %d tokens in a micro-batch: going on with %d (the same gradient)"
            log.warning(text, self.tokens, tokens)
        self._state.counters.budget_limit = tokens
        note_budget(tokens)

    def forget(self, limit: int) -> None:
        """Smaller micro-batches did not help: the limit as it was before."""
        self._state.counters.budget_limit = limit
        note_budget(self.tokens)
