"""The reference is the policy as the stage received it, in three equal ways. S1-09, T-23, T-25, T-32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from burnish.config.stages import DpoSettings
from burnish.config.train import LoraSettings
from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.errors import ConfigError
from burnish.models.load import BuiltModel, build_model
from burnish.models.policy import Policy
from burnish.models.reference import (
    ReferenceCache,
    attach_table,
    build_reference,
    build_reference_key,
    check_same_vocabulary,
    compute_reference_table,
    compute_start_gap,
)
from burnish.models.stored import plan_batches
from tests.models.small import build_groups, build_tokenizer, save_small, shake

GROUPS = build_groups(8)
BATCH = build_packed_batch(GROUPS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("r") / "base", "qwen3", tokenizer=build_tokenizer())


def build(base: Path, compute: torch.dtype | None = None, **changes: Any) -> tuple[BuiltModel, Policy]:
    built = build_model(DpoSettings(**changes), str(base), head="lm", seed=0, compute_dtype=compute)
    return built, Policy(built.model, head="lm", compute_dtype=compute)


def _attach(cache: ReferenceCache, compute: Callable[[], Any]) -> list[Group]:
    table = cache.load(GROUPS)
    if table is None:
        table = compute()
        cache.save(GROUPS, table)
    return attach_table(GROUPS, table)


def test_three_ways_agree(base: Path, tmp_path: Path) -> None:
    """S1-09: copy, adapter switched off, cached: equal to 1e-5 in fp32 while the policy has moved away."""
    built, policy = build(base, lora=LoraSettings(r=4))
    copied = build_reference(policy, "copy")
    off = build_reference(policy, "adapter", fresh_adapter=built.fresh_adapter)
    cache = ReferenceCache(tmp_path, {"k": 1})
    attached = _attach(cache, lambda: compute_reference_table(copied, GROUPS, budget=40))
    shake(built.trainable.values(), 0.3)
    column = build_packed_batch(attached).table.token_columns["ref_logprobs"]
    values = copied.logprobs(BATCH)
    assert torch.allclose(off.logprobs(BATCH), values, atol=1e-5)
    assert torch.allclose(column, values, atol=1e-5)
    assert compute_start_gap(policy, off, BATCH) > 0.1
    whole = build(base)[1]
    assert torch.allclose(build_reference(whole, "copy").logprobs(BATCH), values, atol=1e-5)


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [{}, {"lora": LoraSettings(r=4)}, {"top_k": 1}], ids=["full", "lora", "top_k"])
def test_margin_is_zero_at_the_start(base: Path, compute: torch.dtype | None, kind: dict) -> None:
    """T-23: the reference is the weights given, not those on disk: M = 0 to the bit and the loss ln 2, in bf16 too."""
    built, policy = build(base, compute, **kind)
    with torch.no_grad():
        for parameter in built.model.parameters():  # an earlier stage in the same process
            parameter.mul_(1.1)
    reference = build_reference(policy, "copy")
    assert compute_start_gap(policy, reference, BATCH) == 0.0
    policy.train()
    ours = policy(BATCH, frozenset({"logprobs"})).logprobs
    assert ours is not None
    margins = BATCH.table.sum_tokens(ours - reference.logprobs(BATCH))
    margin = BATCH.table.slot(margins, 0) - BATCH.table.slot(margins, 1)
    loss = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-7)
    before = reference.logprobs(BATCH)
    shake(built.trainable.values())
    assert torch.equal(reference.logprobs(BATCH), before)


def test_reference_disturbs_nothing(base: Path) -> None:
    """T-25, T-26: evaluation mode and no dropout inside; afterwards the policy trains on as before."""
    folder_settings = DpoSettings(lora=LoraSettings(r=4, dropout=0.5), disable_dropout=False)
    built = build_model(folder_settings, str(base), head="lm", seed=0)
    policy = Policy(built.model, head="lm")
    reference = build_reference(policy, "adapter", fresh_adapter=True)
    policy.train()
    next(policy.inner.model.layers[0].children()).eval()  # one module in a mode of its own
    modes = {n: m.training for n, m in policy.named_modules()}
    flags = {n: p.requires_grad for n, p in policy.named_parameters()}
    state = torch.get_rng_state()
    first = reference.logprobs(BATCH)
    assert torch.equal(first, reference.logprobs(BATCH)) and not first.requires_grad
    assert {n: m.training for n, m in policy.named_modules()} == modes
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_adapter_mode_is_refused_where_it_would_be_wrong(base: Path) -> None:
    policy = build(base, lora=LoraSettings(r=4, bias="all"))[1]
    plain = build(base)[1]
    good = build(base, lora=LoraSettings(r=4))[1]
    for which, fresh, path, message in (
        (policy, True, None, "bias is 'all'"),
        (plain, True, None, "no adapter is trained"),
        (good, False, None, "was trained before"),
        (good, True, str(base), "another model"),
    ):
        with pytest.raises(ConfigError, match=message) as e:
            build_reference(which, "adapter", fresh_adapter=fresh, path=path)
        assert "cached or copy" in e.value.remedy


def test_another_model_as_reference(base: Path, tmp_path: Path) -> None:
    """Its own weights; every token must have the same id in both."""
    policy = build(base)[1]
    other = save_small(tmp_path / "other", "llama", seed=5, tokenizer=build_tokenizer(), attention_dropout=0.5)
    reference = build_reference(policy, "copy", path=str(other), policy_folder=base)
    assert compute_start_gap(policy, reference, BATCH) > 0.1
    alone = Policy(build_model(DpoSettings(), str(other), head="lm", seed=0).model, head="lm").eval()
    with torch.no_grad():
        wanted = alone(BATCH, frozenset({"logprobs"})).logprobs
    assert torch.equal(reference.logprobs(BATCH), wanted)  # pyright: ignore
    assert not any(p.requires_grad for p in reference.policy.parameters())
    strange = save_small(tmp_path / "strange", tokenizer=build_tokenizer(["<pad>", "<s>", "</s>"]))
    with pytest.raises(ConfigError, match=r"another vocabulary: token '<s>' is 0 here and 1 there"):
        build_reference(policy, "copy", path=str(strange), policy_folder=base)
    check_same_vocabulary(base, base)


def test_key_holds_every_input(base: Path, tmp_path: Path) -> None:
    """T-32: model, data, template, lengths, truncation, precision, attention: each makes another cache."""
    policy = build(base)[1]
    settings = DpoSettings()
    start: dict[str, Any] = {"model": "m", "groups": GROUPS, "settings": settings, "template": "t", "policy": policy}
    c = GROUPS[0].completions[0]
    flipped = c.mask.copy()
    flipped[0] = ~flipped[0]

    def with_first(**changes: Any) -> list:
        return [replace(GROUPS[0], completions=(replace(c, **changes), *GROUPS[0].completions[1:])), *GROUPS[1:]]

    changes: list[dict[str, Any]] = [
        {},
        {"model": "n"},
        {"template": "u"},
        {"groups": GROUPS[:-1]},
        {"groups": GROUPS[::-1]},
        {"groups": with_first(ids=c.ids + 1)},
        {"groups": with_first(mask=flipped)},
        {"groups": [replace(GROUPS[0], prompt=GROUPS[0].prompt + 1), *GROUPS[1:]]},
        {"settings": DpoSettings(max_length=64)},
        {"settings": DpoSettings(max_prompt_length=9)},
        {"settings": DpoSettings(max_completion_length=9)},
        {"settings": DpoSettings(truncation="keep_end")},
        {"policy": build(base, torch.bfloat16)[1]},
        {"policy": Policy(build_model(settings, str(base), head="lm", seed=0).model, head="lm", attention="padded")},
        {"policy": build(base, torch.bfloat16, lora=LoraSettings(r=2))[1]},
    ]
    paths = [ReferenceCache(tmp_path, build_reference_key(**(start | change))).path for change in changes]
    assert len(set(paths)) == len(paths)
    names = build_groups(8)
    renamed = [replace(g, id="other") for g in names]
    assert ReferenceCache(tmp_path, build_reference_key(**(start | {"groups": renamed}))).path == paths[0]


def test_cache_is_used_once_written_and_made_again_when_damaged(base: Path, tmp_path: Path, caplog: Any) -> None:
    reference = build_reference(build(base)[1], "copy")
    calls = []

    def compute() -> Any:
        calls.append(1)
        return compute_reference_table(reference, GROUPS)

    cache = ReferenceCache(tmp_path / "cache", {"model": "x", "max_length": None})
    first = _attach(cache, compute)
    again = _attach(cache, compute)
    assert len(calls) == 1

    def rows(groups: Any) -> list[np.ndarray]:
        return [c.token_columns["ref_logprobs"] for g in groups for c in g.completions]

    assert all((a == b).all() and a.dtype == np.float32 for a, b in zip(rows(first), rows(again), strict=True))
    for group in again:
        for c in group.completions:
            row = c.token_columns["ref_logprobs"]
            assert row.shape == c.ids.shape and (row[~c.mask] == 0).all() and (row[c.mask] < 0).all()
    for name in ("logprobs.npy", "counts.npy", "manifest.json"):
        file = cache.path / name
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(bytes(raw))
        before = len(calls)
        mended = _attach(cache, compute)
        assert len(calls) == before + 1 and "damaged" in caplog.text
        assert all((a == b).all() for a, b in zip(rows(first), rows(mended), strict=True))
        caplog.clear()
    assert cache.load(GROUPS[:-1]) is None


def test_batches_keep_the_budget() -> None:
    groups = build_groups(20, seed=3)
    plan = plan_batches(groups, 50)
    assert sorted(i for batch in plan for i in batch) == list(range(20))
    assert all(len(b) == 1 or sum(groups[i].tokens for i in b) <= 50 for b in plan)
    assert plan_batches(groups, 1) == [[i] for batch in plan_batches(groups, 1) for i in batch]
    assert plan_batches([], 50) == []
    assert attach_table([], []) == []


class _Made(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements of new fp32 tensors that are not smaller than a matrix."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.wide = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = func.overloadpacket.__name__ in ("clone", "_to_copy", "empty_like", "empty_strided")
        if copies and isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.numel() >= self.least:
            self.wide += out.numel()
        return out


def test_g08_a_copy_is_made_in_the_compute_type(base: Path) -> None:
    """No fp32 copy of a matrix exists for a moment; what is not trained is shared."""
    _, policy = build(base, torch.bfloat16)
    matrices = [m.weight for m in policy.modules() if isinstance(m, nn.Linear)]
    top = policy.inner.get_output_embeddings().weight
    inner = [w for w in matrices if w is not top]
    made = _Made(min(w.numel() for w in inner))
    with made:
        reference = build_reference(policy, "copy")
    assert made.wide <= top.numel()  # embedding and head keep their type
    copied = {n: m.weight for n, m in reference.policy.named_modules() if isinstance(m, nn.Linear)}
    assert {w.dtype for w in copied.values()} <= {torch.bfloat16, torch.float32}
    assert sum(w.dtype == torch.bfloat16 for w in copied.values()) == len(inner)
    assert not any(p.requires_grad for p in reference.policy.parameters())

    _, policy = build(base, torch.bfloat16, lora=LoraSettings(r=2))
    reference = build_reference(policy, "copy")
    theirs = dict(reference.policy.named_parameters())
    shared = [n for n, p in policy.named_parameters() if theirs[n] is p]
    assert shared and not any("lora_" in n for n in shared)
    assert all(not p.requires_grad for n, p in policy.named_parameters() if n in shared)
    assert all(p.requires_grad for n, p in policy.named_parameters() if n not in shared)
