"""The base of all settings classes: strict, immutable, described."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Settings that refuse unknown keys and wrong types. Every field has a description; a test sees to it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


def setting(default: Any, description: str, **limits: Any) -> Any:
    """A field with its default, what it does (one sentence, units named) and pydantic limits (ge=, gt=, le=, lt=)."""
    return Field(default=default, description=description, **limits)
