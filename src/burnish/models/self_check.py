"""Does packing give an architecture's own numbers? Tried once, on a tiny random copy of its configuration.

The copy (`models.twin`) keeps every kind of layer, with windows and chunks of 4. Two groups of 17 tokens, with a prompt longer
than the window and a second completion, run packed and as separate eager passes; a forgotten kind of attention moves the
hidden states by percents, a right one by less than one part in ten thousand.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from burnish.artifacts.files import write_json_file
from burnish.core.attention import PLAN_KWARG, SDPA_NAME, PackingRefused, attach_plan
from burnish.core.batch import PackedBatch, build_packed_batch
from burnish.core.group import Completion, Group
from burnish.core.kernels.build import load_kernels
from burnish.core.kernels.calls import without_kernels
from burnish.core.segments import build_attention_plan
from burnish.errors import ResourceError
from burnish.faults import fault_point
from burnish.models.fuse import fuse_blocks
from burnish.models.lm_head import build_head_input, get_backbone, has_plain_head
from burnish.models.twin import VOCABULARY, build_twin

log = logging.getLogger("burnish")

TOLERANCE = 1e-4  # of the largest hidden state or logit
_VERSION = 3  # of this check
_known: dict[str, Verdict] = {}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an architecture may be packed.

    Attributes:
        packs: Packed rows give the hidden states of separate passes.
        reason: Why not, one clause; "" if it packs.
        head_agrees: The chunked head with the table's transforms gives the model's own logits (True for score heads).
        fuses: Fused blocks (`models.fuse`) give the same as well; False where there are none.
    """

    packs: bool
    reason: str = ""
    head_agrees: bool = True
    fuses: bool = False


def check_architecture(inner: Any, head: str = "lm", cache_dir: Path | None = None) -> Verdict:
    """The verdict on a transformers model's architecture; its weights are not touched, nor any generator's state.

    Args:
        inner: The transformers model (not a PEFT wrapper).
        head: "lm" also compares the head's logits.
        cache_dir: Verdicts are kept there as JSON, one file per architecture, configuration and library versions.
    """
    key = _key(inner, head)
    if key not in _known:
        stored = _load(cache_dir, key)
        verdict = stored or _run(inner, head)
        _known[key] = verdict
        if stored is None:
            _save(cache_dir, key, verdict)
    return _known[key]


def _key(inner: Any, head: str) -> str:
    config = inner.config.to_dict()
    for name in ("_name_or_path", "torch_dtype", "dtype", "transformers_version"):
        config.pop(name, None)
    parts = [
        _VERSION,
        type(inner).__qualname__,
        head,
        transformers.__version__,
        torch.__version__,
        load_kernels().identity,
        config,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _load(folder: Path | None, key: str) -> Verdict | None:
    path = None if folder is None else folder / f"self-check-{key}.json"
    if path is None or not path.exists():
        return None
    try:
        return Verdict(**json.loads(path.read_text()))
    except (ValueError, TypeError):  # cut off or of another version: check again
        return None


def _save(folder: Path | None, key: str, verdict: Verdict) -> None:
    if folder is None:
        return
    path = folder / f"self-check-{key}.json"
    try:
        fault_point("self_check.write")
        folder.mkdir(parents=True, exist_ok=True)
        write_json_file(path, asdict(verdict))
    except (OSError, ResourceError) as error:  # the check is made again next time
        log.warning("the self-check's verdict is not kept: %s", error)


def _run(inner: Any, head: str) -> Verdict:
    with _quiet():
        if not type(inner)._can_set_attn_implementation():
            return Verdict(
                False, "its attention does not go through the library's attention registry", _try_head(inner, head)
            )
        try:
            twin = build_twin(inner)
            batch = _build_probe()
            expected = _separate(twin, batch)
        except Exception as error:  # any failure of a foreign model's code: no verdict can be reached
            return Verdict(False, f"the self-check could not run a small copy ({_brief(error)})")
        agrees = head != "lm" or _head_agrees(twin, batch)
        try:
            gap = _measure_gap(twin, batch, expected)
        except PackingRefused as refusal:
            return Verdict(False, refusal.message, agrees)
        except Exception as error:
            return Verdict(False, f"its code does not run on a packed row ({_brief(error)})", agrees)
        return _judge(gap, expected, agrees, twin, batch)


def _judge(gap: float, expected: Tensor, agrees: bool, twin: Any, batch: PackedBatch) -> Verdict:
    """Verdict from the gap between a packed row and the (positions, hidden size) states of separate passes."""
    if not bool(torch.isfinite(expected).all()):
        return Verdict(False, "the self-check's small copy gives non-finite numbers", agrees)
    if gap <= TOLERANCE:
        fuses = fuse_blocks(get_backbone(twin)) > 0 and _measure_gap(twin, batch, expected) <= TOLERANCE
        return Verdict(True, "", agrees, fuses)
    return Verdict(False, f"packed rows differ from separate passes by {gap:.2g} in the self-check", agrees)


def _measure_gap(twin: Any, batch: PackedBatch, expected: Tensor) -> float:
    """The larger relative gap of the two ways through a packed row: with kernels and without."""
    by_kernels = _relative_gap(_packed(twin, batch), expected)
    with without_kernels():
        return max(by_kernels, _relative_gap(_packed(twin, batch), expected))


def _relative_gap(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _build_probe() -> PackedBatch:
    """17 tokens: a prompt of 6 with completions of 3 and 3, a prompt of 2 with a completion of 3."""
    rng = np.random.default_rng(7)

    def draw(n: int) -> np.ndarray:
        return rng.integers(1, VOCABULARY - 1, n).astype(np.int32)

    def group(name: str, prompt: int, *lengths: int) -> Group:
        return Group(name, draw(prompt), tuple(Completion(draw(n), np.ones(n, dtype=np.bool_)) for n in lengths))

    return build_packed_batch([group("a", 6, 3, 3), group("b", 2, 3)])


def _rows(batch: PackedBatch) -> Iterator[tuple[Tensor, int, Tensor]]:
    """(row positions, scored tokens) of each prompt + completion: (ids (1, n), prompt length, row positions (n,))."""
    for group in batch.layout.groups:
        for c in group.completions:
            index = torch.cat(
                (torch.arange(group.start, group.start + group.prompt), torch.arange(c.start, c.start + c.length))
            )
            yield batch.input_ids[index][None], group.prompt, index


def _separate(twin: Any, batch: PackedBatch) -> Tensor:
    """Hidden states at every position of every prompt + completion, one eager pass each."""
    twin.set_attn_implementation("eager")
    backbone = get_backbone(twin)
    with torch.no_grad():
        return torch.cat([backbone(ids, use_cache=False)[0][0] for ids, _, _ in _rows(batch)])


def _packed(twin: Any, batch: PackedBatch) -> Tensor:
    """The same from one packed row."""
    twin.set_attn_implementation(SDPA_NAME)
    plan = build_attention_plan(batch.layout)
    positions = batch.position_ids[None].clone()  # its own storage: views of it lead back to the plan
    attach_plan(positions, plan)
    with torch.no_grad():
        given = {"input_ids": batch.input_ids[None], "position_ids": positions, "use_cache": False, PLAN_KWARG: plan}
        hidden = get_backbone(twin)(**given)[0][0]
    if plan.calls == 0:
        raise PackingRefused("its attention layers never ask the attention registry")
    return hidden[torch.cat([index for _, _, index in _rows(batch)])]


def _head_agrees(twin: Any, batch: PackedBatch) -> bool:
    """Our logits of one row against the model's own."""
    if not has_plain_head(twin):
        return True
    twin.set_attn_implementation("eager")
    ids = next(_rows(batch))[0]
    try:
        with torch.no_grad():
            ours = build_head_input(twin, get_backbone(twin)(ids, use_cache=False)[0][0]).logits(0, ids.shape[1])
            own = twin(ids, use_cache=False).logits[0].float()
    except Exception:  # a model whose head cannot be called this way: its own logits are used
        return False
    return _relative_gap(ours, own) <= TOLERANCE


def _try_head(inner: Any, head: str) -> bool:
    """The head's verdict for a model that cannot be packed."""
    if head != "lm":
        return True
    try:
        return _head_agrees(build_twin(inner), _build_probe())
    except Exception:  # no small copy can be built: the model's own head is the safe way
        return False


def _brief(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:120]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings: they concern the small copy, not the user's model."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
