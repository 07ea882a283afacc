"""One call of each main operator, forward and backward, for tools that observe a process from outside.

Run it as a module: ``python -m fastformer.benchmarking.gpu.main_kernels cuda small``, or ``large``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastformer
from fastformer.benchmarking.timing import wait

SIZES = ("small", "large")


def calls(device: torch.device, size: str) -> Iterator[Callable[[], object]]:
    """The calls. Small sizes end in the middle of a tile; large sizes fill a GPU."""
    heads, tokens, head_dim = (2, 70, 16) if size == "small" else (32, 4096, 128)
    width = heads * head_dim
    dtype = torch.bfloat16

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def both(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[], object]:
        def run() -> None:
            tensors = [random(*shape) for shape in shapes]
            output = function(*tensors)
            torch.autograd.grad(output, tensors, torch.ones_like(output))

        return run

    headed = (1, heads, tokens, head_dim)
    target = torch.zeros(tokens, device=device, dtype=torch.int64)
    yield both(partial(fastformer.attention, causal=True), headed, headed, headed)
    yield both(fastformer.softmax, (tokens, tokens))
    yield both(
        lambda x, weight, bias: fastformer.layer_norm(x, (width,), weight, bias), (tokens, width), (width,), (width,)
    )
    yield both(fastformer.feed_forward, (tokens, width), (4 * width, width), (width, 4 * width))
    yield both(lambda x: fastformer.cross_entropy(x, target), (tokens, 8 * width))
    yield lambda: _decode(device, heads, tokens, head_dim)


def _decode(device: torch.device, heads: int, tokens: int, head_dim: int) -> None:
    query, key, value = (
        torch.randn(4, number, length, head_dim, device=device, dtype=torch.bfloat16)
        for number, length in ((heads, 1), (heads // 2, tokens), (heads // 2, tokens))
    )
    lengths = torch.full((4,), tokens, device=device, dtype=torch.int32)
    fastformer.decode_attention(query, key, value, lengths=lengths)


def main(device: str, size: str) -> None:
    """Make all calls. Wait for each, so that an error belongs to the kernel of that call."""
    for call in calls(torch.device(device), size):
        call()
        wait(torch.device(device))


if __name__ == "__main__":
    main(*sys.argv[1:])
