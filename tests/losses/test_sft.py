"""The loss of supervised fine-tuning is nothing but −log π."""

from __future__ import annotations

import math

import torch

from burnish.losses.sft import compute_nll


def test_a_uniform_model_has_the_log_of_its_vocabulary() -> None:
    """96 equally likely tokens: −log(1/96) = ln 96 for every token."""
    logprobs = torch.full((7,), -math.log(96), dtype=torch.float64, requires_grad=True)
    nll = compute_nll(logprobs)
    assert nll.tolist() == [math.log(96)] * 7
    nll.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1.0] * 7
