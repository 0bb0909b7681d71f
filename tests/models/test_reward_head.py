"""Reward models score alike in burnish and in plain transformers. S4-01, S4-02, S4-03, T-19, T-24."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from burnish.config.stages import RewardSettings
from burnish.config.train import LoraSettings
from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.errors import ConfigError
from burnish.models.export import export_model
from burnish.models.load import build_model, load_model, quiet
from burnish.models.policy import Policy
from burnish.models.reward_head import NEW_PAD
from tests.models.small import TEXT, VOCAB, build_groups, build_tokenizer, save_small, shake

END = "<|end|>"
TURN = "{% for m in messages %}{{ '<|turn|>' + m['content'] + '<|end|>' }}{% endfor %}"
# name → (tokenizer, rows of the embedding, how the padding token is found, the token)
TOKENIZERS: dict[str, tuple[Callable[[], Any], int, str, str]] = {
    "own": (lambda: build_tokenizer(), VOCAB, "own", "<pad>"),
    "end is pad, free rows": (
        lambda: build_tokenizer([END], bos=END, eos=END, pad=END),
        VOCAB,
        "new",
        NEW_PAD,
    ),
    "no pad, reserved tokens": (
        lambda: build_tokenizer(["<s>", END, "<|reserved_special_token_0|>"], eos=END, pad=None),
        VOCAB,
        "vocabulary",
        "<|reserved_special_token_0|>",
    ),
    "pad ends a turn": (
        lambda: build_tokenizer(["<s>", "<|turn|>", END, "<|fim_pad|>"], eos="<s>", bos=None, pad=END, template=TURN),
        VOCAB,
        "vocabulary",
        "<|fim_pad|>",
    ),
    "full vocabulary, a begin token": (lambda: build_tokenizer(["<s>", END], eos=END, pad=END), 0, "bos", "<s>"),
    "full vocabulary, one special token": (
        lambda: build_tokenizer([END], bos=END, eos=END, pad=END),
        0,
        "renamed",
        NEW_PAD,
    ),
}


def burnish_scores(model: Any, groups: list[Group], attention: str = "auto") -> torch.Tensor:
    with torch.no_grad():
        scores = Policy(model, head="score", attention=attention).eval()(
            build_packed_batch(groups), frozenset({"scores"})
        )
    assert scores.scores is not None
    return scores.scores


def plain_scores(model: Any, groups: list[Group], pad: int, side: str) -> torch.Tensor:
    """What a script without burnish computes: one padded batch, scores from `logits`."""
    rows = [[*g.prompt.tolist(), *c.ids.tolist()] for g in groups for c in g.completions]
    width = max(map(len, rows))
    fill = [[pad] * (width - len(r)) for r in rows]
    ids = torch.tensor([(f + r) if side == "left" else (r + f) for f, r in zip(fill, rows, strict=True)])
    ones = [[1] * len(r) for r in rows]
    zeros = [[0] * len(f) for f in fill]
    mask = torch.tensor([(z + o) if side == "left" else (o + z) for z, o in zip(zeros, ones, strict=True)])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].float()


@pytest.mark.parametrize("case", sorted(TOKENIZERS))
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_plain_transformers_scores_a_padded_batch_alike(case: str, lora: bool, tmp_path: Path) -> None:
    """S4-01, T-19: every completion ends in the end token, whatever the tokenizer pads with; padded left and right."""
    make, rows, how, token = TOKENIZERS[case]
    tokenizer = make()
    end = tokenizer.convert_tokens_to_ids(END if END in tokenizer.get_vocab() else "</s>")
    base = save_small(
        tmp_path / "base",
        tokenizer=tokenizer,
        vocab_size=rows or len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    settings = RewardSettings(lora=LoraSettings(r=2) if lora else None)
    built = build_model(settings, str(base), head="score", seed=0)
    pad = built.loaded.pad
    assert pad is not None and (pad.how, pad.token) == (how, token) and pad.id != end
    shake(built.trainable.values())
    final = tmp_path / "final"
    final.mkdir()
    export_model(built, final, tokenizer_source=base, head="score", extra={})
    groups = build_groups(5, last=end, low=5)
    ours = burnish_scores(built.model, groups)

    saved = AutoTokenizer.from_pretrained(final)
    assert saved.pad_token_id == pad.id and saved.pad_token == token
    for text in TEXT:
        assert saved(text).input_ids == tokenizer(text).input_ids
        assert saved.decode(saved(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    extra = {"num_labels": 1, "pad_token_id": saved.pad_token_id} if lora else {}
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(final, **extra).eval()
    assert plain.config.pad_token_id == pad.id
    for side in ("left", "right"):
        assert torch.allclose(plain_scores(plain, groups, saved.pad_token_id, side), ours, atol=2e-5), side


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "qwen3", "gemma2"])
def test_a_score_does_not_depend_on_its_batch(name: str, tmp_path: Path) -> None:
    """S4-02: alone, in a packed batch, in a padded batch: the same reward."""
    folder = str(save_small(tmp_path, name))
    model, other = (load_model(folder, head="score", dtype=torch.float32)[0] for _ in range(2))
    groups = build_groups(5, last=2)
    together = burnish_scores(model, groups)
    alone = torch.cat([burnish_scores(model, [g]) for g in groups])
    padded = burnish_scores(other, groups, "padded")
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(together, padded, atol=1e-5)
    assert together.std() > 0.01


@pytest.mark.parametrize("kind", [{}, {"lora": LoraSettings(r=2)}, {"top_k": 1}], ids=["full", "lora", "top_k"])
def test_head_is_saved_and_loaded_to_the_bit(kind: dict, tmp_path: Path) -> None:
    """S4-03, T-24."""
    base = save_small(tmp_path / "base", "qwen3", tokenizer=build_tokenizer())
    built = build_model(RewardSettings(**kind), str(base), head="score", seed=0)
    shake(built.trainable.values())
    (tmp_path / "final").mkdir()
    export_model(built, tmp_path / "final", tokenizer_source=base, head="score", extra={})
    loaded, source = load_model(
        str(tmp_path / "final"), head="score", dtype=torch.float32, seed=77, need_trained_head=True
    )
    assert not source.fresh_head
    assert torch.equal(loaded.score.weight, next(iter(built.trainable[n] for n in built.head_parameters)))  # pyright: ignore
    groups = build_groups(4)
    assert torch.allclose(burnish_scores(loaded, groups), burnish_scores(built.model, groups), atol=1e-5)


def test_new_head(tmp_path: Path) -> None:
    """S4-01: one output, no bias, N(0, std²) from the seed."""
    folder = str(save_small(tmp_path, hidden_size=2048, intermediate_size=16, num_hidden_layers=1, vocab_size=8))
    heads = [
        load_model(folder, head="score", dtype=torch.float32, seed=s, head_init_std=std)[0].score
        for s, std in ((0, 0.02), (0, 0.02), (1, 0.02), (0, 0.2))
    ]
    first = heads[0].weight.detach()
    assert first.shape == (1, 2048) and heads[0].bias is None
    assert abs(float(first.std()) - 0.02) < 0.002 and abs(float(first.mean())) < 0.002
    assert torch.equal(first, heads[1].weight) and not torch.equal(first, heads[2].weight)
    assert torch.allclose(heads[3].weight, 10 * first)


def test_architectures_without_the_class(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sequence-classification class for 'granite'") as e:
        build_model(RewardSettings(), str(save_small(tmp_path, "granite")), head="score", seed=0)
    assert "llama" in e.value.remedy and "qwen3" in e.value.remedy


def test_a_head_from_a_language_model_with_an_adapter(tmp_path: Path) -> None:
    """A reward stage that starts from a LoRA SFT stage: base, its adapter, and a new head."""
    from burnish.config.stages import SftSettings

    base = save_small(tmp_path / "base", tokenizer=build_tokenizer())
    sft = build_model(SftSettings(lora=LoraSettings(r=2)), str(base), head="lm", seed=0)
    shake(sft.trainable.values())
    (tmp_path / "sft").mkdir()
    export_model(sft, tmp_path / "sft", tokenizer_source=base, head="lm", extra={})
    built = build_model(RewardSettings(lora=LoraSettings(r=2)), str(tmp_path / "sft"), head="score", seed=0)
    assert built.loaded.fresh_head and built.loaded.merged
    shake(built.trainable.values(), seed=2)
    (tmp_path / "rm").mkdir()
    export_model(built, tmp_path / "rm", tokenizer_source=tmp_path / "sft", head="score", extra={})
    loaded = load_model(str(tmp_path / "rm"), head="score", dtype=torch.float32, need_trained_head=True)[0]
    groups = build_groups(4)
    assert torch.allclose(burnish_scores(loaded, groups), burnish_scores(built.model, groups), atol=1e-5)
