"""What to say when memory runs out: where it happened, and a setting with a number that fits."""

from __future__ import annotations

from burnish.errors import ResourceError
from burnish.track.whereabouts import Whereabouts

SHRINK = 0.6  # what is proposed holds at most this share of the micro-batch that did not fit


def suggest_budget(budget: int, tokens: int, rows: int) -> int | None:
    """A smaller `micro_batch_tokens` under which the micro-batch at hand is cut; None if it is a single row.

    Args:
        budget: The setting as it holds.
        tokens, rows: Tokens and completions of the micro-batch that did not fit; 0 = unknown.
    """
    if rows == 1:
        return None
    proposed = budget
    while proposed > SHRINK * (tokens or budget) and proposed > 1:
        proposed //= 2
    return proposed if proposed < budget else None


def describe_remedy(place: Whereabouts) -> str:
    """What to change, by the phase in which memory ran out."""
    if place.phase == "generate":
        if place.rows > 1:
            return f"set batch_size: {place.rows} → {place.rows // 2} in this stage (the same answers)"
        return "set max_new_tokens to less in this stage, or precision: bf16"
    if place.phase == "optimizer":
        return (
            "set optim: adafactor (few moments), or lora: {r: 16} (few parameters); the micro-batch plays no part here"
        )
    if place.phase in ("load", "start", "export", "save"):
        return (
            "set lora: {r: 16} with quantize: nf4 (half a byte for each weight of the base) or precision: bf16 (2 bytes), "
            "or use a smaller model"
        )
    if not place.budget:
        return f"set max_length: {max(place.tokens // 2, 2)} in this stage, or precision: bf16"
    smaller = suggest_budget(place.budget, place.tokens, place.rows)
    if smaller is not None:
        return (
            f"set micro_batch_tokens: {place.budget} → {smaller} (the same gradient); "
            "gradient_checkpointing: true saves more and costs time"
        )
    return (
        f"one row of {place.tokens} tokens alone does not fit: set gradient_checkpointing: true, "
        f"or max_length: {max(place.tokens // 2, 2)} (longer rows are left out and counted)"
    )


def build_memory_error(error: BaseException, place: Whereabouts, *, saved: str = "") -> ResourceError:
    """The one message: stage, phase, what fits, what is saved."""
    detail = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    kept = f"; {saved}" if saved else ""
    return ResourceError(
        f"out of memory in phase {place.phase} after step {place.step}: {detail}",
        where=place.stage or "start",
        remedy=describe_remedy(place) + kept,
    )
