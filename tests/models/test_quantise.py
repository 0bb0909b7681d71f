"""Frozen bases in 4 and 8 bits: really so, right, the same in training and evaluation, and refused clearly. S2-13."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from burnish.config.data import DataSettings
from burnish.config.stages import DpoSettings, RewardSettings, SftSettings
from burnish.config.train import LoraSettings
from burnish.core.batch import build_packed_batch
from burnish.errors import ConfigError
from burnish.models.adapters import base_of
from burnish.models.bnb import freeze_linear, is_frozen, load_bitsandbytes, prepare_bitsandbytes
from burnish.models.export import export_model
from burnish.models.fingerprint import fingerprint_model
from burnish.models.load import BuiltModel, build_model, load_model
from burnish.models.policy import Policy
from burnish.models.quantise import Quantization, measure_footprint, read_quantization
from burnish.models.reference import build_reference, build_reference_key
from tests.models.small import build_groups, save_small, shake

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)  # (Dettmers et al., arXiv 2305.14314, appendix E)
WANT = frozenset({"logprobs"})


@pytest.fixture
def bits() -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'burnish[quant]'")


def build(folder: Path, kind: str = "nf4", *, head: str = "lm", settings: Any = None, **lora: Any) -> BuiltModel:
    made = settings or (SftSettings if head == "lm" else RewardSettings)(quantize=kind, lora=LoraSettings(**lora))  # pyright: ignore
    return build_model(made, str(folder), head=head, seed=0)  # pyright: ignore


def export(built: BuiltModel, folder: Path) -> Path:
    folder.mkdir()
    export_model(built, folder, tokenizer_source=None, head=built.head, extra={})
    return folder


def round_by_hand(weight: torch.Tensor, *, double: bool) -> torch.Tensor:
    """NF4 as the paper has it, in fp64: blocks of 64, the nearest of 16 values times the block's largest magnitude."""
    table = torch.tensor(NF4, dtype=torch.float64)
    flat = weight.double().reshape(-1)
    blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    places = ((blocks / scale)[:, :, None] - table).abs().argmin(-1)
    return (table[places] * scale).reshape(-1)[: len(flat)].reshape(weight.shape)


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("shape", [(64, 64), (32, 48), (64, 96), (160, 160), (43, 172), (7, 30), (5, 9)])
def test_nf4_is_nf4_for_every_shape(shape: tuple[int, int]) -> None:
    """Also where the inputs are no multiple of 64, which bitsandbytes' own CPU kernel reads wrongly (0.50.2)."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    plain, nested = (freeze_linear(linear, kind="nf4", double=d) for d in (False, True))
    wanted = round_by_hand(linear.weight.detach(), double=False)
    assert (plain.read(torch.float64) - wanted).abs().max() < 1e-7  # pyright: ignore
    spread = linear.weight.detach().abs().max()
    assert 0 < (nested.read(torch.float32) - wanted).abs().max() < 0.05 * spread  # pyright: ignore
    x = torch.randn(3, shape[1], requires_grad=True)
    y = nested(x)
    y.sum().backward()
    weight = nested.read(torch.float32)  # pyright: ignore
    assert torch.allclose(y, x @ weight.T + linear.bias, atol=1e-6)
    assert x.grad is not None and torch.allclose(x.grad, weight.sum(0).expand_as(x), atol=1e-5)


@pytest.mark.usefixtures("bits")
def test_what_is_read_back_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes the scale of another block is noticed when the weights are stored."""
    from burnish.models import bnb

    torch.manual_seed(0)
    linear = nn.Linear(96, 64)
    linear.weight.data[::2] *= 10
    whole = bnb._read_4bit
    monkeypatch.setattr(bnb, "_read_4bit", lambda b, w, dtype: whole(b, w, dtype).roll(1, 0))
    with pytest.raises(ConfigError, match="reads back other weights") as e:
        freeze_linear(linear, kind="nf4", double=True)
    assert "quantize: none" in e.value.remedy


@pytest.mark.usefixtures("bits")
def test_int8_has_a_scale_for_each_row() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(50, 20)
    linear.weight.data *= torch.logspace(-3, 1, 20)[:, None]
    frozen = freeze_linear(linear, kind="int8", double=False)
    gap = (frozen.read(torch.float32) - linear.weight).abs().amax(1)  # pyright: ignore
    assert frozen.weight.dtype == torch.int8
    assert bool((gap <= linear.weight.abs().amax(1) * 0.51 / 127 + 1e-6).all())


@pytest.mark.usefixtures("bits")
def test_s2_13_the_base_really_is_in_4_bits(tmp_path: Path) -> None:
    """S2-13: bytes of the loaded parameters: 4 bits and 8/64 + 32/(64·256) for scales; everything else as it was."""
    folder = save_small(
        tmp_path,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        tie_word_embeddings=False,
    )
    linear = 3 * (4 * 256 * 256 + 3 * 256 * 512)
    rest = 4 * (2 * 320 * 256 + 7 * 256)
    found = {}
    for kind, double in (("nf4", True), ("nf4", False), ("int8", True)):
        settings = SftSettings(quantize=kind, bnb_4bit_use_double_quant=double, lora=LoraSettings(r=4))  # pyright: ignore
        built = build(folder, settings=settings)
        frozen = [m for m in built.model.modules() if is_frozen(m)]
        assert len(frozen) == 3 * 7 and all(m.weight.element_size() == 1 for m in frozen)  # pyright: ignore
        print_ = measure_footprint(built.model)
        adapter = 4 * sum(p.numel() for p in built.trainable.values())
        assert print_.quantised == linear and print_.plain == 4 * linear + rest + adapter
        assert print_.bytes == pytest.approx(linear * print_.bits / 8 + rest + adapter, abs=1)
        found[kind, double] = print_.bits
        assert f"of {linear + rest // 4 + adapter // 4:,} parameters" in built.notes[-1]
    assert found["nf4", True] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.02)
    assert found["nf4", False] == pytest.approx(4.5, abs=0.005)
    assert found["int8", True] == pytest.approx(8 + 32 / 256, rel=0.02)
    plain = measure_footprint(build(folder, "none", r=4).model)
    assert plain.bits == 0 and plain.bytes == print_.plain


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_training_and_evaluation_see_the_same_base(kind: str, tmp_path: Path) -> None:
    """bitsandbytes' layers repack themselves at the first evaluation and pass no gradient afterwards; these do not."""
    built = build(save_small(tmp_path, "qwen3"), kind, r=4)
    shake(built.trainable.values(), 0.2)
    policy = Policy(built.model, head="lm")
    batch = build_packed_batch(build_groups(6))
    assert policy.backend == "sdpa"
    before = policy.train()(batch, WANT).logprobs
    with torch.no_grad():
        evaluated = policy.eval()(batch, WANT).logprobs
    after = policy.train()(batch, WANT).logprobs
    assert torch.equal(before, evaluated) and torch.equal(before, after)
    after.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in built.trainable.values())
    padded = Policy(built.model, head="lm", attention="padded").eval()
    with torch.no_grad():
        assert torch.allclose(padded(batch, WANT).logprobs, evaluated, atol=2e-5)


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_are_those_of_the_rounded_base(kind: str, tmp_path: Path) -> None:
    """Against the same model in full precision whose weights are the rounded ones."""
    folder = save_small(tmp_path)
    built, plain = build(folder, kind, r=4), build(folder, "none", r=4)
    for name, module in base_of(plain.model).named_modules():
        if isinstance(module, nn.Linear) and is_frozen(other := base_of(built.model).get_submodule(name)):
            module.weight.data = other.read(torch.float32)  # pyright: ignore
    batch = build_packed_batch(build_groups(6))
    for made in (built, plain):
        shake(made.trainable.values(), 0.2)
        Policy(made.model, head="lm")(batch, WANT).logprobs.sum().backward()
    for name, parameter in built.trainable.items():
        assert torch.allclose(parameter.grad, plain.trainable[name].grad, rtol=1e-4, atol=1e-4), name  # pyright: ignore


@pytest.mark.usefixtures("bits")
def test_bf16_computes_with_the_same_codes(tmp_path: Path) -> None:
    settings = SftSettings(quantize="nf4", lora=LoraSettings(r=4), gradient_checkpointing=True)
    built = build_model(settings, str(save_small(tmp_path)), head="lm", seed=0, compute_dtype=torch.bfloat16)
    wide = build(tmp_path, r=4)
    for one, two in zip(built.model.modules(), wide.model.modules(), strict=True):
        if is_frozen(one):
            assert torch.equal(one.weight.data, two.weight.data)  # pyright: ignore
    batch = build_packed_batch(build_groups(6))
    low = Policy(built.model, head="lm", compute_dtype=torch.bfloat16).train()(batch, WANT).logprobs
    high = Policy(wide.model, head="lm").train()(batch, WANT).logprobs
    low.sum().backward()
    assert (low - high).abs().mean() < 0.3
    assert all(p.grad is not None and p.dtype == torch.float32 for p in built.trainable.values())


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("mode", ["adapter", "copy"])
def test_the_reference_is_the_quantised_base(mode: Any, tmp_path: Path) -> None:
    """S1-09: at step 0 policy and reference agree; the reference stays when the adapter moves."""
    built = build(save_small(tmp_path), r=4)
    policy = Policy(built.model, head="lm").eval()
    batch = build_packed_batch(build_groups(6))
    reference = build_reference(policy, mode, fresh_adapter=True)
    with torch.no_grad():
        start = policy(batch, WANT).logprobs
    assert torch.equal(reference.logprobs(batch), start)
    shake(built.trainable.values(), 0.3)
    assert torch.allclose(reference.logprobs(batch), start, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(policy(batch, WANT).logprobs, start, atol=1e-2)


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize(
    ("head", "lora"), [("lm", {}), ("score", {}), ("lm", {"use_rslora": True}), ("lm", {"bias": "all"})]
)
def test_the_exported_adapter_gives_the_trained_model(head: str, lora: dict[str, Any], tmp_path: Path) -> None:
    """The folder says how its base was stored, and loading it so gives the model in training, bit for bit."""
    folder = save_small(tmp_path / "base", "qwen2")
    built = build(folder, head=head, r=4, **lora)
    shake(built.trainable.values(), 0.2)
    final = export(built, tmp_path / "final")
    stored = read_quantization(final)
    assert stored == Quantization("nf4", True)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig.from_dict(json.loads((final / "quantization_config.json").read_text()))
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    loaded, _ = load_model(str(final), head=head, dtype=torch.float32, quantization=stored, attach=True)  # pyright: ignore
    batch = build_packed_batch(build_groups(6))
    want = WANT if head == "lm" else frozenset({"scores"})
    outputs = [Policy(m, head=head).eval()(batch, want) for m in (built.model, loaded)]  # pyright: ignore
    first, second = ((o.logprobs if head == "lm" else o.scores) for o in outputs)
    assert torch.equal(first, second)


@pytest.mark.usefixtures("bits")
def test_a_second_stage_trains_on_base_and_adapter_exactly(tmp_path: Path) -> None:
    """S4-21 over a quantised base: Q(W) + A is what the stage receives, Q(W) + A + B what it leaves, as one adapter."""
    folder = save_small(tmp_path / "base")
    batch = build_packed_batch(build_groups(6))
    first = build(folder, r=4)
    shake(first.trainable.values(), 0.2)
    final = export(first, tmp_path / "sft")
    settings = DpoSettings(quantize="nf4", lora=LoraSettings(r=2, target_modules=["down_proj", "q_proj"]))
    second = build(final, settings=settings)
    received = [Policy(b.model, head="lm").eval()(batch, WANT).logprobs.detach() for b in (first, second)]
    assert torch.allclose(*received, atol=2e-5)
    shake(second.trainable.values(), 0.2, seed=3)
    last = export(second, tmp_path / "dpo")
    config = json.loads((last / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["base_model_name_or_path"] == str(folder)
    loaded, _ = load_model(str(last), head="lm", dtype=torch.float32, quantization=read_quantization(last), attach=True)
    trained = Policy(second.model, head="lm").eval()(batch, WANT).logprobs
    assert torch.allclose(Policy(loaded, head="lm").eval()(batch, WANT).logprobs, trained, atol=2e-5)
    assert not torch.allclose(trained, received[1], atol=0.05)


@pytest.mark.usefixtures("bits")
def test_storage_is_part_of_what_a_model_is(tmp_path: Path) -> None:
    """The fingerprint of a result and the key of cached reference log-probs change with it."""
    folder, keys, prints = save_small(tmp_path / "base"), [], []
    for kind in ("none", "nf4", "fp4", "int8"):
        built = build(folder, kind, r=2)
        prints.append(fingerprint_model(export(built, tmp_path / kind)))
        policy = Policy(built.model, head="lm")
        keys.append(
            build_reference_key(
                model="m", groups=build_groups(2), settings=DataSettings(), template=None, policy=policy
            )
        )
    assert [k["quantization"] for k in keys] == ["", "nf4+", "fp4+", "int8"]
    assert len(set(prints)) == 4


@pytest.mark.usefixtures("bits")
def test_an_adapter_that_cannot_lie_beneath_is_refused(tmp_path: Path) -> None:
    dora = export(build(save_small(tmp_path / "base"), "none", r=2, use_dora=True), tmp_path / "dora")
    with pytest.raises(ConfigError, match="no plain LoRA") as e:
        build(dora, r=2)
    assert "burnish merge" in e.value.remedy
    plain = export(build(tmp_path / "base", "none", r=2), tmp_path / "plain")
    with pytest.raises(ConfigError, match="cannot be written as one adapter"):
        build(plain, r=2, bias="lora_only")


@pytest.mark.usefixtures("bits")
def test_dora_needs_weights_that_bitsandbytes_reads(tmp_path: Path) -> None:
    """DoRA's norms come from bitsandbytes by way of PEFT: either they are right, or it is refused by name."""
    folder = save_small(tmp_path / "odd", hidden_size=96, intermediate_size=96, num_attention_heads=4, head_dim=24)
    from burnish.models.bnb import reads_alike

    frozen = freeze_linear(nn.Linear(96, 64), kind="nf4", double=True)
    if reads_alike(frozen):
        build(folder, r=2, use_dora=True)
    else:
        with pytest.raises(ConfigError, match="cannot give use_dora the weights of"):
            build(folder, r=2, use_dora=True)
    even = save_small(tmp_path / "even", hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16)
    built = build(even, r=2, use_dora=True)
    weight = base_of(built.model).model.layers[0].self_attn.q_proj.base_layer.read(torch.float32)
    norms = built.trainable["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight"]
    assert torch.allclose(norms, weight.norm(dim=1), rtol=1e-5)
    Policy(built.model, head="lm")(build_packed_batch(build_groups(2)), WANT).logprobs.sum().backward()


@pytest.mark.usefixtures("bits")
def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    """Acceptance 8: Conv1D layers, already quantised weights, nothing to quantise, no adapter: one clear message each."""
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel keeps its weights in Conv1D layers \(.*c_attn\)"):
        build(save_small(tmp_path / "gpt2", "gpt2"), r=2)
    done = save_small(tmp_path / "done")
    config = json.loads((done / "config.json").read_text())
    (done / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match="quantised and cannot be trained"):
        build(done, r=2)
    model, _ = load_model(str(save_small(tmp_path / "bare")), head="lm", dtype=torch.float32)
    model.model.layers = nn.ModuleList()
    from burnish.models.quantise import quantise_base

    with pytest.raises(ConfigError, match="has no linear layer beside its head"):
        quantise_base(model, Quantization("nf4"))


def test_missing_bitsandbytes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="quantize: nf4 needs bitsandbytes") as e:
        freeze_linear(nn.Linear(64, 64), kind="nf4", double=True)
    assert "burnish[quant]" in e.value.remedy
    prepare_bitsandbytes()


@pytest.mark.slow
@pytest.mark.usefixtures("bits")
def test_importing_it_says_and_fetches_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """R-10: it would fetch a kernel from the hub where the package `kernels` is installed."""
    import subprocess

    code = (
        "import sys, types\n"
        "trap = types.ModuleType('kernels'); trap.get_kernel = lambda *a, **k: sys.exit('fetched')\n"
        "sys.modules['kernels'] = trap\n"
        "from burnish.models.bnb import load_bitsandbytes\nload_bitsandbytes()\n"
        "assert sys.modules['kernels'] is trap"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.usefixtures("bits")
def test_storing_disturbs_no_random_state(tmp_path: Path) -> None:
    load_bitsandbytes()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    linear = nn.Linear(64, 64)
    torch.set_rng_state(before)
    freeze_linear(linear, kind="nf4", double=True)
    assert torch.equal(torch.get_rng_state(), before)
    frozen = copy.deepcopy(freeze_linear(linear, kind="nf4", double=True))
    x = torch.randn(2, 64)
    assert torch.equal(frozen(x), freeze_linear(linear, kind="nf4", double=True)(x))


def test_a_folder_that_speaks_unclearly_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_quantization(tmp_path) is None
    for text in ("{", "[]", '{"load_in_4bit": true, "bnb_4bit_quant_type": "q5"}', "{}"):
        (tmp_path / "quantization_config.json").write_text(text)
        with pytest.raises(ConfigError, match="does not say how the base"):
            read_quantization(tmp_path)


def test_g11_scales_of_8_bits_move_with_their_layer(bits: None) -> None:
    """The meta device stands for another one; nothing is read there."""
    layer: Any = freeze_linear(nn.Linear(64, 32), kind="int8", double=False)
    expected = layer(torch.ones(2, 64))
    layer.double()  # moves nothing, and does not touch the scales either
    assert torch.equal(layer(torch.ones(2, 64)), expected)
    layer._apply(lambda tensor: tensor.data.to("meta"))
    assert layer.weight.device.type == layer.weight.SCB.device.type == layer.weight.CB.device.type == "meta"
