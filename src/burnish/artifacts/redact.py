"""Secrets out of text before it is written anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

MASK = "***"
_NAMES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|ACCESS_KEY(_ID)?)$", re.IGNORECASE)
_NOT_SECRET = {"TOKENIZERS_PARALLELISM"}
_PATTERNS = (
    re.compile(r"\bhf_[A-Za-z0-9]{10,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{12,}"),
    re.compile(r"\b(?:ghp|gho|ghs|ghu|glpat|github_pat|xox[abpr])[_-][A-Za-z0-9_-]{12,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"),
)
_ASSIGNED = re.compile(
    r"(?i)(\b(?:api_?key|wandb_api_key|hf_token|huggingface_token|auth_token|access_token|password|secret)"
    r"[\"']?\s*[:=]\s*[\"']?)[^\s\"'#,}]{8,}"
)
_SECRET_KEY = re.compile(r"(?i)(api_?key|hf_token|huggingface_token|auth_token|access_token|password|secret)$")
_URL_PASSWORD = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@\"']*:)[^\s/@\"']+(@)")
_URL_QUERY = re.compile(
    r"([?&](?:access_token|token|api_?key|password|secret|sig|signature)=)[^&\s\"'#]+", re.IGNORECASE
)


def secret_values(environ: Mapping[str, str] | None = None) -> list[str]:
    """Values of environment variables whose names say that they are secret (8 characters or more), longest first."""
    env = os.environ if environ is None else environ
    found = {v.strip() for k, v in env.items() if _is_secret_name(k)}
    return sorted((v for v in found if len(v) >= 8), key=lambda v: (-len(v), v))


@lru_cache(maxsize=4096)
def _is_secret_name(name: str) -> bool:
    return _NAMES.search(name) is not None and name not in _NOT_SECRET


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` with tokens, keys, passwords in addresses and the values of secret environment variables masked."""
    return _mask(text, secret_values(environ))


def redact_tree(obj: Any) -> Any:
    """A copy of a JSON-like object with every string redacted, keys too; values of keys like `api_key` are masked."""
    return _mask_tree(obj, secret_values())


def _mask(text: str, values: list[str]) -> str:
    for value in values:
        text = text.replace(value, MASK)
    for pattern in _PATTERNS:
        text = pattern.sub(MASK, text)
    text = _ASSIGNED.sub(rf"\1{MASK}", text)
    text = _URL_PASSWORD.sub(rf"\1{MASK}\2", text)
    return _URL_QUERY.sub(rf"\1{MASK}", text)


@lru_cache(maxsize=4096)
def _mask_key(key: str, values: tuple[str, ...]) -> str:
    """`_mask` for the keys of objects, which come again and again."""
    return _mask(key, list(values))


def _mask_tree(obj: Any, values: list[str]) -> Any:
    if isinstance(obj, str):
        return _mask(obj, values)
    if isinstance(obj, Mapping):
        known = tuple(values)
        return {
            _mask_key(k, known) if isinstance(k, str) else k: MASK
            if isinstance(v, str) and v and _SECRET_KEY.search(str(k))
            else _mask_tree(v, values)
            for k, v in obj.items()
        }
    if isinstance(obj, (list, tuple)):
        return [_mask_tree(v, values) for v in obj]
    return obj
