"""The one call for every method: what packing must not change, dropout, empty batches, second models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from burnish.core import attention, varlen
from burnish.core.batch import build_packed_batch
from burnish.core.group import Completion, Group
from burnish.core.head import Functional
from burnish.errors import UsageError
from burnish.models.dropout import disable_dropout
from burnish.models.padded import build_padded_rows, compute_padded_hidden
from burnish.models.policy import Policy
from tests.core.plain_varlen import varlen_attn
from tests.models import packing

LOGPROBS = frozenset({"logprobs"})


def _logprobs(policy: Policy, groups: list[Group]) -> Tensor:
    with torch.no_grad():
        out = policy(build_packed_batch(groups), LOGPROBS).logprobs
    assert out is not None
    return out


def _split(groups: list[Group]) -> list[Group]:
    """Every completion with a prompt of its own."""
    return [Group(f"{g.id}/{i}", g.prompt, (c,)) for g in groups for i, c in enumerate(g.completions)]


@pytest.fixture
def policy() -> Policy:
    return Policy(packing.build_model("qwen3"), head="lm", attention="sdpa")


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mistral_window"])
def test_r22_changing_one_group_leaves_the_others_bit_equal(family: str, precision: torch.dtype | None) -> None:
    policy = Policy(packing.build_model(family), head="lm", attention="sdpa", compute_dtype=precision)
    groups = packing.draw_groups()
    before = _logprobs(policy, groups)
    for i, changed in enumerate(groups):
        other = packing.draw_group(
            np.random.default_rng(99), changed.id, len(changed.prompt), [len(c.ids) for c in changed.completions]
        )
        kept = tuple(Completion(o.ids, c.mask) for o, c in zip(other.completions, changed.completions, strict=True))
        after = _logprobs(policy, [*groups[:i], Group(changed.id, other.prompt, kept), *groups[i + 1 :]])
        batch = build_packed_batch(groups)
        mine = batch.table.completion_group[batch.table.token_completion] == i
        assert torch.equal(before[~mine], after[~mine])
        assert not torch.equal(before[mine], after[mine])


def test_r22_a_completion_does_not_see_its_sibling(policy: Policy) -> None:
    rng = np.random.default_rng(1)
    group = packing.draw_group(rng, "a", 5, [6, 7, 4])
    before = _logprobs(policy, [group])
    middle = packing.draw_group(rng, "a", 5, [7]).completions[0]
    changed = Group(
        "a",
        group.prompt,
        (group.completions[0], Completion(middle.ids, group.completions[1].mask), group.completions[2]),
    )
    after = _logprobs(policy, [changed])
    owner = build_packed_batch([group]).table.token_completion
    assert torch.equal(before[owner != 1], after[owner != 1]) and not torch.equal(before[owner == 1], after[owner == 1])


def test_r22_position_ids_restart_at_the_prompt() -> None:
    rng = np.random.default_rng(1)
    batch = build_packed_batch([packing.draw_group(rng, "a", 3, [2, 4]), packing.draw_group(rng, "b", 1, [2])])
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_oss"])
def test_r22_one_at_a_time_all_at_once_and_without_shared_prompts(family: str) -> None:
    policy = Policy(packing.build_model(family), head="lm", attention="sdpa")
    groups = packing.draw_groups(2)
    together = _logprobs(policy, groups)
    alone = torch.cat([_logprobs(policy, [g]) for g in groups])
    unshared = _logprobs(policy, _split(groups))
    assert (together - alone).abs().max() <= 2e-5
    assert (together - unshared).abs().max() <= 2e-5


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_r22_left_padded_equals_right_padded(family: str) -> None:
    policy = Policy(packing.build_model(family), head="lm", attention="padded")
    batch = packing.draw_batch(3)
    hidden = []
    with torch.no_grad():
        for side in ("left", "right"):
            rows = build_padded_rows(batch, side)
            hidden.append(compute_padded_hidden(policy.backbone, rows)[rows.source_row, rows.source_column])
    assert (hidden[0] - hidden[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "padded"])
def test_r22_masked_tokens_have_exactly_zero_gradient(attention: str) -> None:
    """Trailing unscored tokens, a wholly unscored completion, and a group in which nothing is scored."""
    policy = Policy(packing.build_model("qwen3"), head="lm", attention=attention)
    ids = iter(np.random.default_rng(0).permutation(np.arange(2, packing.VOCABULARY)).astype(np.int32))

    def take(n: int) -> np.ndarray:
        return np.array([next(ids) for _ in range(n)], np.int32)

    tail, silent, alone = take(3), take(4), take(5)
    scored = Completion(np.concatenate((take(3), tail)), np.array([1, 1, 1, 0, 0, 0], bool))
    groups = [
        Group("a", take(4), (scored, Completion(silent, np.zeros(4, bool)))),
        Group("b", alone[:2], (Completion(alone[2:], np.zeros(3, bool)),)),
    ]
    out = policy(build_packed_batch(groups), LOGPROBS).logprobs
    assert out is not None
    packing.weigh(out).backward()
    embedding = policy.inner.get_input_embeddings().weight.grad
    used = set(np.concatenate((tail, silent, alone)).tolist())
    assert all(not embedding[i].any() for i in used)
    assert all(embedding[int(i)].any() for i in groups[0].prompt)
    batch = build_packed_batch(groups)
    assert not set(batch.target_ids.tolist()) & used


def test_t29_the_packed_loss_is_the_unpacked_loss(policy: Policy) -> None:
    groups = packing.draw_groups(8)
    packed = _logprobs(policy, groups).mean()
    with torch.no_grad():
        unpacked = packing.run_separately(policy.inner, groups).mean()
    assert abs(float(packed - unpacked)) <= 1e-5


def test_t22_packed_computes_fewer_tokens_on_skewed_lengths() -> None:
    rng = np.random.default_rng(0)
    batch = build_packed_batch([packing.draw_group(rng, "a", 52, [4, 63]), packing.draw_group(rng, "b", 5, [2, 3])])
    padded = build_padded_rows(batch).input_ids
    assert padded.shape == (4, 115) and batch.layout.total == 52 + 4 + 63 + 5 + 2 + 3 < 0.3 * padded.numel()


# ---- dropout ------------------------------------------------------------------------------------------------------


def _with_dropout():
    from peft import LoraConfig, get_peft_model

    model = packing.build_model("qwen3", attention_dropout=0.5)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).train()


@pytest.mark.parametrize("attention", ["sdpa", "padded"])
def test_t25_all_dropout_is_found_and_switched_off(attention: str) -> None:
    policy = Policy(_with_dropout(), head="lm", attention=attention)
    groups = packing.draw_groups()
    assert not torch.equal(_logprobs(policy, groups), _logprobs(policy, groups))
    changed = disable_dropout(policy.model)
    assert any("self_attn.attention_dropout: 0.5 → 0" in line for line in changed)
    assert any("lora_dropout" in line for line in changed)
    assert any(
        line.startswith("base_model.model.config.attention_dropout") or "config.attention_dropout" in line
        for line in changed
    )
    assert torch.equal(_logprobs(policy, groups), _logprobs(policy, groups))
    assert disable_dropout(policy.model) == []


def test_t25_functional_attention_dropout_alone_is_honoured_while_training_only() -> None:
    policy = Policy(packing.build_model("gpt2", attn_pdrop=0.5), head="lm", attention="sdpa")
    groups = packing.draw_groups()
    assert not torch.equal(_logprobs(policy, groups), _logprobs(policy, groups))
    policy.eval()
    assert torch.equal(_logprobs(policy, groups), _logprobs(policy, groups))


# ---- empty batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "padded"])
@pytest.mark.parametrize(("head", "want"), [("lm", {"logprobs", "entropy"}), ("score", {"scores", "values"})])
def test_an_empty_batch_gives_zero_gradients_to_every_parameter(head, want, attention) -> None:
    policy = Policy(packing.build_model("qwen3", head=head), head=head, attention=attention)
    extra = [Functional("half", lambda logits, targets, against: logits[:, 0] / 2)] if head == "lm" else []
    out = policy(build_packed_batch([]), frozenset(want), functionals=extra).named()
    assert set(out) == want | {f"functionals.{f.name}" for f in extra}
    assert all(value.shape == (0,) for value in out.values())
    sum(value.sum() for value in out.values()).backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


# ---- outputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "padded"])
def test_entropy_temperature_and_functionals(attention: str) -> None:
    policy = Policy(packing.build_model("granite"), head="lm", attention=attention)
    assert not policy._own_head
    groups = packing.draw_groups()
    top = Functional("top", lambda logits, targets, against: logits.amax(-1))
    with torch.no_grad():
        out = policy(build_packed_batch(groups), frozenset({"entropy"}), temperature=0.5, functionals=[top])
    assert out.logprobs is None and out.entropy is not None
    expected, tops = [], []
    with policy.unpacked(), torch.no_grad():
        for g in groups:
            for c in g.completions:
                ids = torch.from_numpy(np.concatenate((g.prompt, c.ids)).astype(np.int64))[None]
                logits = policy.model(ids).logits[0, len(g.prompt) - 1 : -1][torch.from_numpy(c.mask)] / 0.5
                logp = torch.log_softmax(logits, -1)
                expected.append(-(logp.exp() * logp).sum(-1))
                tops.append(logits.amax(-1))
    assert (out.entropy - torch.cat(expected)).abs().max() <= 1e-5
    assert (out.functionals["top"] - torch.cat(tops)).abs().max() <= 1e-4


def test_values_are_read_where_tokens_are_predicted() -> None:
    policy = Policy(packing.build_model("qwen3", head="score"), head="score", attention="sdpa")
    batch = packing.draw_batch()
    out = policy(batch, frozenset({"values", "scores"}))
    assert out.values.shape == batch.target_ids.shape and out.scores.shape == batch.last_index.shape
    shifted = copy.copy(batch)
    shifted.last_index = batch.source_index[: len(batch.last_index)]
    moved = policy(shifted, frozenset({"scores"})).scores
    assert torch.allclose(moved, out.values[: len(moved)], atol=1e-6)


def test_exact_kl_against_a_second_policy_of_another_family(policy: Policy) -> None:
    def kl(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
        assert against is not None
        p, q = torch.log_softmax(logits, -1), torch.log_softmax(against, -1)
        return (p.exp() * (p - q)).sum(-1)

    functional = Functional("kl", kl, needs_against=True)
    batch = packing.draw_batch()
    same = policy(batch, LOGPROBS, against=copy.deepcopy(policy), functionals=[functional]).functionals["kl"]
    assert same.abs().max() <= 1e-6
    other = Policy(packing.build_model("gpt2", seed=4), head="lm", attention="sdpa")
    out = policy(batch, LOGPROBS, against=other, functionals=[functional]).functionals["kl"]
    assert out.min() > 0
    out.sum().backward()
    assert all(p.grad is None for p in other.parameters())
    stranger = Policy(packing.build_model("gpt2", vocab_size=120), head="lm", attention="sdpa")
    with pytest.raises(UsageError, match="vocabularies differ"):
        policy(batch, LOGPROBS, against=stranger, functionals=[functional])


def test_lora_on_the_head_is_honoured() -> None:
    from peft import LoraConfig, get_peft_model

    groups = packing.draw_groups()
    for fields in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = get_peft_model(
            packing.build_model("qwen3"), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **fields)
        )
        if "modules_to_save" in fields:
            with torch.no_grad():
                model.get_base_model().lm_head.weight.mul_(1.5)
        policy = Policy(model, head="lm", attention="sdpa")
        found = policy(build_packed_batch(groups), LOGPROBS).logprobs
        expected = packing.run_separately(policy.inner, groups)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        packing.weigh(found).backward()
        gradient = packing.take_gradients(model)
        packing.weigh(packing.run_separately(policy.inner, groups)).backward()
        assert packing.relative(gradient, packing.take_gradients(model)) <= 1e-5
        with torch.no_grad(), model.disable_adapter():
            bare = policy(build_packed_batch(groups), LOGPROBS).logprobs
            expected = packing.run_separately(policy.inner, groups)
        assert (bare - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (bare - found).abs().max() > 0.01


@pytest.mark.parametrize("attention", ["sdpa", "padded"])
def test_a_head_outside_the_table_is_the_models_own(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packing.build_model("qwen3")
    groups = packing.draw_groups()
    expected = packing.run_separately(model, groups)
    policy = Policy(model, head="lm", attention=attention)
    monkeypatch.setattr(policy, "_own_head", True)
    out = policy(build_packed_batch(groups), frozenset({"logprobs", "entropy"}))
    assert (out.logprobs - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_bf16_autocast_stays_near_fp32_and_keeps_fp32_masters(family: str) -> None:
    model = packing.build_model(family)
    batch = packing.draw_batch()
    exact = Policy(copy.deepcopy(model), head="lm", attention="sdpa")
    low = Policy(model, head="lm", attention="sdpa", compute_dtype=torch.bfloat16)
    outcomes = []
    for policy in (exact, low):
        out = policy(batch, LOGPROBS).logprobs
        assert out.dtype == torch.float32
        packing.weigh(out).backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in policy.parameters())
        outcomes.append((out.detach(), packing.take_gradients(policy.model)))
    assert (outcomes[0][0] - outcomes[1][0]).abs().max() < 0.25
    assert packing.relative(outcomes[1][1], outcomes[0][1]) < 0.1


def test_wrong_uses_are_named() -> None:
    model = packing.build_model("qwen3")
    with pytest.raises(UsageError, match="fast"):
        Policy(model, head="lm", attention="fast")
    with pytest.raises(UsageError, match="CUDA"):
        Policy(model, head="lm", attention="flex")
    with pytest.raises(UsageError, match="CUDA"):
        Policy(model, head="lm", attention="varlen", compute_dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="float32"):
        Policy(model, head="lm", attention="varlen")
    with pytest.raises(UsageError, match="scores"):
        Policy(model, head="lm")(packing.draw_batch(), frozenset({"scores"}))
    wide = packing.build_model("qwen3", head="score", num_labels=3)
    with pytest.raises(UsageError, match="3 numbers"):
        Policy(wide, head="score")(packing.draw_batch(), frozenset({"scores"}))


@pytest.mark.parametrize("family", ["qwen3", "mistral_window", "gemma3", "gpt2"])
def test_g05_varlen_equals_padded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models, windows among them, with torch's function replaced by its definition in float64."""
    calls = []
    monkeypatch.setattr(
        varlen, "find_varlen", lambda: lambda *args, **given: calls.append(1) or varlen_attn(*args, **given)
    )
    monkeypatch.setattr(attention, "explain_refusal", lambda *args: "")
    monkeypatch.setattr(Policy, "_explain_no_varlen", lambda self: "")
    monkeypatch.setattr("burnish.models.policy.fuse_blocks", lambda backbone: 0)
    outcomes = []
    for way in ("auto", "padded"):
        policy = Policy(packing.build_model(family).double().eval(), head="lm", attention=way)
        assert policy.backend == ("varlen" if way == "auto" else way)
        out = policy(packing.draw_batch(), LOGPROBS).logprobs
        assert out is not None
        packing.weigh(out).backward()
        outcomes.append((out.detach(), packing.take_gradients(policy.model)))
    assert len(calls) == policy.inner.config.num_hidden_layers
    assert (outcomes[0][0] - outcomes[1][0]).abs().max() <= 1e-7  # the library turns heads by angles in fp32
    assert packing.relative(outcomes[0][1], outcomes[1][1]) <= 1e-6


def test_unpacked_gives_the_ordinary_model_for_a_while(policy: Policy) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with policy.unpacked() as model, torch.no_grad():
        generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 3
    _logprobs(policy, packing.draw_groups())


def test_a_model_may_be_wrapped_again(policy: Policy) -> None:
    groups = packing.draw_groups()
    expected = _logprobs(policy, groups)
    padded = Policy(policy.model, head="lm", attention="padded")
    assert (_logprobs(padded, groups) - expected).abs().max() <= 1e-5
    again = Policy(policy.model, head="lm", attention="sdpa")
    assert torch.equal(_logprobs(again, groups), expected)


def test_an_argument_that_only_the_real_model_passes_falls_back(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    groups = packing.draw_groups()
    expected = _logprobs(policy, groups)
    attention = policy.inner.model.layers[0].self_attn
    original = attention.forward

    def forward(*args, **kwargs):
        if policy.backend == "sdpa":
            kwargs["position_bias"] = torch.ones(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    with caplog.at_level("INFO", logger="burnish"):
        found = _logprobs(policy, groups)
    assert policy.backend == "padded" and "position_bias" in policy.why_padded and policy.why_padded in caplog.text
    assert (found - expected).abs().max() <= 1e-5
