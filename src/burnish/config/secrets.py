"""Keeps secrets out of recipes: they belong into the environment, never into a file that a run copies."""

from __future__ import annotations

import re

from burnish.config.problems import Problem

_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{16,}")),
    ("an API key (sk-…)", re.compile(r"\bsk-[A-Za-z0-9_\-]{16,}")),
    ("a GitHub token", re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})")),
    ("an AWS key", re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a Slack token", re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}")),
    ("a password in a URL", re.compile(r"\b[a-z][a-z0-9+.\-]*://[^\s/:@]+:[^\s/@]+@")),
    (
        "a key or token",
        re.compile(
            r"(?i)\b(api_?key|wandb_api_key|hf_token|huggingface_token|password|secret)[\"']?\s*[:=]\s*[\"']?[^\s\"'#]{8,}"
        ),
    ),
)


def find_secret(text: str) -> str | None:
    """What kind of secret the text holds; None if it holds none."""
    for name, pattern in _PATTERNS:
        if pattern.search(text):
            return name
    return None


def redact(text: str) -> str:
    """The text with every secret replaced by "…"."""
    for _, pattern in _PATTERNS:
        text = pattern.sub("…", text)
    return text


def find_secrets(text: str, origin: str) -> list[Problem]:
    """A problem for each line that holds a secret; the secret itself is not repeated."""
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        kind = find_secret(line)
        if kind:
            problems.append(_problem("secret", kind, f"{origin}:{number}"))
    return problems


def check_word(key: str, text: str, where: str) -> list[Problem]:
    """The same for one value of a command line or of the environment."""
    kind = find_secret(text)
    return [_problem(key if find_secret(key) is None else "secret", kind, where)] if kind else []


def _problem(key: str, kind: str, where: str) -> Problem:
    return Problem(
        key,
        f"this looks like {kind}; a run keeps a copy of its recipe, so secrets may not be in it",
        "remove it (and revoke it if the file was shared); put HF_TOKEN or WANDB_API_KEY into the environment or .env",
        where,
    )
