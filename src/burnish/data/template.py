"""Chat templates: messages to text, and which parts of the text the assistant wrote."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError

from burnish.data.lengths import count_shared
from burnish.data.messages import Message
from burnish.data.problems import RowError
from burnish.data.sandbox import Sandbox
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import DataError

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'Assistant: ' + (message['content'] or '') | trim + eos_token + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ 'User: ' + message['content'] | trim + '\\n\\n' }}
{%- else -%}
{{ message['role'] | capitalize + ': ' + (message['content'] or '') | trim + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""
"""Used when the tokenizer has no template of its own: `User: …`, a blank line, `Assistant: …` and the EOS token."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a completion's text; `scored` = the assistant wrote it."""

    text: str
    scored: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt and a completion as texts, ready to be tokenised.

    Attributes:
        prompt: All text before the first answer, the generation prompt included.
        completion: What follows; scored segments are the assistant's turns with their end token.
        turn: Which assistant turn this is an example of, when each turn is one of its own; else None.
    """

    prompt: str
    completion: tuple[Segment, ...]
    turn: int | None = None


_EXCHANGE: list[Message] = [{"role": "user", "content": "aa"}, {"role": "assistant", "content": "bb"}]


@dataclass(frozen=True, slots=True)
class _Probe:
    """What a template does with one exchange.

    Attributes:
        parts: Contents must be lists of parts (templates of models that also see images).
        suffix: What follows an answer.
        kept: The beginning of it that belongs to the answer: up to its end token.
        end_ids: Ids that end an answer beside the tokenizer's own.
    """

    parts: bool
    suffix: str
    kept: str
    end_ids: frozenset[int]


class ChatTemplate:
    """A chat template bound to a tokenizer.

    Args:
        source: The template's text; None = the tokenizer's own, else burnish's plain one.
        tokenizer: Gives the special tokens.
        kwargs: Further variables (`enable_thinking` …).

    Raises:
        DataError: The template is not valid.
    """

    def __init__(
        self, tokenizer: TextTokenizer, source: str | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs or {})
        own = source if source is not None else tokenizer.chat_template
        self.is_default = own is None
        self.source = own if own is not None else PLAIN_TEMPLATE
        self._sandbox = _compile(self.source)
        tools = tokenizer.chat_templates.get("tool_use") if source is None else None
        self._tool_sandbox = _compile(tools) if tools else self._sandbox
        special = sorted((re.escape(text) for text in tokenizer.special_texts if text), key=len, reverse=True)
        self._tail = re.compile(f"(?:{'|'.join(special)})(\\s+)$") if special else None
        self._special = re.compile("|".join(special)) if special else None
        self._heads = sorted({text[:2] for text in tokenizer.special_texts if text})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the template, its variables and one rendering (a template may read the date)."""
        try:
            shown = self.render(_EXCHANGE)
        except RowError as error:
            shown = error.message
        parts = [self.source, self.kwargs, shown]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def _probe(self) -> _Probe:
        """What one rendered exchange shows of the template."""
        for parts in (False, True):
            try:
                _, found, suffix = self._render(_with_parts(_EXCHANGE) if parts else _EXCHANGE, False, None).rpartition(
                    "bb"
                )
            except RowError:
                continue
            if found:
                return _Probe(parts, suffix, *self._end_of(suffix))
        return _Probe(False, "", "", frozenset())

    def _end_of(self, suffix: str) -> tuple[str, frozenset[int]]:
        """The part of what follows an answer that belongs to it, and the ids that end it."""
        specials = list(self._special.finditer(suffix)) if self._special else []
        ids = [(found, self.tokenizer.token_id(found.group())) for found in specials]
        known = [(found, i) for found, i in ids if i in self.tokenizer.eos_ids]
        if known:
            return suffix[: known[0][0].end()], frozenset()
        if ids:
            return suffix[: ids[-1][0].end()], frozenset(i for _, i in ids if i is not None)
        return suffix.rstrip(), frozenset()

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's end tokens, or else those that the template puts behind it."""
        return self.tokenizer.eos_ids | self._probe.end_ids

    def spells_special(self, messages: Sequence[Message]) -> bool:
        """Whether a message's own text holds a special token, which the tokenizer would read as one."""
        if self._special is None:
            return False
        texts = [m["content"] for m in messages if isinstance(m.get("content"), str)]
        return any(any(head in text for head in self._heads) and self._special.search(text) for text in texts)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The text of a conversation.

        Raises:
            RowError: The template refuses this conversation.
            DataError: The template breaks out of what templates may do, or passes a limit.
        """
        shown = _with_parts(messages) if self._probe.parts else messages
        return self._render(shown, add_generation_prompt, tools)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: list[Any] | None) -> str:
        sandbox = self._tool_sandbox if tools else self._sandbox
        variables = {"tools": tools, "documents": None, **self.tokenizer.special_tokens, **self.kwargs}
        if self.is_default:
            variables.setdefault("eos_token", "")
        try:
            return sandbox.render(
                **{**variables, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
            )
        except SecurityError as error:
            raise DataError(
                f"the chat template is refused: {error}",
                where="chat_template",
                remedy="set chat_template to a template that can be trusted",
            ) from error
        except TemplateError as error:
            raise RowError(
                f"the chat template refuses this conversation: {error}",
                kind="template",
                field="messages",
                remedy="change the row, or set chat_template (or chat_template_kwargs)",
            ) from error

    def split(
        self,
        prompt: Sequence[Message],
        completions: Sequence[Sequence[Message]],
        *,
        tools: list[Any] | None = None,
    ) -> list[list[Rendered]]:
        """Render a prompt and its completions.

        Returns:
            For each completion its rendering; several when the template does not render a prefix of the conversation
            as a prefix of the text, and each assistant turn is therefore an example of its own. Its prompt is then
            what the model would see at that point.

        Raises:
            RowError: The template refuses this conversation.
        """
        head = self.render(prompt, add_generation_prompt=True, tools=tools)
        return [self._split_one(list(prompt), list(c), head, tools) for c in completions]

    def _split_one(
        self, prompt: list[Message], completion: list[Message], head: str, tools: list[Any] | None
    ) -> list[Rendered]:
        messages = prompt + completion
        full = self.render(messages, tools=tools)
        segments = self._segments(messages, len(prompt), head, full, tools)
        if segments is not None:
            return [Rendered(head, tuple(segments))]
        turns = [i for i in range(len(prompt), len(messages)) if messages[i]["role"] == "assistant"]
        return [self._turn(messages, i, n if len(turns) > 1 else None, tools) for n, i in enumerate(turns)]

    def _segments(
        self, messages: list[Message], first: int, head: str, full: str, tools: list[Any] | None
    ) -> list[Segment] | None:
        """Scored and unscored pieces of the text after `head`, or None if the template breaks the prefix property."""
        segments: list[Segment] = []
        position, last = len(head), len(messages) - 1
        if not full.startswith(head):
            return None
        for i in range(first, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            if i > first:
                before = self.render(messages[:i], add_generation_prompt=True, tools=tools)
                if len(before) < position or not full.startswith(before):
                    return None
                _append(segments, full[position : len(before)], scored=False)
                position = len(before)
            after = full if i == last else self.render(messages[: i + 1], tools=tools)
            if len(after) < position or not full.startswith(after):
                return None
            answer, rest = self._cut_tail(full[position : len(after)])
            _append(segments, answer, scored=True)
            if i < last:
                _append(segments, rest, scored=False)
            position = len(after)
        return segments

    def _turn(self, messages: list[Message], i: int, n: int | None, tools: list[Any] | None) -> Rendered:
        """The assistant turn at `i` as an example of its own."""
        prompt = self.render(messages[:i], add_generation_prompt=True, tools=tools)
        text = self.render(messages[: i + 1], tools=tools)
        if text.startswith(prompt):
            answer = text[len(prompt) :]
        else:
            base = self.render(messages[:i], tools=tools)
            header, tail = prompt[len(base) :], text[len(base) :]
            if not (prompt.startswith(base) and text.startswith(base)):
                raise RowError(
                    "the chat template renders the earlier messages differently once an answer follows",
                    kind="template",
                    field=f"messages[{i}]",
                    remedy="set chat_template to a template that renders earlier messages the same",
                )
            answer = tail[count_shared(header, tail) :]
        return Rendered(prompt, (Segment(self._cut_tail(answer)[0], True),), n)

    def _cut_tail(self, answer: str) -> tuple[str, str]:
        """An answer up to its end token, and what the template puts behind it."""
        suffix, kept = self._probe.suffix, self._probe.kept
        if suffix and answer.endswith(suffix):
            cut = len(answer) - len(suffix) + len(kept)
            return answer[:cut], answer[cut:]
        found = self._tail.search(answer) if self._tail else None
        return (answer[: found.start(1)], answer[found.start(1) :]) if found else (answer, "")


def load_template(
    choice: str | None, tokenizer: TextTokenizer, kwargs: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """The template of the setting `chat_template`: a file, a template text, or (None) the tokenizer's own.

    Raises:
        DataError: There is no such file, or the template is not valid.
    """
    if choice is None:
        return ChatTemplate(tokenizer, None, kwargs)
    if "{" not in choice:
        path = Path(choice).expanduser()
        if not path.is_file():
            raise DataError(
                f"{choice!r} is neither a template file nor a template text",
                where="chat_template",
                remedy="give the path of a .jinja file, or a text with {{ … }}",
            )
        choice = path.read_text(encoding="utf-8")
    return ChatTemplate(tokenizer, choice, kwargs)


def _compile(source: str) -> Sandbox:
    try:
        return Sandbox(source)
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid: {error.message} (line {error.lineno})",
            where="chat_template",
            remedy="mend the template, or set chat_template",
        ) from error
    except TemplateError as error:
        raise DataError(
            f"the chat template is refused: {error}", where="chat_template", remedy="set chat_template to another"
        ) from error


def _with_parts(messages: Sequence[Message]) -> list[Message]:
    return [{**m, "content": [{"type": "text", "text": m.get("content") or ""}]} for m in messages]


def _append(segments: list[Segment], text: str, *, scored: bool) -> None:
    if not text:
        return
    if segments and segments[-1].scored == scored:
        segments[-1] = Segment(segments[-1].text + text, scored)
    else:
        segments.append(Segment(text, scored))
