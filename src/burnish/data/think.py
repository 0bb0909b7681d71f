"""Removes reasoning blocks (`<think>…</think>`) from answers."""

from __future__ import annotations

import re

_TAG = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)


def strip_think(text: str) -> str:
    """The text without its reasoning blocks.

    Blocks may span lines, nest, and be written in any case. An unclosed block reaches to the end of the text. A closing
    tag without an opening one ends a block that began before the text (some templates open it in the prompt), so all
    before it goes. White space that the block leaves at the front is removed.
    """
    if "<" not in text or not _TAG.search(text):
        return text
    kept: list[str] = []
    depth = position = 0
    for tag in _TAG.finditer(text):
        if tag.group(1):
            if depth == 0:
                kept.clear()
            depth = max(0, depth - 1)
        else:
            if depth == 0:
                kept.append(text[position : tag.start()])
            depth += 1
        if depth == 0:
            position = tag.end()
    if depth == 0:
        kept.append(text[position:])
    return "".join(kept).lstrip()
