"""Attention by PyTorch's flash attention for CPUs, for the calls that it can express."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from fastformer_kernels.attention.arguments import (
    UNBOUNDED,
    AttentionArguments,
    empty_gradient,
    empty_lse,
    empty_output,
)

from fastformer.ops.attention.segments import NEGATIVE_INFINITY, Segment, as_dense, dense_rows, segments

FLASH_ROWS = 128
_SCORE_ELEMENTS = 1 << 22
_LEAST_ROWS = 64
# The number of elements in the widest vectors of a CPU.
_VECTOR = 16
_LARGEST = torch.finfo(torch.float32).max
_flash_kernel = torch._scaled_dot_product_flash_attention_for_cpu
_flash_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def fits_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: AttentionArguments) -> bool:
    """Whether PyTorch's CPU flash attention can compute this call."""
    a = arguments
    return (
        q.is_cpu
        and not (a.softcap or a.score_mod or a.dropout_p)
        # Flash attention multiplies masked scores (-inf) by the scale.
        and a.scale > 0.0
        and a.head_scales is None
        and a.sinks is None
        and q.shape[-1] == v.shape[-1]
        # Flash attention reads neighbouring elements and ignores the last stride.
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and q.numel() > 0
        and k.numel() > 0
    )


def hides_nan(query: torch.Tensor, key: torch.Tensor, arguments: AttentionArguments) -> bool:
    """Whether PyTorch's flash attention may turn NaN into zeros.

    It does so for rows of NaN if there are fewer keys than elements in one of its vectors, and for NaN in a bias.
    """
    bias = arguments.bias
    few = arguments.max_seqlen_k < _VECTOR and not has_finite_scores(query, key, arguments.scale)
    return few or (bias is not None and math.isnan(bias.sum(dtype=torch.float32).item()))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor has no infinite or NaN element; also False if finite elements add up to infinity."""
    total = tensor.sum() if tensor.dtype == torch.float32 else tensor.sum(dtype=torch.float32)
    return math.isfinite(total.item())


def has_finite_scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> bool:
    """Whether no score can be infinite or NaN: no score is larger than the product of the two tensors' norms."""
    wide = torch.promote_types(query.dtype, torch.float32)
    norms = (torch.linalg.vector_norm(tensor, dtype=wide).item() for tensor in (query, key))
    return math.prod(norms) * scale < _LARGEST


def flash_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_one_flash_call(arguments):
        result, result_lse = _flash_kernel(query, key, value, 0.0, arguments.right == 0, scale=arguments.scale)
        return _with_sequence_outside(result, query), result_lse.contiguous()
    output, lse = empty_output(query, value), empty_lse(query)
    dense = as_dense(query), as_dense(key), as_dense(value), as_dense(output)
    for segment in segments(query, key, arguments):
        _forward_flash(*dense, dense_rows(lse), segment)
    return output, lse


def flash_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    arguments: AttentionArguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if _is_one_flash_call(arguments):
        causal, scale = arguments.right == 0, arguments.scale
        three = _flash_backward_kernel(grad_output, query, key, value, output, lse, 0.0, causal, scale=scale)
        dq, dk, dv = map(_with_sequence_outside, three, (query, key, value))
        return dq, dk, dv
    dq, dk, dv = (empty_gradient(tensor).zero_() for tensor in (query, key, value))
    do, q, k, v, o = (as_dense(tensor) for tensor in (grad_output, query, key, value, output))
    grads = [as_dense(grad) for grad in (dq, dk, dv)]
    for segment in segments(query, key, arguments):
        _backward_flash(do, q, k, v, o, dense_rows(lse), grads, segment)
    return dq, dk, dv


def _is_one_flash_call(arguments: AttentionArguments) -> bool:
    """Whether one call of flash attention without a mask computes the whole of a call that `fits_flash`."""
    a = arguments
    if (
        a.cu_seqlens_q is not None
        or a.key_lengths is not None
        or a.mask is not None
        or a.query_lists is not None
        or a.bias is not None
        or a.relative_bias is not None
        or a.alibi_slopes is not None
        or a.left != UNBOUNDED
        or a.chunk
        or a.prefix_lengths is not None
    ):
        return False
    # Flash attention's causal mask begins at the top left. Splitting a long sequence into blocks skips keys beyond the
    # diagonal and keys that no query may see.
    m, n = a.max_seqlen_q, a.max_seqlen_k
    return a.right == UNBOUNDED or (a.right == 0 and m < 2 * FLASH_ROWS and (m == n or (m > n and not a.bottom_right)))


def _with_sequence_outside(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Lay out a (batch, heads, sequence, head_dim) tensor like `empty_gradient(like)`; copy it only if needed."""
    _, heads, sequence, head_dim = tensor.shape
    as_it_should = (sequence * heads * head_dim, head_dim, heads * head_dim, 1)
    stride_batch, _, stride_sequence, _ = like.stride()
    if tensor.stride() == as_it_should and stride_sequence <= stride_batch:
        return tensor
    return empty_output(like, tensor).copy_(tensor)


def _flash_blocks(segment: Segment, heads: int) -> Iterator[Segment]:
    """Split a segment into blocks of queries, so that keys excluded by limits are skipped.

    Flash attention computes every score of up to 512 keys, masked or not. Where an explicit bias must be formed,
    blocks also keep the bias small.
    """
    a, (_, m, n) = segment.arguments, segment.shape
    rows = FLASH_ROWS if segment.limited and m >= 2 * FLASH_ROWS else m
    if a.alibi_slopes is not None or a.relative_bias is not None:
        rows = min(rows, max(_LEAST_ROWS, _SCORE_ELEMENTS // max(1, heads * n)))
    return segment.by_queries(rows)


def _forward_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, segment: Segment
) -> None:
    for block in _flash_blocks(segment, q.shape[1]):
        block_output, block_lse = block.of_queries(output), block.of_queries(lse)
        if block.keys.start == block.keys.stop:
            block_output.zero_()
            block_lse.fill_(NEGATIVE_INFINITY)
            continue
        causal, additive = _flash_mask(block, q.device)
        part = block.of_queries(q), block.of_keys(k), block.of_keys(v)
        result, result_lse = _flash_kernel(*part, 0.0, causal, attn_mask=additive, scale=block.arguments.scale)
        # Flash attention gives 0 for a query that may attend to nothing. Without such a row the bias is not read again.
        if additive is not None and not (result_lse.isfinite() & (result_lse != 0)).all():
            result_lse = result_lse.masked_fill((additive == NEGATIVE_INFINITY).all(-1), NEGATIVE_INFINITY)
        block_output.copy_(result)
        block_lse.copy_(result_lse)


def _backward_flash(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grads: Sequence[torch.Tensor],
    segment: Segment,
) -> None:
    """Add the gradients of q, k and v to `grads`, which are zeros at the start."""
    for block in _flash_blocks(segment, q.shape[1]):
        if block.keys.start == block.keys.stop:
            continue
        causal, additive = _flash_mask(block, q.device)
        block_lse = block.of_queries(lse)
        if additive is not None:
            block_lse = block_lse.masked_fill(block_lse == NEGATIVE_INFINITY, 0.0)
        dq, dk, dv = _flash_backward_kernel(
            block.of_queries(do),
            block.of_queries(q),
            block.of_keys(k),
            block.of_keys(v),
            block.of_queries(o),
            block_lse,
            0.0,
            causal,
            attn_mask=additive,
            scale=block.arguments.scale,
        )
        block.of_queries(grads[0]).copy_(dq)
        block.of_keys(grads[1]).add_(dk)
        block.of_keys(grads[2]).add_(dv)


def _flash_mask(block: Segment, device: torch.device) -> tuple[bool, torch.Tensor | None]:
    """Return flash attention's is_causal and additive mask for this block."""
    a = block.arguments
    additive = block.bias(device)
    plain = a.mask is None and additive is None and a.left == UNBOUNDED and not (a.chunk or block.prefix)
    if plain and a.right == 0 and block.queries.start + block.offset == block.keys.start == 0:
        return True, None
    allowed = block.allowed(device)
    if allowed is not None:
        additive = torch.zeros((), dtype=torch.float32) if additive is None else additive
        additive = torch.where(allowed, additive, NEGATIVE_INFINITY)
    return False, additive
