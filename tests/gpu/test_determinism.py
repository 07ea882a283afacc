"""In PyTorch's deterministic mode every run gives the same bits, with enough tiles for races to show."""

from __future__ import annotations

import pytest
import torch
from gpu.judging import Call, assert_same, deterministic, results, run
from gpu.making import Maker, dry_with

from fastformer.ops import attention

RUNS = 3


def test_the_same_bits(call: Call) -> None:
    with deterministic():
        first = run(call, torch.bfloat16)
        for _ in range(RUNS - 1):
            assert_same(run(call, torch.bfloat16), first, exactly=True)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", dry_with((64,), (64, 128)))
def test_attention_of_many_tiles(head_dim: int, precision: torch.dtype, make: Maker) -> None:
    """Every gradient that several tiles add to is the same: query, key, value, biases, slopes, sinks and scales."""
    heads, tokens, head_dim = make.size(4, 2), make.size(4000, 37), make.size(head_dim, 8)
    tensors = [make.normal(1, tokens, h, head_dim).transpose(1, 2).to(precision) for h in (heads, 1, 1)]
    learned = {
        "bias": make.normal(1, 1, tokens, tokens).to(precision),
        "relative_bias": make.normal(heads, 2 * tokens - 1).to(precision),
        "alibi_slopes": make.normal(heads).abs() * 0.01,
        "sinks": make.normal(heads),
        "scale": make.normal(heads) * 0.1,
    }

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return attention(*leaves[:3], causal=True, **dict(zip(learned, leaves[3:], strict=True)))

    inputs, grads = [*tensors, *learned.values()], [torch.ones_like(tensors[0])]
    with deterministic():
        runs = [results(call, inputs, grads) for _ in range(RUNS)]
    for other in runs[1:]:
        assert_same(other, runs[0], exactly=True)
