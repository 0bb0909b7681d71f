"""Tokenizers, files and settings for the tests of data."""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from burnish.config.stages import DpoSettings, RewardSettings, SftSettings
from burnish.data.tokenizer import TextTokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "The sky is blue and the sea is deep.",
    "User: hello there\n\nAssistant: hello to you",
    "\n\nHuman: how are you today?\n\nAssistant: I am well, thank you.",
    "Question: what is 2 + 2? Answer: it is 4. Question: who are you? Answer: a helper.",
] * 4


def byte_level(special: list[str], size: int = 420) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on a few sentences."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = [AddedToken(text, special=True, normalized=False) for text in special]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def write_tokenizer(folder: Path, made: Tokenizer, **config: Any) -> Path:
    """A model folder that holds only what a tokenizer needs."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@lru_cache
def chat_folder() -> str:
    """A tokenizer with a ChatML template, whose EOS ends a turn."""
    made = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder = write_tokenizer(Path(mkdtemp()), made, eos_token="<|im_end|>", chat_template=CHATML)
    return str(folder)


@lru_cache
def chat_tokenizer() -> TextTokenizer:
    """The tokenizer of `chat_folder`."""
    return TextTokenizer.load(chat_folder())


@lru_cache
def plain_tokenizer() -> TextTokenizer:
    """A tokenizer without a template, with EOS and without BOS."""
    made = byte_level(["<|endoftext|>"])
    return TextTokenizer.load(str(write_tokenizer(Path(mkdtemp()), made, eos_token="<|endoftext|>")))


@lru_cache
def bos_tokenizer() -> TextTokenizer:
    """A tokenizer that puts BOS before every text."""
    made = byte_level(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return TextTokenizer.load(str(write_tokenizer(Path(mkdtemp()), made, bos_token="<s>", eos_token="</s>")))


@lru_cache
def spaced_tokenizer() -> TextTokenizer:
    """A tokenizer that puts a space before every text (as SentencePiece ones do)."""
    made = byte_level(["</s>"])
    made.normalizer = normalizers.Prepend(" ")
    return TextTokenizer.load(str(write_tokenizer(Path(mkdtemp()), made, eos_token="</s>")))


def template_tokenizer(
    source: str, special: tuple[str, ...] = ("</s>",), eos: str = "</s>", **more: Any
) -> TextTokenizer:
    """A tokenizer with a template of the test's own."""
    made = byte_level(list(special))
    return TextTokenizer.load(str(write_tokenizer(Path(mkdtemp()), made, eos_token=eos, chat_template=source, **more)))


def write_lines(path: Path, rows: list[Any]) -> str:
    """A JSON Lines file; texts are written as they are. Compressed if the name ends in .gz."""
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return str(path)


def pair(n: int, **more: Any) -> dict[str, Any]:
    """A preference row."""
    return {"prompt": f"question {n}:", "chosen": f" good answer {n}", "rejected": f" bad answer {n}"} | more


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A row of messages: user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def sft(data: Any, **settings: Any) -> SftSettings:
    """Settings of an SFT stage."""
    return SftSettings(data=data, **settings)


def dpo(data: Any, **settings: Any) -> DpoSettings:
    """Settings of a DPO stage."""
    return DpoSettings(data=data, **settings)


def reward(data: Any, **settings: Any) -> RewardSettings:
    """Settings of a reward stage."""
    return RewardSettings(data=data, **settings)
