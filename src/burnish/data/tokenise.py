"""Examples to groups: render, tokenise in batches, mask, apply the length rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from burnish.config.data import TrainOn
from burnish.core.group import Completion, Group
from burnish.data.example import Example, name_answers, refuse_identical
from burnish.data.lengths import Draft, Limits, Tokens, fit_lengths
from burnish.data.problems import SKIP_REMEDY, ProblemLog, RowError
from burnish.data.report import SplitReport
from burnish.data.template import ChatTemplate, Segment
from burnish.data.tokenizer import TextTokenizer

BATCH = 256
WINDOW = 64


@dataclass(frozen=True)
class Encoding:
    """How texts become ids.

    Attributes:
        tokenizer: The tokenizer.
        template: The chat template.
        limits: The length rules.
        train_on: Which tokens a single completion trains on.
        add_eos: Plain texts end in EOS.
        drop_identical: Pairs of equal answers are left out instead of refused.
        labelled: A pair becomes a row with the label 1 and one with the label 0.
    """

    tokenizer: TextTokenizer
    template: ChatTemplate
    limits: Limits
    train_on: TrainOn = "auto"
    add_eos: bool = True
    drop_identical: bool = False
    labelled: bool = False

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that may end an answer."""
        return self.template.end_ids


@dataclass(slots=True)
class _Piece:
    """A rendered example: texts that wait for the tokenizer."""

    example: Example
    prompt: str
    completions: list[Sequence[Segment]]
    plain: bool
    turn: int | None = None
    everything: bool = False


def encode_examples(
    examples: Sequence[Example], encoding: Encoding, log: ProblemLog, report: SplitReport
) -> list[Group]:
    """Groups of the examples, in their order; what is left out goes to the log and the report."""
    groups: list[Group] = []
    names: set[str] = set()
    with log.counting(report.refuse):
        for start in range(0, len(examples), BATCH):
            chunk = examples[start : start + BATCH]
            for example, turns in _drafts(chunk, encoding, log, report):
                made = [_finish(example, turn, draft, encoding, log, report) for turn, draft in turns]
                kept = [group for group in made if group is not None]
                if encoding.labelled:
                    kept = [row for group in kept for row in label_answers(group)]
                report.kept += bool(kept)
                for group in kept:
                    groups.append(_unique(group, names))
    for group in groups:
        report.prompt_tokens += len(group.prompt)
        report.completion_tokens += sum(len(c.ids) for c in group.completions)
        report.scored_tokens += sum(c.scored for c in group.completions)
        source = group.tags.get("source", "")
        report.sources[source] = report.sources.get(source, 0) + 1
    report.groups = len(groups)
    return groups


def label_answers(group: Group) -> list[Group]:
    """A pair as two rows with labels; a row that has a label of its own stays one."""
    if len(group.completions) == 1:
        return [replace(group, columns={"label": group.columns["label"]})]
    return [
        replace(group, id=f"{group.id}#{side}", completions=(completion,), columns={"label": label})
        for side, label, completion in zip(("chosen", "rejected"), (1.0, 0.0), group.completions, strict=True)
    ]


def _unique(group: Group, names: set[str]) -> Group:
    name, n = group.id, 1
    while name in names:
        n += 1
        name = f"{group.id}~{n}"
    names.add(name)
    return group if name == group.id else Group(name, group.prompt, group.completions, group.columns, group.tags)


# ------------------------------------------------------------------------------------------------------- rendering


def _render(example: Example, encoding: Encoding) -> list[_Piece]:
    """The texts of an example.

    Raises:
        RowError: The template refuses it.
    """
    single = len(example.completions) == 1
    mode = encoding.train_on if single else "auto"
    if example.form == "text":
        if mode in ("assistant", "last"):
            raise RowError(
                f"plain text has no assistant turns, which train_on: {mode} asks for",
                kind="train_on",
                field="text",
                remedy="set train_on: auto",
            )
        return [_Piece(example, "", [(Segment(example.completions[0], True),)], plain=True, everything=True)]
    if example.form == "plain":
        texts: list[Sequence[Segment]] = [(Segment(text, True),) for text in example.completions]
        return [_Piece(example, example.prompt, texts, plain=True, everything=mode == "all")]
    if example.form == "hh":
        return [_render_dialogue(example, mode)]
    return _render_chat(example, encoding, mode)


def _render_dialogue(example: Example, mode: TrainOn) -> _Piece:
    prompt, completions = example.prompt, list(example.completions)
    if mode == "last" and len(completions) == 1:
        segments = completions[0]
        last = max(i for i, s in enumerate(segments) if s.scored)
        prompt += "".join(s.text for s in segments[:last])
        completions = [segments[last:]]
    return _Piece(example, prompt, completions, plain=True, everything=mode == "all")


def _render_chat(example: Example, encoding: Encoding, mode: TrainOn) -> list[_Piece]:
    template, plain = encoding.template, encoding.template.is_default
    prompt, completions = example.prompt, example.completions
    if mode in ("assistant", "last") and len(completions) == 1:
        messages = prompt + completions[0]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        cut = turns[0] if mode == "assistant" else turns[-1]
        prompt, completions = messages[:cut], [messages[cut:]]
    if mode == "all":
        text = template.render(prompt + completions[0], tools=example.tools)
        return [_Piece(example, "", [(Segment(text, True),)], plain=plain, everything=True)]
    rendered = template.split(prompt, completions, tools=example.tools)
    if all(len(turns) == 1 for turns in rendered):
        firsts = [turns[0] for turns in rendered]
        if len({r.prompt for r in firsts}) == 1:
            return [_Piece(example, firsts[0].prompt, [r.completion for r in firsts], plain, firsts[0].turn)]
    if len(rendered) == 1:
        return [_Piece(example, r.prompt, [r.completion], plain, r.turn) for r in rendered[0]]
    raise RowError(
        "the chat template renders these answers so that they share no prompt",
        kind="template",
        field="chosen",
        remedy="give answers of one assistant message each, or set chat_template",
    )


# ------------------------------------------------------------------------------------------------------ tokenising


def _drafts(
    examples: Sequence[Example], encoding: Encoding, log: ProblemLog, report: SplitReport
) -> Iterator[tuple[Example, list[tuple[int | None, Draft]]]]:
    """Tokenised examples with their drafts (several when each assistant turn is one)."""
    waiting: list[tuple[Example, list[_Piece]]] = []
    for example in examples:
        try:
            waiting.append((example, [] if example.form == "ids" else _render(example, encoding)))
            if example.form == "chat" and _spells_special(example, encoding):
                report.spelled.add(example.place)
        except RowError as error:
            log.add(error.at(example.file, example.line))
    drafts = iter(_encode([piece for _, pieces in waiting for piece in pieces], encoding, report))
    for example, pieces in waiting:
        if example.form == "ids":
            draft = _from_ids(example, encoding, log)
            if draft is not None:
                yield example, [(None, draft)]
            continue
        made = [(piece.turn, next(drafts)) for piece in pieces]
        if len(made) > 1:
            report.own_turns.add(example.place)
        yield example, made


def _spells_special(example: Example, encoding: Encoding) -> bool:
    return any(encoding.template.spells_special(messages) for messages in (example.prompt, *example.completions))


def _from_ids(example: Example, encoding: Encoding, log: ProblemLog) -> Draft | None:
    size = encoding.tokenizer.vocab_size
    worst = max(max(ids, default=0) for ids in (example.prompt, *(c.ids for c in example.completions)))
    if worst >= size:
        error = RowError(
            f"token id {worst} is not in the vocabulary of {size}",
            kind="token id",
            field="input_ids",
            remedy="tokenise the data with this model's tokenizer",
        )
        log.add(error.at(example.file, example.line))
        return None
    completions = list(example.completions)
    bos = encoding.tokenizer.bos_id
    return Draft(example.prompt, completions, len(completions) == 1, bos is not None and example.prompt[0] == bos)


class _Texts:
    """The texts of a batch, each different one once."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._specials = tuple(tokenizer.special_texts)
        self._index: dict[tuple[str, bool], int] = {}
        self._ids: list[list[int]] = []

    def ask(self, text: str, before: str = "") -> int:
        """Note a text that follows `before`; returns where its ids will be."""
        goes_on = bool(before) and not (self._specials and before.endswith(self._specials))
        return self._index.setdefault((text, goes_on), len(self._index))

    def encode(self) -> None:
        """Tokenise all of them."""
        texts, continues = [text for text, _ in self._index], [goes_on for _, goes_on in self._index]
        self._ids = self._tokenizer.encode_many(texts, continues=continues) if texts else []

    def __getitem__(self, index: int) -> list[int]:
        return self._ids[index]


def _encode(pieces: Sequence[_Piece], encoding: Encoding, report: SplitReport) -> list[Draft]:
    """Ids of rendered pieces: prompt and segments each on its own, as a model that samples would meet them.

    Each border is compared with the ids of the joined text around it, and rows where they differ are counted.
    """
    texts = _Texts(encoding.tokenizer)
    plan = []
    for piece in pieces:
        head = texts.ask(piece.prompt) if piece.prompt else None
        parts, borders = [], []
        for segments in piece.completions:
            before, indices = piece.prompt, []
            for segment in segments:
                indices.append(texts.ask(segment.text, before))
                if before:
                    left, right = before[-WINDOW:], segment.text[:WINDOW]
                    borders.append((texts.ask(left), texts.ask(right, left), texts.ask(left + right)))
                before = segment.text
            parts.append(indices)
        plan.append((head, parts, borders))
    texts.encode()
    drafts = []
    for piece, (head, parts, borders) in zip(pieces, plan):
        prompt = list(texts[head]) if head is not None else []
        completions = []
        for segments, indices in zip(piece.completions, parts):
            ids, mask = [], []
            for segment, index in zip(segments, indices):
                ids += texts[index]
                mask += [segment.scored] * len(texts[index])
            completions.append(Tokens(ids, mask))
        if any(texts[whole] != texts[left] + texts[right] for left, right, whole in borders):
            report.apart.add(piece.example.place)
        drafts.append(_draft(piece, prompt, completions, encoding))
    return drafts


def _draft(piece: _Piece, prompt: list[int], completions: list[Tokens], encoding: Encoding) -> Draft:
    """Add BOS and EOS where they belong, and make the prompt hold at least one token."""
    tokenizer = encoding.tokenizer
    sequence = piece.example.conversation or piece.everything
    if piece.plain:
        if tokenizer.adds_bos and tokenizer.bos_id is not None:
            first = prompt or completions[0].ids
            if first[:1] != [tokenizer.bos_id]:
                prompt = [tokenizer.bos_id, *prompt]
        own_end = piece.example.form == "chat"
        if encoding.add_eos and not own_end and tokenizer.eos_id is not None:
            for tokens in completions:
                if tokens.ids and tokens.ids[-1] not in encoding.end_ids:
                    tokens.ids.append(tokenizer.eos_id)
                    tokens.mask.append(True)
    if piece.everything:
        ids = prompt + completions[0].ids
        prompt, completions = ids[:1], [Tokens(ids[1:], [True] * (len(ids) - 1))]
    has_bos = tokenizer.bos_id is not None and prompt[:1] == [tokenizer.bos_id]
    return Draft(prompt, completions, sequence, has_bos)


# ---------------------------------------------------------------------------------------------------------- groups


def _finish(
    example: Example, turn: int | None, draft: Draft, encoding: Encoding, log: ProblemLog, report: SplitReport
) -> Group | None:
    """The group of a draft after all rules, or None."""
    place = example.place if turn is None else f"{example.place}#{turn + 1}"
    for name, tokens in zip(name_answers(len(draft.completions)), draft.completions):
        if not draft.prompt or not tokens.ids or not any(tokens.mask):
            error = RowError(
                "no token would be trained on" if draft.prompt else "the prompt has no token",
                kind="empty answer",
                field=name if draft.prompt else "prompt",
                remedy=f"fill or remove the row; {SKIP_REMEDY}",
            )
            log.add(error.at(example.file, example.line))
            return None
    if _equal(draft):
        if encoding.drop_identical:
            report.identical.add(example.place)
        else:
            log.add(refuse_identical(example))
        return None
    ends = [tokens.ids[-1] in encoding.end_ids for tokens in draft.completions]
    fit = fit_lengths(draft, encoding.limits, encoding.end_ids)
    if fit.draft is None:
        report.over_length.add(f"{place} ({fit.reason})")
        return None
    if fit.cut and _equal(fit.draft):
        report.made_equal.add(place)
        return None
    if fit.cut:
        report.cut.add(f"{place} ({fit.reason})")
        report.lost_eos += fit.lost_eos
    elif not all(ends):
        report.without_eos.add(place)
    return Group(
        id=place,
        prompt=np.asarray(fit.draft.prompt, dtype=np.int32),
        completions=tuple(
            Completion(np.asarray(t.ids, dtype=np.int32), np.asarray(t.mask, dtype=np.bool_))
            for t in fit.draft.completions
        ),
        columns=dict(example.columns),
        tags={"source": example.source},
    )


def _equal(draft: Draft) -> bool:
    return len(draft.completions) == 2 and draft.completions[0].ids == draft.completions[1].ids
