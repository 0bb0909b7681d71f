"""The reference model: the policy *as this stage received it*, and its log-probs.

Three ways, equal up to rounding: a frozen copy; the policy with its fresh adapter switched off; log-probs computed once
and cached on disk. Always without gradient, in evaluation mode, with every dropout off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from burnish.config.data import DataSettings
from burnish.core.batch import PackedBatch, build_packed_batch
from burnish.core.group import Group
from burnish.core.logits import HeadInput
from burnish.errors import ConfigError
from burnish.faults import fault_point
from burnish.models.adapters import ADAPTER, adapter_off, is_peft
from burnish.models.load import fetch_model_folder, load_model, load_tokenizer
from burnish.models.policy import Policy
from burnish.models.quantise import describe_storage, read_quantization
from burnish.models.stored import StoredNumbers, build_stored_key, plan_batches
from burnish.track.whereabouts import enter_phase

COLUMN = "ref_logprobs"
WANT = frozenset({"logprobs"})
Mode = Literal["copy", "adapter"]
# One array a completion: (n,) float32 over all its tokens, 0 where a token is not scored.
ReferenceTable = list[list[NDArray[np.float32]]]


class Reference:
    """A model whose log-probs the policy is compared with.

    Args:
        policy: "copy": a policy of its own, frozen. "adapter": the policy in training.
        mode: How `policy` becomes the reference.
    """

    def __init__(self, policy: Policy, mode: Mode) -> None:
        self.policy, self.mode = policy, mode

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """(S,) log-probs of the scored tokens, nats, fp32 at least, without gradient."""
        with self._as_reference():
            found = self.policy(batch, WANT).logprobs
        assert found is not None
        return found.detach()

    @torch.no_grad()
    def head_input(self, batch: PackedBatch) -> HeadInput:
        """Hidden states at the scored positions and the head that reads them: the second model of functionals."""
        with self._as_reference():
            found = self.policy.head_input(batch)
        module = found.module
        if self.mode == "copy" or module is None:
            return found

        def read(hidden: Tensor) -> Tensor:  # the head is read later, block by block: its adapter must be off then too
            with self._as_reference():
                return module(hidden)

        return replace(found, module=read)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        off = adapter_off(self.policy.model) if self.mode == "adapter" else nullcontext()
        with evaluating(self.policy), off:
            yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of the block; each module is back in its own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def build_reference(
    policy: Policy,
    mode: Mode,
    *,
    fresh_adapter: bool = False,
    path: str | None = None,
    policy_folder: Path | None = None,
    settings: Any = None,
    what: str = "reference",
) -> Reference:
    """The reference of a stage; called before its first step.

    Args:
        policy: The policy as the stage received it.
        mode: "copy" (memory of a second, frozen model) or "adapter" (none, but the adapter must be fresh).
        fresh_adapter: `BuiltModel.fresh_adapter`.
        path: Another model as reference (mode copy), as `resolve_model_path` gave it.
        policy_folder: Folder of the policy's tokenizer, compared with that of `path`.
        settings: The stage's settings; trust_remote_code is read.
        what: How messages call the other model: "reference" or "teacher", which is also its setting.

    Raises:
        ConfigError: The adapter's base is not what the stage received; or the vocabularies differ.
    """
    if mode == "adapter":
        _check_adapter_mode(policy, fresh_adapter, path)
        return Reference(policy, "adapter")
    if path is None:
        frozen = copy.deepcopy(policy)
    else:
        kept = next(p.dtype for p in policy.parameters() if p.is_floating_point())
        wide = torch.promote_types(kept, torch.float32)
        trust = bool(getattr(settings, "trust_remote_code", False))
        quantization = read_quantization(fetch_model_folder(path))
        model, source = load_model(
            path,
            head="lm",
            dtype=wide,
            trust_remote_code=trust,
            disable_dropout=True,
            quantization=quantization,
            attach=quantization is not None,
        )
        if policy_folder is not None:
            check_same_vocabulary(policy_folder, source.folder, what)
        if not policy.sharded:  # else rank 0 builds it, and it is laid over the ranks
            model.to(policy.device)  # pyright: ignore[reportArgumentType]
        frozen = Policy(
            model, head="lm", attention=policy.backend, compute_dtype=policy.compute_dtype, device=policy.device
        )
    frozen.requires_grad_(False)
    frozen.eval()
    _shrink(frozen)
    return Reference(frozen, "copy")


def _check_adapter_mode(policy: Policy, fresh: bool, path: str | None) -> None:
    def refuse(why: str) -> ConfigError:
        return ConfigError(f"reference_mode: adapter, but {why}", where="reference_mode", remedy="use cached or copy")

    if path is not None:
        raise refuse("the reference is another model")
    if not is_peft(policy.model):
        raise refuse("no adapter is trained")
    if not fresh:
        raise refuse("the adapter was trained before: with it off, the model is not the one this stage received")
    config: Any = policy.model.peft_config[ADAPTER]
    if config.bias != "none":
        raise refuse(f"lora.bias is {config.bias!r}: the base's own biases are trained and stay on")


def _shrink(policy: Policy) -> None:
    """Keep matrices that autocast would round anyway in the compute type: half the memory, the same bits."""
    dtype = policy.compute_dtype
    if dtype is None or dtype == torch.float32:
        return
    inner = policy.inner
    tops = {id(m.weight) for m in (inner.get_output_embeddings(), inner.get_input_embeddings()) if m is not None}
    for name, module in policy.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or "lora_" in name:
            continue
        weight: Tensor = module.weight
        if id(weight) not in tops and weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def check_same_vocabulary(policy: Path, other: Path, what: str = "reference") -> None:
    """The other model must call every token of the policy by the same id.

    Raises:
        ConfigError: Naming the first token for which that is not so.
    """
    ours, theirs = load_tokenizer(policy), load_tokenizer(other)
    if ours is None or theirs is None:
        return
    known = theirs.get_vocab()
    for token, i in sorted(ours.get_vocab().items(), key=lambda item: item[1]):
        if known.get(token) != i:
            raise ConfigError(
                f"the {what} has another vocabulary: token {token!r} is {i} here and {known.get(token)} there",
                where=what,
                found=str(other),
                remedy=f"use a {what} model with the policy's own tokenizer",
            )


def compute_start_gap(policy: Policy, reference: Reference, batch: PackedBatch) -> float:
    """The largest difference of a log-prob, nats, between policy and reference: 0, up to rounding, before any step."""
    with torch.no_grad(), evaluating(policy):
        ours = policy(batch, WANT).logprobs
    assert ours is not None
    return float((ours - reference.logprobs(batch)).abs().max()) if len(ours) else 0.0


def compute_reference_table(
    reference: Reference,
    groups: Sequence[Group],
    *,
    budget: int = 8192,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    forwards: int = 0,
) -> ReferenceTable:
    """The reference's log-probs of every completion.

    Args:
        budget: Tokens in one forward at most.
        forwards: Forwards at least, the further ones of nothing: a sharded model needs equally many on all ranks.
        on_batch: Called after each forward with (groups done, all groups).
    """
    table: ReferenceTable = [[] for _ in groups]
    done = 0
    for positions in plan_batches(groups, budget, forwards):
        batch = build_packed_batch([groups[i] for i in positions]).to(reference.device)
        enter_phase("reference", batch.input_ids.numel(), batch.last_index.numel())
        fault_point("reference.forward")
        values = reference.logprobs(batch).float().cpu().numpy()
        cursor = 0
        for i in positions:
            for completion in groups[i].completions:
                row = np.zeros(len(completion.ids), dtype=np.float32)
                row[completion.mask] = values[cursor : cursor + completion.scored]
                cursor += completion.scored
                table[i].append(row)
        done += len(positions)
        on_batch(done, len(groups))
    return table


def attach_table(groups: Sequence[Group], table: ReferenceTable) -> list[Group]:
    """The groups with `token_columns["ref_logprobs"]`."""
    out = []
    for group, rows in zip(groups, table, strict=True):
        completions = tuple(
            replace(c, token_columns={**c.token_columns, COLUMN: row})
            for c, row in zip(group.completions, rows, strict=True)
        )
        out.append(replace(group, completions=completions))
    return out


def build_reference_key(
    *, model: str, groups: Sequence[Group], settings: DataSettings, template: str | None, policy: Policy
) -> dict[str, Any]:
    """Everything that a cached log-prob depends on.

    Args:
        model: Fingerprint of the reference model.
        settings: Lengths and truncation.
        template: The chat template in use.
        policy: Its types, attention backend and device.
    """
    form = {
        "compute": str(policy.compute_dtype or torch.float32),
        "weights": sorted({str(p.dtype) for p in policy.parameters()}),
        "quantization": describe_storage(policy),
        "attention": policy.backend,
        "device": policy.device.type,
    }
    return build_stored_key(model=model, groups=groups, settings=settings, template=template, form=form)


@dataclass(frozen=True)
class ReferenceCache:
    """Reference log-probs on disk: the numbers of each completion are those of its scored tokens.

    Attributes:
        folder: Where the caches lie.
        key: See `build_reference_key`; any difference makes another cache.
    """

    folder: Path
    key: Mapping[str, Any]

    @property
    def store(self) -> StoredNumbers:
        return StoredNumbers(self.folder, self.key, "reference", "logprobs.npy", "reference log-probs")

    @property
    def path(self) -> Path:
        return self.store.path

    def load(self, groups: Sequence[Group]) -> ReferenceTable | None:
        """The table of exactly these groups; None if there is none or it is damaged (said aloud)."""
        found = self.store.load([c.scored for g in groups for c in g.completions])
        if found is None:
            return None
        rows = iter(found)
        table: ReferenceTable = []
        for group in groups:
            table.append([])
            for c in group.completions:
                row = np.zeros(len(c.ids), dtype=np.float32)
                row[c.mask] = next(rows)
                table[-1].append(row)
        return table

    def save(self, groups: Sequence[Group], table: ReferenceTable) -> None:
        """Write the table, replacing what is there."""
        pairs = [zip(g.completions, rows, strict=True) for g, rows in zip(groups, table, strict=True)]
        self.store.save([row[c.mask] for pair in pairs for c, row in pair])

    def attach(self, groups: Sequence[Group], compute: Callable[[], ReferenceTable]) -> list[Group]:
        """The groups with their reference log-probs: from the cache, else computed and stored."""
        table = self.load(groups)
        if table is None:
            table = compute()
            self.save(groups, table)
        return attach_table(groups, table)
