"""Attention weights for chosen heads and rows, from the log-sum-exp that the fused attention returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastformer_kernels.attention.arguments import AttentionArguments
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.attention.attention import ARGUMENTS_SCHEMA, check_lengths_of, checked_arguments
from fastformer.ops.attention.block_mask import BlockMask
from fastformer.ops.attention.torch_backend import attention_weights_torch
from fastformer.ops.checks import check_device, check_shape
from fastformer.ops.operator import operator


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    mask: Tensor | BlockMask | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = False,
    prefix_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    chunk: int | None = None,
    alignment: str = "bottom_right",
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Recompute the weights that `fastformer.attention` gave the keys, before dropout: ``exp(scores - lse)``.

    Only the chosen rows of the matrix are formed. There is no derivative: a backward that reaches it raises an error.

    Args:
        query, key: as in the call of `attention` (after its norms, if it had any).
        lse: the log-sum-exp that this call returned with ``return_lse=True``; it includes sinks.
        heads: the chosen query heads; default all.
        rows: the chosen queries, counted within each sequence; default all.
        All other arguments: as in that call. Of a BlockMask all elements are made.

    Returns:
        (batch, chosen heads, chosen rows, keys) in query's dtype. Packed sequences have max_seqlen_k keys; entries
        where a sequence has no such query or key are zero.

    Raises:
        TypeError, ValueError: the message names the argument. IndexError: a head or row does not exist.

    >>> output, lse = fastformer.attention(q, k, v, causal=True, return_lse=True)
    >>> fastformer.attention_weights(q, k, lse, causal=True, heads=[0], rows=[-1 % q.shape[2]]).shape
    torch.Size([2, 1, 1, 100])
    """
    mask = mask.to_dense() if isinstance(mask, BlockMask) else mask
    query, key, _, arguments = checked_arguments(
        query,
        key,
        key,
        mask,
        bias,
        relative_bias,
        alibi_slopes,
        causal,
        prefix_lengths,
        window,
        chunk,
        alignment,
        scale,
        softcap,
        None,
        0.0,
        key_lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
    )
    if lse.dtype != torch.float32:
        raise TypeError(f"lse must be float32, as attention returns it; got {lse.dtype}")
    check_device("lse", lse, "query", query)
    check_shape("lse", lse, query.shape[:-1] if query.dim() == 4 else (query.shape[1], query.shape[0]))
    chosen_heads = _chosen("heads", heads, query.shape[1], query.device)
    chosen_rows = _chosen("rows", rows, arguments.max_seqlen_q, query.device)
    return _attention_weights(query, key, lse, chosen_heads, chosen_rows, *arguments)


def _chosen(name: str, indices: Sequence[int] | None, size: int, device: torch.device) -> Tensor | None:
    """Return the indices as a tensor; None stands for all."""
    if indices is None or (len(indices) == size and list(indices) == list(range(size))):
        return None
    if len(indices) and not 0 <= min(indices) <= max(indices) < size:
        wrong = next(index for index in indices if not 0 <= index < size)
        raise IndexError(f"{name} must be from 0 to {size - 1}; got {wrong}")
    return torch.tensor(list(indices), dtype=torch.int32, device=device)


@operator(
    "fastformer::attention_weights",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor lse, Tensor? heads, Tensor? rows, {ARGUMENTS_SCHEMA}) -> Tensor",
)
def _attention_weights(
    query: Tensor, key: Tensor, lse: Tensor, heads: Tensor | None, rows: Tensor | None, *arguments: Any
) -> Tensor:
    call = AttentionArguments._make(arguments)
    check_lengths_of(query, key, call)
    if use_triton(query):
        from fastformer_kernels.attention.weights import attention_weights as weights
    else:
        weights = attention_weights_torch
    return weights(query, key, lse, heads, rows, call)


@_attention_weights.register_fake
def _(query: Tensor, key: Tensor, lse: Tensor, heads: Tensor | None, rows: Tensor | None, *arguments: Any) -> Tensor:
    call = AttentionArguments._make(arguments)
    head_count = query.shape[1] if heads is None else heads.shape[0]
    row_count = call.max_seqlen_q if rows is None else rows.shape[0]
    return query.new_empty(call.batch(query), head_count, row_count, call.max_seqlen_k)
