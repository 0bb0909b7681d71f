"""The reference model: the policy *as this stage received it*, and its log-probs.

Three ways, equal up to rounding: a frozen copy; the policy with its fresh adapter switched off; log-probs computed once
and cached on disk. Always without gradient, in evaluation mode, with every dropout off.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from burnish.artifacts.folder import DamagedFolder, FolderWriter, NewerFormat, verify_folder
from burnish.config.data import DataSettings
from burnish.core.batch import PackedBatch, build_packed_batch
from burnish.core.group import Group
from burnish.core.logits import HeadInput
from burnish.disk import disk_error
from burnish.errors import ConfigError
from burnish.faults import fault_point
from burnish.models.adapters import ADAPTER, adapter_off, is_peft
from burnish.models.load import fetch_model_folder, load_model, load_tokenizer
from burnish.models.policy import Policy
from burnish.models.quantise import describe_storage, read_quantization
from burnish.track.whereabouts import enter_phase

log = logging.getLogger("burnish")

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
    policy: Policy, mode: Mode, *, fresh_adapter: bool = False, path: str | None = None,
    policy_folder: Path | None = None, settings: Any = None, what: str = "reference",
) -> Reference:  # fmt: skip
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
            path, head="lm", dtype=wide, trust_remote_code=trust, disable_dropout=True, quantization=quantization,
            attach=quantization is not None,
        )  # fmt: skip
        if policy_folder is not None:
            check_same_vocabulary(policy_folder, source.folder, what)
        model.to(policy.device)  # pyright: ignore[reportArgumentType]
        frozen = Policy(model, head="lm", attention=policy.backend, compute_dtype=policy.compute_dtype)
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
                where=what, found=str(other), remedy=f"use a {what} model with the policy's own tokenizer",
            )  # fmt: skip


def compute_start_gap(policy: Policy, reference: Reference, batch: PackedBatch) -> float:
    """The largest difference of a log-prob, nats, between policy and reference: 0, up to rounding, before any step."""
    with torch.no_grad(), evaluating(policy):
        ours = policy(batch, WANT).logprobs
    assert ours is not None
    return float((ours - reference.logprobs(batch)).abs().max()) if len(ours) else 0.0


def plan_batches(groups: Sequence[Group], budget: int) -> list[list[int]]:
    """Positions of the groups, longest first, in batches of at most `budget` tokens (a longer group is alone)."""
    order = sorted(range(len(groups)), key=lambda i: -groups[i].tokens)
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if not batches or groups[i].tokens > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= groups[i].tokens
    return batches


def compute_reference_table(
    reference: Reference, groups: Sequence[Group], *, budget: int = 8192,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> ReferenceTable:  # fmt: skip
    """The reference's log-probs of every completion.

    Args:
        budget: Tokens in one forward at most.
        on_batch: Called after each forward with (groups done, all groups).
    """
    table: ReferenceTable = [[] for _ in groups]
    done = 0
    for positions in plan_batches(groups, budget):
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


def fingerprint_groups(groups: Sequence[Group]) -> str:
    """SHA-256 of what a reference log-prob depends on: every prompt, completion and mask, in order."""
    total = hashlib.sha256(b"burnish groups 1\n")
    for group in groups:
        total.update(np.array([len(group.prompt), len(group.completions)], dtype=np.int64).tobytes())
        total.update(np.ascontiguousarray(group.prompt, dtype=np.int32).tobytes())
        for c in group.completions:
            total.update(np.array([len(c.ids)], dtype=np.int64).tobytes())
            total.update(np.ascontiguousarray(c.ids, dtype=np.int32).tobytes())
            total.update(np.ascontiguousarray(c.mask, dtype=np.bool_).tobytes())
    return total.hexdigest()


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
    return {
        "model": model,
        "data": fingerprint_groups(groups),
        "template": hashlib.sha256((template or "").encode()).hexdigest(),
        "max_length": settings.max_length,
        "max_prompt_length": settings.max_prompt_length,
        "max_completion_length": settings.max_completion_length,
        "truncation": settings.truncation,
        "compute": str(policy.compute_dtype or torch.float32),
        "weights": sorted({str(p.dtype) for p in policy.parameters()}),
        "quantization": describe_storage(policy),
        "attention": policy.backend,
        "device": policy.device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "format": 1,
    }


@dataclass(frozen=True)
class ReferenceCache:
    """Reference log-probs on disk: a sealed folder for each key, written at once or not at all.

    Attributes:
        folder: Where the caches lie.
        key: See `build_reference_key`; any difference makes another cache.
    """

    folder: Path
    key: Mapping[str, Any]

    @property
    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"reference-{digest[:24]}"

    def load(self, groups: Sequence[Group]) -> ReferenceTable | None:
        """The table of exactly these groups; None if there is none or it is damaged (said aloud)."""
        if not self.path.exists():
            return None
        try:
            meta = verify_folder(self.path).meta
            values = np.load(self.path / "logprobs.npy", allow_pickle=False)
            counts = np.load(self.path / "counts.npy", allow_pickle=False)
        except (DamagedFolder, NewerFormat, ValueError, OSError) as e:
            log.warning("the cached reference log-probs are damaged and are computed again: %s", str(e).splitlines()[0])
            return None
        flat = [c for g in groups for c in g.completions]
        if meta.get("key") != json.loads(json.dumps(self.key)) or counts.tolist() != [c.scored for c in flat]:
            log.warning("the cached reference log-probs in %s are not of these data and are computed again", self.path)
            return None
        rows = iter(np.split(values, np.cumsum(counts)[:-1]) if flat else [])
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
        flat = [row[c.mask] for pair in pairs for c, row in pair]
        values = np.concatenate(flat) if flat else np.zeros(0, dtype=np.float32)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise disk_error(exc, self.folder, doing="keep the reference's log-probs") from exc
        size = values.nbytes + 8 * len(flat)
        with FolderWriter(self.path, kind="reference", meta={"key": dict(self.key)}, expected=size) as writer:
            writer.write_bytes("logprobs.npy", _to_npy(values.astype(np.float32)))
            writer.write_bytes("counts.npy", _to_npy(np.array([len(r) for r in flat], dtype=np.int64)))

    def attach(self, groups: Sequence[Group], compute: Callable[[], ReferenceTable]) -> list[Group]:
        """The groups with their reference log-probs: from the cache, else computed and stored."""
        table = self.load(groups)
        if table is None:
            table = compute()
            self.save(groups, table)
        return attach_table(groups, table)


def _to_npy(values: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()
