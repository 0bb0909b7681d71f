"""Sums and counts of a step's terms and metrics, and whether its numbers are finite; read on the host once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from burnish.core.batch import Table
from burnish.engine.fetch import fetch_numbers
from burnish.losses.terms import LossResult


def _add(target: dict[str, float], name: str, number: float) -> None:
    target[name] = target.get(name, 0.0) + number


@dataclass
class Sums:
    """Sums and counts of terms and metrics over micro-batches, on the host.

    Attributes:
        values, counts: Of the metrics. terms: Of the terms. weights: Factors of the terms.
        announced: Counts of the terms as the losses reported them.
    """

    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    announced: dict[str, float] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Iterable[Sums]) -> Sums:
        """The sums of all ranks, added in rank order; names may differ between ranks."""
        out = cls()
        for part in parts:
            for name in ("values", "counts", "terms", "announced"):
                for key, number in getattr(part, name).items():
                    _add(getattr(out, name), key, number)
            out.weights |= part.weights
        return out

    def figures(self, counts: Mapping[str, float]) -> dict[str, float]:
        """loss, each term (if there are several) and each metric, divided by their counts."""
        shares = {n: self.weights[n] * s / counts[n] for n, s in self.terms.items() if counts[n]}
        out = {"loss": sum(shares.values())}
        if len(self.terms) > 1:
            out |= {f"loss/{n}": s / counts[n] for n, s in self.terms.items() if counts[n]}
        return out | {n: v / self.counts[n] for n, v in self.values.items() if self.counts[n]}


@dataclass
class PendingSums:
    """Sums whose numbers are still on the device; `fetch` brings them to the host in one transfer."""

    sums: Sums = field(default_factory=Sums)
    _pending: list[tuple[dict[str, float], str, Tensor]] = field(default_factory=list)

    def add(self, result: LossResult) -> None:
        """Add the terms and metrics of some groups; counts that the host knows are added at once."""
        for term in result.terms:
            self._pending.append((self.sums.terms, term.name, term.sum.detach()))
            _add(self.sums.announced, term.name, term.count)
            self.sums.weights[term.name] = term.weight
        for metric in result.metrics:
            self._pending.append((self.sums.values, metric.name, metric.sum.detach()))
            if isinstance(metric.count, Tensor):
                self._pending.append((self.sums.counts, metric.name, metric.count.detach()))
            else:
                _add(self.sums.counts, metric.name, float(metric.count))

    def fetch(self, further: Sequence[Tensor]) -> list[float]:
        """Bring the sums to the host, in one transfer with the numbers of `further`; returns those."""
        numbers = fetch_numbers([tensor for _, _, tensor in self._pending] + list(further))
        for (target, name, _), number in zip(self._pending, numbers, strict=False):
            _add(target, name, number)
        found = numbers[len(self._pending) :]
        self._pending = []
        return found


@dataclass(frozen=True)
class Findings:
    """What was not finite on one rank.

    Attributes:
        rows: Ids of the groups that hold such a number.
        suspects: Ids of all groups that a loss at fault was computed from.
        terms: Names of the terms at fault.
    """

    rows: list[str]
    suspects: list[str]
    terms: list[str]


@dataclass
class Guard:
    """Whether the numbers of each micro-batch are finite; read on the host once, at the end of the step."""

    flags: list[Tensor] = field(default_factory=list)
    _rows: list[list[tuple[Table, dict[str, Tensor]]]] = field(default_factory=list)
    _terms: list[dict[str, Tensor]] = field(default_factory=list)

    def watch(self, loss: Tensor, result: LossResult, rows: Sequence[tuple[Table, Mapping[str, Tensor]]]) -> None:
        """Remember whether `loss` and all that it was computed from are finite (a loss that saturates hides an infinity),
        and the outputs and terms that tell which rows are at fault.
        """
        read = [t for table, outputs in rows for t in (*outputs.values(), *table.token_columns.values())]
        self.flags.append(torch.stack([torch.isfinite(t.detach()).all() for t in (loss, *read)]).all())
        self._terms.append({t.name: t.sum.detach() for t in result.terms})
        self._rows.append([(table, {n: t.detach() for n, t in outputs.items()}) for table, outputs in rows])

    def find(self, finite: Sequence[float]) -> Findings:
        """Rows and terms at fault; all terms of a micro-batch if only their total is not finite.

        Args:
            finite: The flags as fetched. Where all are set, the device is not asked again.
        """
        broken = [i for i, ok in enumerate(finite) if not ok]
        rows = [name for i in broken for table, outputs in self._rows[i] for name in _find_rows(outputs, table)]
        suspects = [name for i in broken for table, _ in self._rows[i] for name in table.group_ids]
        terms = []
        for sums in (self._terms[i] for i in broken):
            terms += [name for name, total in sums.items() if not bool(torch.isfinite(total))] or list(sums)
        return Findings(rows, suspects, terms)


def _find_rows(outputs: Mapping[str, Tensor], table: Table) -> list[str]:
    """Ids of the groups with a number that is not finite, in the models' outputs or in what the loss reads beside them."""
    bad: set[int] = set()
    for name, tensor in [*outputs.items(), *table.token_columns.items()]:
        rows = (~torch.isfinite(tensor.detach())).nonzero()[:, 0]
        completions = rows if name == "scores" else table.token_completion[rows]
        bad |= set(table.completion_group[completions].tolist())
    for column in table.group_columns.values():
        bad |= set((~torch.isfinite(column)).nonzero()[:, 0].tolist())
    return [table.group_ids[g] for g in sorted(bad)]
