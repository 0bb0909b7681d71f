"""Tiny subjects for the tests of the evaluation: a word-level tokenizer and random models, all in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from burnish.core.group import Completion, Group
from burnish.data.tokenizer import TextTokenizer
from burnish.evals.subjects import EvaluationData, Loaded, Prompt
from burnish.models.policy import Policy
from tests.losses.tiny import CONFIG, build_model

VOCAB = CONFIG["vocab_size"]


def build_tokenizer(path: str = "tiny", words: str = "w") -> TextTokenizer:
    """Id n is the word "w<n>", digits are the ids 80 … 89 and "####" is 90; 0 pads, 1 ends."""
    vocab = {f"{words}{i}": i for i in range(VOCAB)}
    vocab = {name: i for name, i in vocab.items() if i not in {0, 1, *range(80, 91)}}
    vocab |= {"<pad>": 0, "<eos>": 1, "####": 90, **{str(d): 80 + d for d in range(10)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(["<pad>", "<eos>"])
    return TextTokenizer(
        path=path,
        backend=backend,
        special_tokens={"eos_token": "<eos>", "pad_token": "<pad>"},
        bos_id=None,
        eos_id=1,
        eos_ids=frozenset({1}),
        vocab_size=VOCAB,
        chat_template=None,
        chat_templates={},
        model_max_length=128,
        adds_bos=False,
        fingerprint=words,
    )


class Shelf:
    """A loader over models in memory: the folder's name is "<kind>-<seed>"; counts how often each was loaded."""

    def __init__(self, budget: int = 64) -> None:
        self.budget, self.seen, self.tokenizer = budget, [], build_tokenizer()

    def __call__(self, folder: Path, head: str) -> Loaded:
        kind, seed = folder.name.split("-")
        assert (kind == "score") == (head == "score")
        self.seen.append(folder.name)
        policy = Policy(build_model(kind, int(seed)), head="score" if kind == "score" else "lm").eval()
        return Loaded(policy, self.tokenizer, 128, self.budget)


def build_groups(n: int, k: int, seed: int = 0) -> list[Group]:
    """n groups of k completions of 1 to 8 tokens that end in <eos>."""
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(n):
        completions = []
        for _ in range(k):
            ids = np.append(rng.integers(2, 80, int(rng.integers(0, 8))), 1).astype(np.int32)
            completions.append(Completion(ids, np.ones(len(ids), bool)))
        prompt = rng.integers(2, 80, int(rng.integers(1, 10))).astype(np.int32)
        groups.append(Group(f"row:{i}", prompt, tuple(completions), tags={"source": "ab"[i % 2]}))
    return groups


def build_data(n: int = 12, gold: str = "7") -> EvaluationData:
    """Texts, pairs, and prompts of one checkable set."""

    def prompts(name: str, tokenizer: TextTokenizer) -> list[Prompt]:
        rows = build_groups(n, 1, seed=7)
        return [Prompt(f"{name}:{i}", tuple(g.prompt.tolist()), f"prompt {i}", gold) for i, g in enumerate(rows)]

    return EvaluationData(lambda t: build_groups(n, 1), lambda t: build_groups(n, 2), prompts)


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """(V,) logits of the next token, without cache, padding or batch."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]
