"""Numbers of single items from a model: sums of log-probs, and scores; no figure depends on how the items are batched.

Letters of shapes: G groups, K completions of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from burnish.core.batch import Outputs, Table, build_packed_batch
from burnish.core.group import Group
from burnish.engine.plan import build_part, build_plan
from burnish.errors import NumericStop
from burnish.evals.subjects import Loaded
from burnish.faults import fault_point
from burnish.track.whereabouts import enter_phase

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A number for every completion of some groups.

    Attributes:
        ids: G names.
        sources: G names of sources.
        values: (G, K).
        tokens: (G, K) scored tokens.
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    values: Numbers
    tokens: Numbers


def measure_logprobs(model: Loaded, groups: Sequence[Group]) -> Measured:
    """Σ log π over the scored tokens of each completion, nats, added up in fp64."""
    return _measure(model, groups, "logprobs")


def measure_scores(model: Loaded, groups: Sequence[Group]) -> Measured:
    """The score of each completion."""
    return _measure(model, groups, "scores")


def _measure(model: Loaded, groups: Sequence[Group], want: str) -> Measured:
    width = max((len(g.completions) for g in groups), default=1)
    values = np.full((len(groups), width), np.nan)
    rows: list[Tensor] = []
    slots: list[Tensor] = []
    found: list[Tensor] = []
    for outputs, table in _run(model, groups, want):
        if outputs.scores is not None:
            found.append(outputs.scores.double())
        else:
            assert outputs.logprobs is not None
            found.append(table.sum_tokens(outputs.logprobs.double()))
        host = table.on_host()
        rows.append(host.group_order[host.completion_group])
        slots.append(host.completion_slot)
    if found:  # the host waits for the device once
        values[torch.cat(rows).numpy(), torch.cat(slots).numpy()] = torch.cat(found).cpu().numpy()
    bad = [groups[int(g)].id for g in np.flatnonzero(~np.isfinite(values).all(axis=1))]
    if bad:
        raise NumericStop(
            f"evaluation gives a non-finite number on {len(bad)} rows: {', '.join(bad[:5])}",
            where="held-out data",
            remedy="use precision fp32; if it stays, the model's weights are damaged",
        )
    return Measured(
        ids=tuple(g.id for g in groups),
        sources=tuple(g.tags.get("source", "") for g in groups),
        values=values,
        tokens=np.array([[c.scored for c in g.completions] for g in groups], np.float64).reshape(len(groups), -1),
    )


@torch.no_grad()
def _run(model: Loaded, groups: Sequence[Group], want: str) -> Iterator[tuple[Outputs, Table]]:
    """Outputs and table of each micro-batch; `table.group_order` holds positions in `groups`."""
    for micro in build_plan(groups, budget=model.budget).of(0):
        cut = [build_part(groups[p.position], p) for p in micro.parts]
        batch = build_packed_batch([g for g, _ in cut], [p.position for p in micro.parts], [s for _, s in cut])
        batch = batch.to(model.policy.device)
        enter_phase("evaluate", batch.input_ids.numel(), batch.last_index.numel())
        fault_point("measure.forward")
        yield model.policy(batch, frozenset({want})), batch.table


def choose_items(n: int, limit: int, seed: int) -> list[int]:
    """Positions of at most `limit` of n items: a seeded choice, in the items' order; the same for every subject."""
    if n <= limit:
        return list(range(n))
    return sorted(np.random.default_rng([seed, n]).choice(n, limit, replace=False).tolist())
