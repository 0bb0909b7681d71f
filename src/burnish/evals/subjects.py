"""What is evaluated: models in folders, loaded one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from burnish.config.spec import Head
from burnish.config.stages import EvaluateSettings
from burnish.core.group import Group
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import UsageError

log = logging.getLogger("burnish")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to evaluate.

    Attributes:
        name: Its name in the figures: a stage's name, or "base".
        folder: Model folder.
        head: "lm": a language model; "score": a reward model.
        compare_to: Name of the subject that it is compared with item by item; None = with none.
        reference_folder: The model that its stage started from, against which implicit rewards are measured, with its
            base stored in as few bits as that of `folder`.
    """

    name: str
    folder: Path
    head: Head = "lm"
    compare_to: str | None = None
    reference_folder: Path | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt whose answer is generated.

    Attributes:
        id: Stable name of the row.
        ids: Token ids, the opening of the assistant's turn included.
        text: What a person reads as the prompt.
        reference: The gold answer, or "".
        source: Name of the source of the row.
    """

    id: str
    ids: Sequence[int]
    text: str = ""
    reference: str = ""
    source: str = ""


@dataclass(frozen=True)
class EvaluationData:
    """Where the items come from; each function gets the tokenizer of the model that will read them.

    Attributes:
        texts: Held-out groups of one completion, for the task `loss`.
        pairs: Held-out pairs (slot 0 chosen, slot 1 rejected), for `preferences` and the prompts of `win_rate`.
        prompts: (name of a checkable set, tokenizer) → prompts with gold answers.
    """

    texts: Callable[[TextTokenizer], Sequence[Group]] | None = None
    pairs: Callable[[TextTokenizer], Sequence[Group]] | None = None
    prompts: Callable[[str, TextTokenizer], Sequence[Prompt]] | None = None


@dataclass
class Loaded:
    """A subject's model in memory."""

    policy: Any
    tokenizer: TextTokenizer
    context: int | None
    budget: int
    notes: list[str] = field(default_factory=list)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: every end-of-sequence token, and the one that begins a new text."""
        bos = self.tokenizer.bos_id
        return self.tokenizer.eos_ids | ({bos} if bos is not None else set())

    def autocast(self) -> AbstractContextManager[Any]:
        """The type that the policy computes in, for plain calls of its model."""
        dtype = self.policy.compute_dtype
        if dtype is None or dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.policy.device.type, dtype=dtype)


class Loader(Protocol):
    """(folder, head) → Loaded. `like`: an adapter's folder; the base is stored in as few bits as under that adapter."""

    def __call__(self, folder: Path, head: Head, /, *, like: Path | None = None) -> Loaded: ...


BUDGET = {"cpu": 4096, "cuda": 32768}  # tokens forwarded together


def build_loader(settings: EvaluateSettings, device: torch.device) -> Loader:
    """A function (folder, head) → Loaded with the precision and attention of the settings."""

    def load(folder: Path, head: Head, /, *, like: Path | None = None) -> Loaded:
        from burnish.models.folder import read_hidden_size
        from burnish.models.frozen import load_frozen
        from burnish.models.precision import resolve_precision
        from burnish.models.quantise import read_quantization

        precision = resolve_precision(settings.precision, device, read_hidden_size(folder), training=False)
        quantization = read_quantization(like or folder)
        policy = load_frozen(
            folder,
            head=head,
            precision=precision,
            device=device,
            attention=settings.attention,
            quantization=quantization,
        )
        tokenizer = TextTokenizer.load(str(folder))
        config = policy.inner.config.get_text_config()
        limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
        context = min((int(n) for n in limits if n), default=None)
        stored = f", base in {quantization}" if quantization else ""
        log.info("evaluating %s: %s%s", folder, precision.why, stored)
        return Loaded(policy, tokenizer, context, BUDGET.get(device.type, 8192))

    return load


@contextmanager
def loaded(load: Loader, folder: Path, head: Head, *, like: Path | None = None) -> Iterator[Loaded]:
    """A model for the time of a block; its memory is given back behind it."""
    found = load(folder, head) if like is None else load(folder, head, like=like)
    try:
        yield found
    finally:
        found.policy = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_subjects(subjects: Sequence[Subject]) -> None:
    """Names are unique and comparisons name subjects.

    Raises:
        UsageError: They are not, or do not.
    """
    names = [s.name for s in subjects]
    if len(set(names)) != len(names):
        raise UsageError(
            f"two subjects of an evaluation have one name: {', '.join(names)}", remedy="give stages different names"
        )
    for s in subjects:
        if s.compare_to is not None and s.compare_to not in names:
            raise UsageError(
                f"{s.name} is to be compared with {s.compare_to}, which is not evaluated",
                remedy=f"add {s.compare_to} to `of`",
            )
