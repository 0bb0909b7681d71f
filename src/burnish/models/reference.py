"""The reference model: the policy *as this stage received it*, and its log-probs.

Three ways, equal up to rounding: a frozen copy; the policy with its fresh adapter switched off; log-probs computed once
and cached on disk. Always without gradient, in evaluation mode, with every dropout off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
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
        frozen = _copy_in_compute_type(policy)
    else:
        frozen = _load_other(policy, path, policy_folder, settings, what)
    frozen.requires_grad_(False)
    frozen.eval()
    return Reference(frozen, "copy")


def _copy_in_compute_type(policy: Policy) -> Policy:
    """A copy of the policy that never holds its fp32 masters twice: matrices are copied straight into the compute type, and
    parameters that the stage does not train are shared.
    """
    narrow = {id(m.weight) for m in _find_rounded(policy.inner, policy.compute_dtype)}
    memo: dict[int, Any] = {}
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            memo[id(parameter)] = parameter
        elif id(parameter) in narrow:
            values = parameter.detach().to(policy.compute_dtype, copy=True)
            memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    return copy.deepcopy(policy, memo)


def _load_other(policy: Policy, path: str, policy_folder: Path | None, settings: Any, what: str) -> Policy:
    """Another model behind the policy's call; narrowed before it goes to the device."""
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
    for module in _find_rounded(model, policy.compute_dtype):
        module.weight.data = module.weight.data.to(policy.compute_dtype)
    if not policy.sharded:  # else rank 0 builds it, and it is laid over the ranks
        model.to(policy.device)  # pyright: ignore[reportArgumentType]
    return Policy(model, head="lm", attention=policy.backend, compute_dtype=policy.compute_dtype, device=policy.device)


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


def _find_rounded(model: Any, compute: torch.dtype | None) -> list[Any]:
    """Modules of a transformers model whose weight autocast rounds at each use: in the compute type it gives the same bits."""
    if compute is None or compute == torch.float32:
        return []
    tops = {id(m.weight) for m in (model.get_output_embeddings(), model.get_input_embeddings()) if m is not None}
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and "lora_" not in name
        and id(module.weight) not in tops
        and module.weight.is_floating_point()
    ]


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


class ReferenceCache(StoredNumbers):
    """Reference log-probs on disk: the numbers of each completion are those of its scored tokens."""

    kind, file, what = "reference", "logprobs.npy", "reference log-probs"

    def load(self, groups: Sequence[Group]) -> ReferenceTable | None:
        """The table of exactly these groups; None if there is none or it is damaged (said aloud)."""
        found = self.load_rows([c.scored for g in groups for c in g.completions])
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
        self.save_rows([row[c.mask] for pair in pairs for c, row in pair])
