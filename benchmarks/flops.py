"""Useful floating-point operations of the rows, and the matrix-multiplication peak of this process.

Counted as "useful": what a packed step must compute at least once. Matrix products of the blocks cost 2 operations a
weight and token forward and 4 backward; attention costs 4 · width operations a visible (query, key) pair forward and
twice that backward; the head 2 · hidden · vocabulary a scored token forward and twice that backward. Recomputation, the
embedding look-up, softmax, norms and the optimizer are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from workload import Pair, Plan, Shape


def _block_weights(shape: Shape) -> int:
    width, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * shape.hidden * width + 2 * shape.hidden * keys
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate)


def _visible(prompt: int, answers: Sequence[int]) -> int:
    """(query, key) pairs of a prompt that is computed once and of its answers."""
    return prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in answers)


def compute_useful_flops(pairs: Sequence[Pair], plan: Plan) -> float:
    """Operations that `pairs` need under the plan's method, each prompt computed once."""
    shape = plan.shape
    total = 0.0
    for pair in pairs:
        answers = [len(pair.chosen_ids)] if plan.method == "sft" else [len(pair.chosen_ids), len(pair.rejected_ids)]
        prompt = len(pair.prompt_ids)
        tokens = prompt + sum(answers)
        forward = 2.0 * _block_weights(shape) * tokens
        forward += 4.0 * shape.layers * shape.heads * shape.head_dim * _visible(prompt, answers)
        if plan.method != "reward":
            forward += 2.0 * shape.hidden * shape.vocabulary * sum(answers)
        total += forward * (4.0 if plan.method == "dpo" else 3.0)  # DPO: one more forward, of the reference
    return total


def measure_matmul_peak(precision: str, size: int = 2048, repeats: int = 12, device: str = "cpu") -> float:
    """Operations a second of the best of `repeats` square products in the compute type."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    best = float("inf")
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(a, b)
            if device != "cpu":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
