"""Peaks of memory show that operators hold nothing unnecessary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu.calls import VOCABULARY
from gpu.making import Maker

from fastformer.ops import attention, feed_forward, linear_cross_entropy

BF16 = torch.bfloat16


def peak(function: Callable[[], object], dry: bool) -> int:
    """Return the largest number of bytes that a call allocates, on top of what was allocated before; 0 in a dry run.

    The function is called once before, since libraries keep some memory.
    """
    function()
    if dry:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_attention_holds_no_matrix_of_weights(make: Maker, dry: bool) -> None:
    """Attention of 16k tokens holds only its results, its gradients in 16 bits and dQ in float32."""
    tokens, heads, head_dim = make.size(16_384, 21), make.size(8, 2), make.size(64, 8)
    tensors = [make.normal(1, tokens, heads, head_dim, dtype=BF16).transpose(1, 2).requires_grad_() for _ in range(3)]

    def step() -> None:
        output = attention(*tensors, causal=True)
        assert isinstance(output, torch.Tensor)
        torch.autograd.grad(output.sum(), tensors)

    size = tokens * heads * head_dim
    rows = tokens * heads
    # Output, three gradients, and dQ in float32; log-sum-exp and two more numbers of each row in float32.
    allowed = size * (4 * 2 + 4) + rows * 3 * 4
    matrix = tokens * tokens * heads * 2
    assert matrix > 10 * allowed or dry
    assert peak(step, dry) < 1.2 * allowed


def test_linear_cross_entropy_holds_no_logits(make: Maker, dry: bool) -> None:
    """Linear cross-entropy of 8k tokens and 128k classes holds only its budget and its gradients."""
    rows, features, classes = make.size(8192, 21), make.size(256, 16), make.size(VOCABULARY, 70)
    x, weight = make.normal(rows, features, dtype=BF16), make.normal(classes, features, scale=0.05, dtype=BF16)
    target = make.integers(classes, rows)
    leaves = [tensor.requires_grad_() for tensor in (x, weight)]
    budget = 256 << 20

    def step() -> None:
        torch.autograd.grad(linear_cross_entropy(x, weight, target, memory_budget=budget), leaves)

    logits = rows * classes * 2
    # Each gradient in float32 while it is summed, in 16 bits, and in a copy that autograd returns.
    allowed = budget + sum(leaf.numel() for leaf in leaves) * (4 + 2 + 2)
    assert logits > 2 * allowed or dry
    assert peak(step, dry) < 1.2 * allowed


@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward_recomputes(recompute: bool, make: Maker, dry: bool) -> None:
    """Feed-forward keeps its input and the pre-activations for the backward, or, with recompute, its input alone."""
    tokens, features, intermediate = make.size(16_384, 21), make.size(512, 16), make.size(4096, 40)
    x = make.normal(tokens, features, dtype=BF16).requires_grad_()
    up, down = (make.normal(*s, scale=0.02, dtype=BF16) for s in ((intermediate, features), (features, intermediate)))
    if dry:
        feed_forward(x, up, down, recompute=recompute)
        return
    output = feed_forward(x, up, down, recompute=recompute)
    held = torch.cuda.memory_allocated()
    del output
    kept = held - torch.cuda.memory_allocated()
    hidden = 0 if recompute else tokens * intermediate * 2
    rounding = 4 << 20  # the allocator makes no blocks smaller than this
    assert abs(kept - tokens * features * 2 - hidden) < rounding
