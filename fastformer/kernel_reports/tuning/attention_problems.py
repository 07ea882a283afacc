"""Calls of attention and of decoding whose launch configurations are tuned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch
from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments, Learned
from fastformer_kernels.attention.backward import attention_backward
from fastformer_kernels.attention.decode import decode_forward
from fastformer_kernels.attention.decode_arguments import DecodeArguments
from fastformer_kernels.attention.forward import attention_forward
from torch import Tensor

from fastformer.kernel_reports.tuning.problem import Call, Make, Problem, Results, Sizes, Tensors

_NOTHING_LEARNED = Learned(bias=False, relative=False, alibi_slopes=False, head_scales=False, sinks=False)


def attention_problems(
    dtype: torch.dtype, sizes: Sizes, lengths: Iterable[int], operations: Iterable[str]
) -> Iterator[Problem]:
    """Yield full and causal attention for each number of keys in `lengths`."""
    for length, head_dim, causal, operation in product(lengths, sizes.head_dims, (True, False), operations):
        yield _attention_problem(operation, dtype, sizes, length, head_dim, causal)


def decode_problems(dtype: torch.dtype, sizes: Sizes) -> Iterator[Problem]:
    """Yield attention of one new token of each sequence to a cache."""
    for batch, keys in sizes.caches:
        yield _decode_problem(dtype, sizes, batch, keys)


def _attention_problem(
    operation: str, dtype: torch.dtype, sizes: Sizes, length: int, head_dim: int, causal: bool
) -> Problem:
    arguments = _arguments(length, head_dim, causal)
    shape = (max(1, sizes.tokens // length), length, max(1, sizes.width // head_dim), head_dim)

    def heads(device: torch.device) -> Tensor:
        # The layout of a projection's result: the heads of a token are next to each other.
        return torch.randn(shape, device=device).to(dtype).transpose(1, 2)

    def of_forward(device: torch.device) -> Tensors:
        return [heads(device) for _ in range(3)]

    def of_backward(device: torch.device) -> Tensors:
        inputs = of_forward(device)
        return [heads(device), *inputs, *attention_forward(inputs[0], inputs[1], inputs[2], arguments)]

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Results:
        return attention_forward(query, key, value, arguments)

    def backward(
        grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
    ) -> Results:
        saved = (query, key, value, output, lse)
        return attention_backward(grad_output, None, *saved, arguments, _NOTHING_LEARNED)[:3]

    def deterministic(*tensors: Tensor) -> Results:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return backward(*tensors)
        finally:
            torch.use_deterministic_algorithms(before)

    calls: dict[str, tuple[Make, Call]] = {
        "attention_forward": (of_forward, forward),
        "attention_backward": (of_backward, backward),
        "attention_deterministic": (of_backward, deterministic),
        "attention_query_gradient": (of_backward, deterministic),
    }
    tensors, call = calls[operation]
    case = f"{operation} {'causal' if causal else 'full'} head_dim {head_dim}, {length} keys"
    return Problem("attention", operation, case, dtype, tensors, call, head_dim)


def _arguments(length: int, head_dim: int, causal: bool) -> AttentionArguments:
    return AttentionArguments(
        mask=None,
        bias=None,
        relative_bias=None,
        alibi_slopes=None,
        head_scales=None,
        sinks=None,
        key_lengths=None,
        prefix_lengths=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        query_lists=None,
        query_bits=None,
        key_lists=None,
        key_bits=None,
        max_seqlen_q=length,
        max_seqlen_k=length,
        scale=head_dim**-0.5,
        left=UNBOUNDED,
        right=0 if causal else UNBOUNDED,
        chunk=0,
        bottom_right=True,
        softcap=0.0,
        score_mod=None,
        dropout_p=0.0,
        seed=None,
    )


def _decode_problem(dtype: torch.dtype, sizes: Sizes, batch: int, keys: int) -> Problem:
    head_dim = sizes.head_dims[0]
    kv_heads = max(1, sizes.width // head_dim // 2)

    def tensors(device: torch.device) -> Tensors:
        query = torch.randn(batch, 4 * kv_heads, 1, head_dim, device=device).to(dtype)
        caches = [torch.randn(batch, kv_heads, keys, head_dim, device=device).to(dtype) for _ in range(2)]
        return [query, *caches, torch.full((batch,), keys, dtype=torch.int32, device=device)]

    def call(query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> Results:
        arguments = DecodeArguments(
            lengths=lengths,
            query_lengths=None,
            block_table=None,
            alibi_slopes=None,
            sinks=None,
            lists=None,
            bits=None,
            scale=head_dim**-0.5,
            left=UNBOUNDED,
            right=UNBOUNDED,
            softcap=0.0,
        )
        return decode_forward(query, key_cache, value_cache, arguments, None)

    return Problem("decode", "decode", f"decode {batch} sequences, {keys} keys", dtype, tensors, call)
