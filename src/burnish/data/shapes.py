"""What each row shape means: readers from a row to an `Example`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.data import hh
from burnish.data.example import Example, Reading
from burnish.data.messages import Message, check_messages, check_order, check_text, from_sharegpt, parse_tools
from burnish.data.problems import RowDropped, RowError
from burnish.data.readers import CsvText, Row
from burnish.data.strict_json import describe
from burnish.data.template import Segment
from burnish.data.think import strip_think


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
    return [_without_think(m) if m["role"] == "assistant" else m for m in messages]


def _without_think(message: Message) -> Message:
    kept = {
        name: value for name, value in message.items() if name not in ("reasoning_content", "thinking", "reasoning")
    }
    return {**kept, "content": strip_think(message["content"])}


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
    if reading.rows == "prompt":
        reference = ""
        while messages and messages[-1]["role"] == "assistant":
            reference, messages = messages[-1]["content"], messages[:-1]
        check_order(messages, name)
        return _chat(row, reading, messages, [], extra={"reference": reference} if reference else {})
    check_order(messages, name, final="assistant")
    for i, message in enumerate(messages):
        empty = message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")
        if empty and name != "chosen":
            raise RowError("the answer is empty", kind="empty answer", field=f"{name}[{i}].content")
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return _chat(row, reading, messages[:first], [messages[first:]], conversation=True)


def read_messages(row: Row, reading: Reading) -> Example:
    messages = check_messages(row.data["messages"], "messages", strip_control=reading.strip_control)
    return _conversation(row, reading, messages, "messages")


def read_sharegpt(row: Row, reading: Reading) -> Example:
    value = row.data["conversations"]
    system = row.data.get("system")
    messages = from_sharegpt(value, "conversations", system=system, strip_control=reading.strip_control)
    return _conversation(row, reading, messages, "conversations")


def _text(row: Row, name: str, reading: Reading) -> str:
    return check_text(row.data[name], name, strip_control=reading.strip_control)


def read_alpaca(row: Row, reading: Reading) -> Example:
    question = _text(row, "instruction", reading)
    if row.data.get("input"):
        question = f"{question}\n\n{_text(row, 'input', reading)}"
    messages = [{"role": "user", "content": question}]
    _insert_system(row, reading, messages)
    answer = {"role": "assistant", "content": _text(row, "output", reading)}
    return _chat(row, reading, messages, [[answer]])


def read_question(row: Row, reading: Reading) -> Example:
    question, answer = _text(row, "question", reading), _text(row, "answer", reading)
    example = _chat(row, reading, [{"role": "user", "content": question}], [[{"role": "assistant", "content": answer}]])
    example.extra = {
        "answer": answer.rpartition("####")[2].strip() if "####" in answer else answer,
        "reference": answer,
    }
    return example


def read_completion(row: Row, reading: Reading) -> Example:
    example = _completion(row, reading)
    if "label" in row.data:
        example.extra["label"] = _label(row.data["label"])
    return example


def read_labelled(row: Row, reading: Reading) -> Example:
    example = _completion(row, reading)
    example.columns["label"] = float(_label(row.data["label"]))
    return example


def _label(value: Any) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    if str(value).lower() in ("true", "false", "0", "1") and isinstance(value, CsvText):
        return str(value).lower() in ("true", "1")
    raise RowError(f"expected true or false, found {describe(value)}", kind="type", field="label")


def _completion(row: Row, reading: Reading) -> Example:
    prompt, completion = row.data["prompt"], row.data["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return _chat_pair(row, reading, ("completion",))
    return _plain(row, reading, _text(row, "prompt", reading), [_text(row, "completion", reading)])


def read_text(row: Row, reading: Reading) -> Example:
    text = _text(row, "text", reading)
    return Example(row.file, row.line, "text", "", [text], key_text(text), key_text(text))


def read_prompt(row: Row, reading: Reading) -> Example:
    if isinstance(row.data["prompt"], list):
        messages = check_messages(row.data["prompt"], "prompt", strip_control=reading.strip_control)
        check_order(messages, "prompt")
        return _chat(row, reading, messages, [])
    return _plain(row, reading, _text(row, "prompt", reading), [])


# --------------------------------------------------------------------------------------------------------- pairs


def read_pair(row: Row, reading: Reading) -> Example:
    example = _pair(row, reading)
    if reading.rows == "prompt":
        example.completions = []
    return example


def _pair(row: Row, reading: Reading) -> Example:
    names = ("chosen", "rejected") if reading.rows == "pair" else ("chosen",)
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


def is_hh(data: Mapping[str, Any]) -> bool:
    """Whether a pair's texts are raw HH dialogues: whole ones, or a prompt that ends with the assistant's tag."""
    prompt = data.get("prompt")
    if prompt is None:
        return hh.looks_like_hh(data.get("chosen"))
    return hh.looks_like_hh(prompt) and prompt.rstrip().endswith("Assistant:")


def read_hh(row: Row, reading: Reading) -> Example:
    """Raw HH dialogues, parsed by `burnish.data.hh`."""
    head = _text(row, "prompt", reading).rstrip() if "prompt" in row.data else ""
    chosen = head + _text(row, "chosen", reading)
    if reading.rows != "pair":
        return _hh_dialogue(row, reading, chosen)
    pair = hh.parse_pair(chosen, head + _text(row, "rejected", reading))
    prompt = hh.to_messages(hh.split_turns(pair.prompt)[:-1])
    if not any(m["role"] == "user" and m["content"] for m in prompt):
        raise RowDropped("the prompt is empty", kind="hh: empty", field="chosen")
    answers = [hh.first_answer(text) for text in (pair.chosen, pair.rejected)]
    example = _chat(row, reading, prompt, [[{"role": "assistant", "content": _one_answer(text)}] for text in answers])
    if reading.chat:
        return example
    if reading.strip_think:
        answers = [" " + strip_think(text) for text in answers]
    example.form, example.prompt = "hh", pair.prompt
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
    if reading.rows == "prompt":
        example.prompt = hh.join_turns(turns[:-1]) + hh.ASSISTANT
        return example
    segments: list[Segment] = []
    for i, turn in enumerate(turns[first:]):
        tag = "" if i == 0 else (hh.HUMAN if turn.role == "user" else hh.ASSISTANT)
        if turn.role == "assistant":
            answer = " " + strip_think(turn.text) if reading.strip_think else turn.text
            segments += [Segment(tag, False)] * bool(tag) + [Segment(answer, True)]
        else:
            segments.append(Segment(tag + turn.text, False))
    example.completions = [segments]
    return example


def read_judged(row: Row, reading: Reading) -> Example:
    """A judged rollout; for a tokenizer without a template it becomes a raw HH dialogue."""
    if reading.rows == "prompt":
        prompt = check_messages(row.data["prompt_messages"], "prompt_messages", strip_control=reading.strip_control)
        check_order(prompt, "prompt_messages")
        example = _chat(row, reading, prompt, [])
    else:
        example = _chat_pair(row, reading, ("chosen", "rejected") if reading.rows == "pair" else ("chosen",))
    if reading.chat:
        return example
    tags = {"user": hh.HUMAN, "assistant": hh.ASSISTANT}
    text = "".join(
        f"{tags.get(m['role'], chr(10) * 2 + m['role'].capitalize() + ':')} {m['content']}" for m in example.prompt
    )
    example.form, example.prompt = "hh", text + hh.ASSISTANT
    example.completions = [[Segment(" " + c[-1]["content"].lstrip(), True)] for c in example.completions]
    return example
