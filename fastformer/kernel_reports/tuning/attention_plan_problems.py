"""Calls of attention, each by our kernels or by PyTorch's: Hugging Face models take the fastest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch
from fastformer_kernels.attention.plan import OPERATION, attention_plan
from torch import Tensor

import fastformer
from fastformer.backends import backend
from fastformer.integrations.attention.sdpa import sdpa_backends
from fastformer.kernel_reports.tuning.problem import Problem, Results, Sizes, Tensors

# Query heads that share a head of keys and values, where some do.
_GROUP = 4


def attention_plan_problems(dtype: torch.dtype, sizes: Sizes, lengths: Iterable[int]) -> Iterator[Problem]:
    """Yield full and causal self-attention for each number of keys in `lengths`, with and without its backward."""
    for length, head_dim, causal, trained, group in product(
        lengths, sizes.head_dims, (True, False), (True, False), (1, _GROUP)
    ):
        yield _problem(dtype, sizes, length, head_dim, causal, trained, group)


def _problem(
    dtype: torch.dtype, sizes: Sizes, length: int, head_dim: int, causal: bool, trained: bool, group: int
) -> Problem:
    batch, kv_heads = max(1, sizes.tokens // length), max(1, sizes.width // head_dim // group)

    def heads(number: int, device: torch.device) -> Tensor:
        # The layout of a projection's result: the heads of a token are next to each other.
        return torch.randn(batch, length, number, head_dim, device=device).to(dtype).transpose(1, 2)

    def tensors(device: torch.device) -> Tensors:
        return [heads(number, device) for number in (group * kv_heads, kv_heads, kv_heads, group * kv_heads)]

    def call(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor) -> Results:
        inputs = [tensor.detach().requires_grad_(trained) for tensor in (query, key, value)]
        output = _attention(inputs[0], inputs[1], inputs[2], causal, trained)
        return (output, *torch.autograd.grad(output, inputs, grad_output)) if trained else (output,)

    words = f"{'causal' if causal else 'full'} head_dim {head_dim}, {length} keys, {group} query heads a key head"
    case = f"{OPERATION} {words}{', with its backward' if trained else ''}"
    return Problem("attention", OPERATION, case, dtype, tensors, call, head_dim)


def _attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, trained: bool) -> Tensor:
    plan = attention_plan(query, key, causal=causal, trained=trained)
    if plan.fastformer:
        with backend("triton"):
            output = fastformer.attention(query, key, value, causal=causal)
        assert isinstance(output, Tensor)  # no log-sum-exp was asked for
        return output
    with sdpa_backends(plan.cudnn):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
