"""What one layer of packed attention costs a token, forward and backward, from short to long rows of pairs.

    python benchmarks/attention_cost.py --json

The groups stay the same (a prompt of 112 tokens, answers of 44 and 36), only their number grows, so the cost a token should not.
Ways: the C kernel, `scaled_dot_product_attention` segment by segment, and the gather of variable-length attention: all that
happens around its one launch, which needs a CUDA device and is replaced by one pass over queries, keys and values. Rounds walk
over all ways and lengths in turn; figures are medians over rounds, in microseconds a token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from train_step import describe_machine, note

from burnish.core import varlen
from burnish.core.allocator import keep_freed_memory
from burnish.core.attention import packed_attention
from burnish.core.batch import Layout, build_packed_batch
from burnish.core.group import Completion, Group
from burnish.core.kernels.calls import without_kernels
from burnish.core.segments import AttentionPlan, build_attention_plan

LENGTHS = (1_000, 2_000, 4_000, 8_000, 16_000)
PAIR = (112, (44, 36))
HEADS, KV_HEADS, SIZE = 8, 4, 64


def build_layout(tokens: int) -> Layout:
    """Pairs of the same size, about so many tokens in all."""
    prompt, answers = PAIR

    def ids(n: int) -> np.ndarray:
        return np.zeros(n, np.int32)

    group = Group("pair", ids(prompt), tuple(Completion(ids(n), np.ones(n, bool)) for n in answers))
    return build_packed_batch([group] * max(1, round(tokens / group.tokens))).layout


def launch(query: Tensor, key: Tensor, value: Tensor, *bounds: object, **settings: object) -> Tensor:
    """In place of the launch: it reads what the launch would read."""
    return query + (key.mean() + value.mean())


def run_kernel(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return packed_attention(nn.Identity(), query, key, value, None, burnish_plan=plan)[0]


def run_sdpa(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with without_kernels():
        return packed_attention(nn.Identity(), query, key, value, None, burnish_plan=plan)[0]


def run_gather(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return varlen.run_varlen(plan, SIZE**-0.5, None, query, key, value)


WAYS: dict[str, Callable[..., Tensor]] = {"kernel": run_kernel, "sdpa": run_sdpa, "varlen gather": run_gather}


def time_layer(run: Callable[..., Tensor], layout: Layout) -> float:
    """Microseconds a token of forward and backward of one layer; what all layers share is built before."""
    plan = build_attention_plan(layout)
    shapes = [(1, layout.total, n, SIZE) for n in (HEADS, KV_HEADS, KV_HEADS)]
    operands = [torch.randn(s).transpose(1, 2).requires_grad_() for s in shapes]
    grad = torch.randn(1, layout.total, HEADS, SIZE)
    plan.bounds(torch.device("cpu"))
    start = time.perf_counter()
    run(plan, *operands).backward(grad)
    return 1e6 * (time.perf_counter() - start) / layout.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    varlen.find_varlen = lambda: launch  # type: ignore[assignment]
    layouts = {n: build_layout(n) for n in LENGTHS}
    costs: dict[str, dict[int, list[float]]] = {way: {n: [] for n in LENGTHS} for way in WAYS}
    for _ in range(given.rounds + 1):
        for n, layout in layouts.items():
            for way, run in WAYS.items():
                costs[way][n].append(time_layer(run, layout))
    figures = {way: {n: statistics.median(c[1:]) for n, c in by.items()} for way, by in costs.items()}
    for way, by in figures.items():
        note(f"{way}: " + ", ".join(f"{n} tokens {cost:.2f} µs" for n, cost in by.items()))
    if given.json:
        print(json.dumps({"machine": describe_machine(), "threads": given.threads, "us_per_token": figures}))


if __name__ == "__main__":
    main()
