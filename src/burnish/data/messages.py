"""Conversations: types, roles and their order."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from burnish.data.problems import SKIP_REMEDY, RowError
from burnish.data.strict_json import describe

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ORDER = (
    "accepted: an optional system message, then user and assistant in turn (tool messages after an assistant's call)"
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def check_text(value: Any, field: str, *, strip_control: bool = False) -> str:
    """The value if it is a text without control characters.

    Raises:
        RowError: It is not.
    """
    if not isinstance(value, str):
        raise RowError(f"expected a text, found {describe(value)}", kind="type", field=field)
    found = _CONTROL.search(value)
    if found is None:
        return str(value)
    if strip_control:
        return _CONTROL.sub("", value)
    char = ord(found.group())
    name = "a lone surrogate" if 0xD800 <= char <= 0xDFFF else "the control character"
    raise RowError(
        f"{name} \\u{char:04x} at character {found.start() + 1}",
        kind="control character",
        field=field,
        remedy="remove it, set strip_control: true, or set on_error: skip (then counted and reported)",
    )


def check_messages(value: Any, field: str, *, strip_control: bool = False) -> list[Message]:
    """Messages with valid types and known roles; their order is not looked at.

    Raises:
        RowError: With the path of what is wrong.
    """
    if isinstance(value, str) and value.lstrip().startswith("[") and type(value) is not str:
        value = _from_csv(value, field)
    if not isinstance(value, list | tuple):
        remedy = f'write [{{"role": "user", "content": "…"}}, …]; {SKIP_REMEDY}'
        raise RowError(f"expected a list of messages, found {describe(value)}", kind="type", field=field, remedy=remedy)
    if not value:
        raise RowError("the list of messages is empty", kind="empty", field=field)
    return [_check_message(item, f"{field}[{i}]", strip_control) for i, item in enumerate(value)]


def _from_csv(value: str, field: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"expected a list of messages as JSON: {error}", kind="type", field=field) from error


def _check_message(item: Any, field: str, strip_control: bool) -> Message:
    if not isinstance(item, dict):
        raise RowError(
            f'expected an object like {{"role": …, "content": …}}, found {describe(item)}', kind="type", field=field
        )
    role = item.get("role")
    if role not in ROLES:
        raise RowError(
            f"unknown role, found {describe(role) if 'role' in item else 'none'}; known are {', '.join(ROLES)}",
            kind="role",
            field=f"{field}.role",
        )
    content = item.get("content")
    message = {key: value for key, value in item.items() if value is not None and key != "content"}
    if content is None and role == "assistant" and item.get("tool_calls"):
        return {**message, "content": ""}
    if isinstance(content, list):
        content = _join_parts(content, f"{field}.content")
    return {**message, "content": check_text(content, f"{field}.content", strip_control=strip_control)}


def _join_parts(parts: list[Any], field: str) -> str:
    texts: list[str] = []
    for i, part in enumerate(parts):
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            raise RowError(f"only text parts can be used, found {describe(part)}", kind="type", field=f"{field}[{i}]")
        texts.append(part["text"])
    return "".join(texts)


def check_order(messages: Sequence[Message], field: str, *, final: str | None = None, start: str = "") -> None:
    """Check that roles follow each other as a conversation's do.

    Args:
        messages: Checked messages.
        field: Name of the field, for messages.
        final: Role of the last message ("assistant"), or None = any.
        start: Role of the message before the first one ("user" for answers that follow a prompt), "" = a beginning.

    Raises:
        RowError: With the index of the turn and the accepted order.
    """
    before = start
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in _followers(before):
            after = f"after {before}" if before else "first"
            raise RowError(
                f"{role} cannot come {after}; {ORDER}",
                kind="role order",
                field=f"{field}[{i}].role",
                remedy=SKIP_REMEDY,
            )
        before = role
    if final is not None and before != final:
        raise RowError(
            f"the last message is the {before}'s, not the {final}'s; {ORDER}",
            kind="role order",
            field=f"{field}[{len(messages) - 1}].role",
        )


def _followers(role: str) -> tuple[str, ...]:
    return {
        "": ("system", "developer", "user"),
        "system": ("user",),
        "developer": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }[role]


def from_sharegpt(value: Any, field: str, *, system: Any = None, strip_control: bool = False) -> list[Message]:
    """ShareGPT turns (`from`, `value`) as messages.

    Raises:
        RowError: Wrong types or an unknown speaker.
    """
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"expected a list of turns, found {describe(value)}", kind="type", field=field)
    messages: list[Message] = []
    for i, turn in enumerate(value):
        if isinstance(turn, dict) and "role" in turn:
            messages.append(_check_message(turn, f"{field}[{i}]", strip_control))
            continue
        if not isinstance(turn, dict) or "from" not in turn:
            raise RowError(
                f'expected {{"from": …, "value": …}}, found {describe(turn)}', kind="type", field=f"{field}[{i}]"
            )
        role = SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            message = f"unknown speaker, found {describe(turn['from'])}; known are {known}"
            raise RowError(message, kind="role", field=f"{field}[{i}].from")
        text = check_text(turn.get("value"), f"{field}[{i}].value", strip_control=strip_control)
        messages.append({"role": role, "content": text})
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(system, "system", strip_control=strip_control)})
    return messages


def parse_tools(value: Any) -> list[Any] | None:
    """The `tools` column: a list, or JSON of one.

    Raises:
        RowError: It is something else.
    """
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"expected a list of tools as JSON: {error}", kind="type", field="tools") from error
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"expected a list of tool descriptions, found {describe(value)}", kind="type", field="tools")
    return value
