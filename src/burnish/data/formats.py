"""Row shapes: which one a row has, and what it means as a prompt with completions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from burnish.data import hh
from burnish.data.messages import Message, check_messages, check_order, check_text, from_sharegpt, parse_tools
from burnish.data.problems import SKIP_REMEDY, RowDropped, RowError, row_name
from burnish.data.readers import Row
from burnish.data.strict_json import describe
from burnish.data.template import Segment
from burnish.data.think import strip_think

Want = Literal["completion", "pair", "prompt"]
Form = Literal["text", "plain", "chat", "hh", "ids"]


@dataclass(slots=True)
class Example:
    """A row as a prompt and its completions, before it is rendered.

    Attributes:
        file: The file it came from, as the user named it.
        line: Its line.
        form: How to read `prompt` and `completions`: `text` (one text, no prompt), `plain` (texts), `chat` (messages),
            `hh` (a raw dialogue: prompt text and segments), `ids` (token ids with masks).
        prompt: The prompt in that form.
        completions: One (SFT) or two (chosen, rejected) in that form.
        opening: What the conversation begins with; rows with the same opening stay on one side of a split.
        prompt_text: The whole prompt, to find the same prompt elsewhere.
        conversation: The completion may hold user turns (a whole conversation).
        tools: Tool descriptions for the template.
        columns: Numbers of the row (margin).
        extra: Further columns for evaluation (answer, reference …).
        source: Name of the source.
    """

    file: str
    line: int
    form: Form
    prompt: Any
    completions: list[Any]
    opening: str
    prompt_text: str
    conversation: bool = False
    tools: list[Any] | None = None
    columns: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def place(self) -> str:
        """The row's short name, `file:line`."""
        return row_name(self.file, self.line)


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are to be read.

    Attributes:
        want: What is needed of a row: a completion, a pair, or only a prompt.
        chat: Dialogues become messages for a chat template; otherwise they stay raw text.
        format: A shape's name, or "auto".
        strip_think: Remove reasoning blocks from answers.
        strip_control: Remove control characters instead of refusing them.
    """

    want: Want
    chat: bool = True
    format: str = "auto"
    strip_think: bool = False
    strip_control: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """A row shape: its name, the columns that show it, and what reads it."""

    name: str
    columns: tuple[str, ...]
    gives: frozenset[str]
    read: Callable[[Row, Reading], Example]
    summary: str


def normalise(row: Row, reading: Reading) -> Example:
    """The row as an example.

    Raises:
        RowError: It has no known shape, or something in it is wrong.
    """
    data = {name: value for name, value in row.data.items() if value is not None}
    row = Row(row.file, row.line, data)
    shape = _recognise(data, reading)
    example = shape.read(row, reading)
    if "margin" in data and reading.want == "pair":
        example.columns["margin"] = _number(data["margin"], "margin")
    if reading.want != "prompt":
        _check_answers(example)
    return example


def _recognise(data: Mapping[str, Any], reading: Reading) -> Shape:
    if reading.format not in ("auto", "instruct"):
        shape = SHAPES.get(reading.format)
        if shape is None:
            near = difflib.get_close_matches(reading.format, SHAPES, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise RowError(
                f"unknown data.format {reading.format!r}",
                kind="format",
                remedy=f"{hint}known are auto, instruct, {', '.join(SHAPES)}",
            )
        missing = [name for name in shape.columns if name not in data]
        if missing:
            raise missing_columns(missing, data)
        return shape
    for shape in SHAPES.values():
        if reading.want in shape.gives and all(name in data for name in shape.columns):
            if shape.name == "hh" and not _is_hh(data):
                continue
            return shape
    raise missing_columns(_nearest_need(data, reading.want), data)


def _is_hh(data: Mapping[str, Any]) -> bool:
    return "prompt" not in data and hh.looks_like_hh(data.get("chosen"))


def _nearest_need(data: Mapping[str, Any], want: Want) -> list[str]:
    """The columns that would complete the shape which lacks the fewest."""
    lacking = [[n for n in shape.columns if n not in data] for shape in SHAPES.values() if want in shape.gives]
    if want == "pair":
        lacking = [["chosen", "rejected"]] if not {"chosen", "rejected"} & set(data) else lacking
    return min((names for names in lacking if names), key=len, default=["prompt"])


def missing_columns(missing: Iterable[str], data: Iterable[str]) -> RowError:
    """The error for columns that are not there: which are, the mapping to set, the nearest name."""
    present, missing = list(data), list(missing)
    hints = []
    for name in missing:
        near = difflib.get_close_matches(name, present, 1, 0.7)
        hints.append(f"{name}: {near[0]}" if near else f"{name}: <your column>")
    guesses = [hint for hint in hints if "<" not in hint]
    meant = f" (did you mean {guesses[0].split(': ')[1]!r}?)" if guesses else ""
    return RowError(
        f"missing column {', '.join(map(repr, missing))}{meant}; columns found: {', '.join(present) or 'none'}",
        kind="missing column",
        field=missing[0],
        remedy=f"rename the column, or set data.columns: {{{', '.join(hints)}}}",
    )


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise RowError(f"expected a number, found {describe(value)}", kind="type", field=name) from None


def _check_answers(example: Example) -> None:
    """Refuse empty answers and, for pairs, equal ones."""
    names = ["chosen", "rejected"] if len(example.completions) == 2 else ["completion"]
    for name, completion in zip(names, example.completions):
        if not _scored_text(example.form, completion).strip():
            raise RowError(
                "the answer is empty", kind="empty answer", field=name, remedy=f"fill or remove the row; {SKIP_REMEDY}"
            )


def _scored_text(form: Form, completion: Any) -> str:
    if form == "chat":
        last = completion[-1]
        return last["content"] or ("call" if last.get("tool_calls") else "")
    if form == "hh":
        return next((s.text for s in reversed(completion) if s.scored), "")
    return "x" if form == "ids" else completion


def identical(example: Example) -> bool:
    """Whether a pair's two answers are the same."""
    if len(example.completions) != 2:
        return False
    a, b = example.completions
    if example.form == "ids":
        return a.ids == b.ids
    if example.form == "chat":
        return _comparable(a) == _comparable(b)
    if example.form == "hh":
        return "".join(s.text for s in a).strip() == "".join(s.text for s in b).strip()
    return a.strip() == b.strip()


def _comparable(messages: list[Message]) -> list[Any]:
    return [{**m, "content": m["content"].strip()} for m in messages]


# ------------------------------------------------------------------------------------------------ building examples


def opening_of(messages: list[Message]) -> str:
    """The conversation's beginning: everything up to its first user message."""
    parts = []
    for message in messages:
        parts.append(message["content"])
        if message["role"] == "user":
            break
    return key_text("\n\n".join(parts))


def key_text(text: str) -> str:
    """A text with white space made even, so that equal prompts are equal."""
    return " ".join(text.split())


def _chat(row: Row, reading: Reading, prompt: list[Message], completions: list[list[Message]], **more: Any) -> Example:
    if reading.strip_think:
        completions = [_strip(c) for c in completions]
        prompt = _strip(prompt)
    return Example(
        row.file,
        row.line,
        "chat",
        prompt,
        completions,
        opening=opening_of(prompt),
        prompt_text=key_text("\n".join(f"{m['role']}: {m['content']}" for m in prompt)),
        tools=parse_tools(row.data.get("tools")),
        **more,
    )


def _strip(messages: list[Message]) -> list[Message]:
    return [{**m, "content": strip_think(m["content"])} if m["role"] == "assistant" else m for m in messages]


def _plain(row: Row, reading: Reading, prompt: str, completions: list[str]) -> Example:
    if not prompt:
        raise RowError("the prompt is empty", kind="empty prompt", field="prompt")
    if reading.strip_think:
        completions = [strip_think(c) for c in completions]
    if reading.format == "instruct":
        messages = [{"role": "user", "content": prompt}]
        _insert_system(row, reading, messages)
        return _chat(row, reading, messages, [[{"role": "assistant", "content": c}] for c in completions])
    return Example(row.file, row.line, "plain", prompt, list(completions), key_text(prompt), key_text(prompt))


def _insert_system(row: Row, reading: Reading, messages: list[Message]) -> None:
    if isinstance(row.data.get("system"), str) and row.data["system"].strip():
        messages.insert(0, {"role": "system", "content": _text(row, "system", reading)})


def _conversation(row: Row, reading: Reading, messages: list[Message], name: str) -> Example:
    if reading.want == "prompt":
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        check_order(messages, name)
        return _chat(row, reading, messages, [])
    check_order(messages, name, final="assistant")
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return _chat(row, reading, messages[:first], [messages[first:]], conversation=True)


def _read_messages(row: Row, reading: Reading) -> Example:
    messages = check_messages(row.data["messages"], "messages", strip_control=reading.strip_control)
    return _conversation(row, reading, messages, "messages")


def _read_sharegpt(row: Row, reading: Reading) -> Example:
    value = row.data["conversations"]
    system = row.data.get("system")
    messages = from_sharegpt(value, "conversations", system=system, strip_control=reading.strip_control)
    return _conversation(row, reading, messages, "conversations")


def _text(row: Row, name: str, reading: Reading) -> str:
    return check_text(row.data[name], name, strip_control=reading.strip_control)


def _read_alpaca(row: Row, reading: Reading) -> Example:
    question = _text(row, "instruction", reading)
    if row.data.get("input"):
        question = f"{question}\n\n{_text(row, 'input', reading)}"
    messages = [{"role": "user", "content": question}]
    _insert_system(row, reading, messages)
    answer = {"role": "assistant", "content": _text(row, "output", reading)}
    return _chat(row, reading, messages, [[answer]])


def _read_question(row: Row, reading: Reading) -> Example:
    question, answer = _text(row, "question", reading), _text(row, "answer", reading)
    example = _chat(row, reading, [{"role": "user", "content": question}], [[{"role": "assistant", "content": answer}]])
    example.extra = {
        "answer": answer.rpartition("####")[2].strip() if "####" in answer else answer,
        "reference": answer,
    }
    return example


def _read_completion(row: Row, reading: Reading) -> Example:
    prompt, completion = row.data["prompt"], row.data["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return _chat_pair(row, reading, ("completion",))
    return _plain(row, reading, _text(row, "prompt", reading), [_text(row, "completion", reading)])


def _read_text(row: Row, reading: Reading) -> Example:
    text = _text(row, "text", reading)
    return Example(row.file, row.line, "text", "", [text], key_text(text), key_text(text))


def _read_prompt(row: Row, reading: Reading) -> Example:
    if isinstance(row.data["prompt"], list):
        messages = check_messages(row.data["prompt"], "prompt", strip_control=reading.strip_control)
        check_order(messages, "prompt")
        return _chat(row, reading, messages, [])
    return _plain(row, reading, _text(row, "prompt", reading), [])


# --------------------------------------------------------------------------------------------------------- pairs


def _read_pair(row: Row, reading: Reading) -> Example:
    names = ("chosen", "rejected") if reading.want == "pair" else ("chosen",)
    values = [row.data[name] for name in names]
    if any(isinstance(value, list) for value in [*values, row.data.get("prompt")]):
        return _chat_pair(row, reading, names)
    texts = [_text(row, name, reading) for name in names]
    if "prompt" in row.data:
        return _plain(row, reading, _text(row, "prompt", reading), texts)
    separated = _by_separator(texts)
    if separated is None:
        raise RowError(
            "chosen and rejected are texts without a prompt, and nothing shows where the answer begins",
            kind="missing column",
            field="prompt",
            remedy="add the prompt as a column of its own (data.columns: {prompt: <your column>}), or give messages",
        )
    return _plain(row, reading, *separated)


def _by_separator(texts: list[str]) -> tuple[str, list[str]] | None:
    """Prompt and answers of texts that share everything up to a marker of the answer."""
    for marker in (hh.ASSISTANT, "\n### Response:", "\n\nAnswer:"):
        head, found, _ = texts[0].rpartition(marker)
        if found:
            prompt = head + found
            if not all(text.startswith(prompt) for text in texts):
                raise RowError(
                    f"rejected does not begin with the prompt of chosen (split at the last {marker.strip()!r})",
                    kind="not prefixed",
                    field="rejected",
                )
            return prompt, [text[len(prompt) :] for text in texts]
    return None


def _chat_pair(row: Row, reading: Reading, names: tuple[str, ...]) -> Example:
    strip = reading.strip_control
    answers = [_answer(row.data[name], name, strip) for name in names]
    given = row.data.get("prompt_messages", row.data.get("prompt"))
    if isinstance(given, str) and type(given) is str:
        given = [{"role": "user", "content": given}]
    if given is not None:
        prompt = check_messages(given, "prompt", strip_control=strip)
        answers = [a[len(prompt) :] if len(a) > len(prompt) and a[: len(prompt)] == prompt else a for a in answers]
    else:
        prompt, answers = _common_messages(answers, names)
    if not prompt:
        raise RowError("the prompt is empty", kind="empty prompt", field="prompt")
    check_order(prompt, "prompt")
    for name, answer in zip(names, answers):
        check_order(answer, name, final="assistant", start=prompt[-1]["role"])
    return _chat(row, reading, prompt, answers)


def _answer(value: Any, name: str, strip_control: bool) -> list[Message]:
    if isinstance(value, list):
        return check_messages(value, name, strip_control=strip_control)
    return [{"role": "assistant", "content": check_text(value, name, strip_control=strip_control)}]


def _common_messages(answers: list[list[Message]], names: tuple[str, ...]) -> tuple[list[Message], list[list[Message]]]:
    """The messages that all conversations begin with, and what follows in each; an answer keeps its last message."""
    shortest = min(map(len, answers))
    shared = 0
    while shared < shortest - 1 and all(a[shared] == answers[0][shared] for a in answers):
        shared += 1
    while shared and answers[0][shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise RowError(
            f"{' and '.join(names)} have no messages in common, so the prompt is not known",
            kind="missing column",
            field="prompt",
            remedy="add the prompt as a column of messages (data.columns: {prompt: <your column>})",
        )
    return answers[0][:shared], [a[shared:] for a in answers]


def _read_hh(row: Row, reading: Reading) -> Example:
    chosen = _text(row, "chosen", reading)
    if reading.want != "pair":
        return _hh_dialogue(row, reading, chosen)
    pair = hh.parse_pair(chosen, _text(row, "rejected", reading))
    turns = hh.split_turns(pair.prompt)[:-1]
    prompt = hh.to_messages(turns)
    if not any(m["role"] == "user" and m["content"] for m in prompt):
        raise RowDropped("the prompt is empty", kind="hh: empty", field="chosen")
    answers = [hh.first_answer(text) for text in (pair.chosen, pair.rejected)]
    messages = [[{"role": "assistant", "content": _one_answer(text)}] for text in answers]
    example = _chat(row, reading, prompt, messages)
    if reading.chat:
        return example
    example.form, example.prompt = "hh", pair.prompt
    if reading.strip_think:
        answers = [" " + strip_think(text) for text in answers]
    example.completions = [[Segment(text, True)] for text in answers]
    return example


def _one_answer(text: str) -> str:
    return "\n\n".join(part.strip() for part in text.split(hh.ASSISTANT)).strip()


def _hh_dialogue(row: Row, reading: Reading, text: str) -> Example:
    turns = hh.parse_dialogue(text)
    messages = hh.to_messages(turns)
    example = _conversation(row, reading, messages, "chosen")
    if reading.chat:
        return example
    first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    example.form, example.prompt = "hh", hh.join_turns(turns[:first]) + hh.ASSISTANT
    if reading.want == "prompt":
        example.prompt = hh.join_turns(turns[:-1]) + hh.ASSISTANT
        return example
    segments: list[Segment] = []
    for i, turn in enumerate(turns[first:]):
        tag = "" if i == 0 else (hh.HUMAN if turn.role == "user" else hh.ASSISTANT)
        if turn.role == "assistant":
            said = " " + strip_think(turn.text) if reading.strip_think else turn.text
            segments += [Segment(tag, False)] * bool(tag) + [Segment(said, True)]
        else:
            segments.append(Segment(tag + turn.text, False))
    example.completions = [segments]
    return example


def _read_judged(row: Row, reading: Reading) -> Example:
    """A judged rollout; for a tokenizer without a template it becomes a raw HH dialogue."""
    if reading.want == "prompt":
        prompt = check_messages(row.data["prompt_messages"], "prompt_messages", strip_control=reading.strip_control)
        check_order(prompt, "prompt_messages")
        example = _chat(row, reading, prompt, [])
    else:
        example = _chat_pair(row, reading, ("chosen", "rejected") if reading.want == "pair" else ("chosen",))
    if reading.chat:
        return example
    tags = {"user": hh.HUMAN, "assistant": hh.ASSISTANT}
    text = "".join(
        f"{tags.get(m['role'], chr(10) * 2 + m['role'].capitalize() + ':')} {m['content']}" for m in example.prompt
    )
    example.form, example.prompt = "hh", text + hh.ASSISTANT
    example.completions = [[Segment(" " + c[-1]["content"].lstrip(), True)] for c in example.completions]
    return example


def _read_tokenised(row: Row, reading: Reading) -> Example:
    from burnish.data.tokenised import read_tokenised

    return read_tokenised(row, reading)


_ANY = frozenset({"completion", "pair", "prompt"})
_ONE = frozenset({"completion", "prompt"})

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "tokenised_pair",
            ("input_ids_chosen", "input_ids_rejected"),
            frozenset({"completion", "pair"}),
            _read_tokenised,
            "token ids of both answers with their prompt",
        ),
        Shape("tokenised", ("input_ids",), frozenset({"completion"}), _read_tokenised, "token ids, optional labels"),
        Shape("judged", ("prompt_messages", "chosen", "rejected"), _ANY, _read_judged, "judged rollouts"),
        Shape("rollout", ("prompt_messages",), frozenset({"prompt"}), _read_judged, "prompts of rollouts"),
        Shape("hh", ("chosen", "rejected"), _ANY, _read_hh, "raw HH-RLHF dialogues"),
        Shape(
            "preference",
            ("chosen", "rejected"),
            frozenset({"completion", "pair"}),
            _read_pair,
            "a better and a worse answer, texts or messages",
        ),
        Shape("messages", ("messages",), _ONE, _read_messages, "a conversation of role and content"),
        Shape("sharegpt", ("conversations",), _ONE, _read_sharegpt, "a conversation of from and value"),
        Shape("alpaca", ("instruction", "output"), _ONE, _read_alpaca, "instruction, input, output"),
        Shape(
            "prompt_completion",
            ("prompt", "completion"),
            frozenset({"completion"}),
            _read_completion,
            "prompt and completion, texts or messages",
        ),
        Shape("question_answer", ("question", "answer"), _ONE, _read_question, "question and worked answer (####)"),
        Shape("prompt", ("prompt",), frozenset({"prompt"}), _read_prompt, "a prompt, text or messages"),
        Shape("text", ("text",), frozenset({"completion"}), _read_text, "plain text, all of it trained on"),
    )
}
