"""Calls of attention and of decoding whose launch configurations are tuned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from typing import Literal

import torch
from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments, Learned
from fastformer_kernels.attention.backward import attention_backward
from fastformer_kernels.attention.decode import decode_forward
from fastformer_kernels.attention.decode_arguments import DecodeArguments
from fastformer_kernels.attention.forward import attention_forward
from torch import Tensor

from fastformer.kernel_reports.tuning.problem import Call, Make, Problem, Results, Sizes, Tensors
from fastformer.ops.attention.block_mask import BlockMask
from fastformer.registry.score_mod import DECAY

Kind = Literal["causal", "full", "block mask", "score_mod"]
"""What the keys of a query are, or how they are scored."""

_NOTHING_LEARNED = Learned(bias=False, relative=False, alibi_slopes=False, head_scales=False, sinks=False)


# Sizes of a query's and a key's head, and of a value's.
HeadDims = tuple[int, int]


def attention_problems(
    dtype: torch.dtype,
    sizes: Sizes,
    lengths: Iterable[int],
    operations: Iterable[str],
    kinds: Iterable[Kind] = ("causal", "full"),
) -> Iterator[Problem]:
    """Yield attention of these kinds for each number of keys in `lengths`."""
    for length, head_dim, kind, operation in product(lengths, sizes.head_dims, kinds, operations):
        yield _attention_problem(operation, dtype, sizes, length, (head_dim, head_dim), kind)


def wide_attention_problems(dtype: torch.dtype, sizes: Sizes) -> Iterator[Problem]:
    """Yield attention of wide heads. A kernel of its own computes dQ for the widest, in every backward."""
    operations = ("attention_forward", "attention_query_gradient", "attention_backward", "attention_deterministic")
    kinds: tuple[Kind, ...] = ("causal", "full")
    for head_dims, kind, operation in product(sizes.wide_head_dims, kinds, operations):
        yield _attention_problem(operation, dtype, sizes, sizes.lengths[0], head_dims, kind)


def decode_problems(dtype: torch.dtype, sizes: Sizes) -> Iterator[Problem]:
    """Yield attention of one new token of each sequence to a cache."""
    for batch, keys in sizes.caches:
        yield _decode_problem(dtype, sizes, batch, keys)
    for batch, keys in sizes.latent_caches:
        yield _latent_decode_problem(dtype, batch, keys)


def _attention_problem(
    operation: str, dtype: torch.dtype, sizes: Sizes, length: int, head_dims: HeadDims, kind: Kind
) -> Problem:
    head_dim, value_dim = head_dims
    batch, heads = max(1, sizes.tokens // length), max(1, sizes.width // head_dim)

    def random(width: int, device: torch.device) -> Tensor:
        # The layout of a projection's result: the heads of a token are next to each other.
        return torch.randn(batch, length, heads, width, device=device).to(dtype).transpose(1, 2)

    def tiles(device: torch.device) -> Tensors:
        mask = _documents(length).to(device) if kind == "block mask" else None
        return [] if mask is None else [*mask.by_query, *mask.by_key]

    def of_forward(device: torch.device) -> Tensors:
        inputs = [random(width, device) for width in (head_dim, head_dim, value_dim)]
        return [*inputs, *tiles(device)]

    def of_backward(device: torch.device) -> Tensors:
        query, key, value, *lists = of_forward(device)
        return [random(value_dim, device), query, key, value, *forward(query, key, value, *lists), *lists]

    def forward(query: Tensor, key: Tensor, value: Tensor, *lists: Tensor) -> tuple[Tensor, Tensor]:
        return attention_forward(query, key, value, _arguments(length, head_dim, kind, lists))

    def backward(
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        *lists: Tensor,
    ) -> Results:
        saved = (query, key, value, output, lse)
        arguments = _arguments(length, head_dim, kind, lists)
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
    widths = f"{head_dim}" if head_dim == value_dim else f"{head_dim}, values {value_dim}"
    case = f"{operation} {kind} head_dim {widths}, {length} keys"
    return Problem("attention", operation, case, dtype, tensors, call, max(head_dims))


@lru_cache
def _documents(length: int) -> BlockMask:
    """The mask of seven documents in one row, each causal, whose borders are not those of tiles."""
    document = torch.arange(length) * 7 // length
    return BlockMask.from_function(
        lambda b, h, q, k: (document[q] == document[k]) & (q >= k), None, None, length, length
    )


def _arguments(length: int, head_dim: int, kind: Kind, lists: Tensors) -> AttentionArguments:
    """The arguments of a call of this kind; `lists`: lists and bits of a block mask by query and by key, or nothing."""
    query_lists, query_bits, key_lists, key_bits = lists or (None,) * 4
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
        query_lists=query_lists,
        query_bits=query_bits,
        key_lists=key_lists,
        key_bits=key_bits,
        max_seqlen_q=length,
        max_seqlen_k=length,
        scale=head_dim**-0.5,
        left=UNBOUNDED,
        right=0 if kind in ("causal", "score_mod") else UNBOUNDED,
        chunk=0,
        bottom_right=True,
        softcap=0.0,
        score_mod=DECAY.key if kind == "score_mod" else None,
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
        return decode_forward(query, key_cache, value_cache, _decode_arguments(lengths, head_dim), None)

    return Problem("decode", "decode", f"decode {batch} sequences, {keys} keys", dtype, tensors, call)


def _latent_decode_problem(dtype: torch.dtype, batch: int, keys: int) -> Problem:
    """Absorbed multi-head latent attention, with the heads of DeepSeek-V3."""
    heads, head_dim, value_dim = 128, 576, 512

    def tensors(device: torch.device) -> Tensors:
        query, cache = (
            torch.randn(batch, *size, head_dim, device=device).to(dtype) for size in ((heads, 1), (1, keys))
        )
        return [query, cache, torch.full((batch,), keys, dtype=torch.int32, device=device)]

    def call(query: Tensor, cache: Tensor, lengths: Tensor) -> Results:
        return decode_forward(query, cache, cache[..., :value_dim], _decode_arguments(lengths, head_dim), None)

    case = f"decode {batch} sequences, {keys} latent keys"
    return Problem("decode", "decode", case, dtype, tensors, call)


def _decode_arguments(lengths: Tensor, head_dim: int) -> DecodeArguments:
    return DecodeArguments(
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
