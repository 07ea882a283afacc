"""Rotary position embedding of queries and keys: pairs of features turned by an angle that grows with the position.

Su et al., 2021 (https://arxiv.org/abs/2104.09864), equation 34. For the pair (a, b) number i of a token at position p,
with c = cos[p, i] and s = sin[p, i]:

    a' = a c - b s,  b' = b c + a s

Interleaved, the pairs are features (2 i, 2 i + 1), as in the paper; in halves, features (i, i + rotary_dim / 2), as in
Llama. Features from rotary_dim on stay. The gradient is the same kernel with -s. One launch serves queries and keys:
a program turns some heads of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS, architecture_of
from fastformer_kernels.precision import round_to

# Elements of one program's tile and of one of its threads: a load of 16 bytes for each half of a pair.
TILE_ELEMENTS = 2048
ELEMENTS_PER_THREAD = 16


@triton.jit
def _position(
    batch,
    token,
    position_ids_pointer,
    position_ids_stride_batch,
    offsets_pointer,
    cu_seqlens_pointer,
    sequences,
    SEARCH_STEPS: tl.constexpr,
):
    """The position of token `token` of dense sequence `batch`, or of packed token `token`."""
    position = token
    if position_ids_pointer is not None:
        position = tl.load(position_ids_pointer + batch * position_ids_stride_batch + token).to(tl.int64)
    else:
        sequence = batch
        if cu_seqlens_pointer is not None:
            # The last sequence that starts at or before the token: [low, high) always holds it.
            low = token * 0
            high = low + sequences
            for _ in tl.static_range(SEARCH_STEPS):
                middle = (low + high) // 2
                started = tl.load(cu_seqlens_pointer + middle).to(tl.int64) <= token
                low = tl.where(started, middle, low)
                high = tl.where(started, high, middle)
            sequence = low
            position = token - tl.load(cu_seqlens_pointer + sequence).to(tl.int64)
        if offsets_pointer is not None:
            position += tl.load(offsets_pointer + sequence).to(tl.int64)
    return position


@triton.jit
def _rotate(
    input_token,
    output_token,
    first_head,
    heads,
    head_dim,
    cosine_row,
    sine_row,
    known,
    input_stride_head,
    input_stride_dim,
    output_stride_head,
    output_stride_dim,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    COPY_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Turn heads [first_head, first_head + BLOCK_HEADS) of one token."""
    dtype: tl.constexpr = output_token.dtype.element_ty
    head = (first_head + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    head_valid = head < heads
    x_head = input_token + head * input_stride_head
    y_head = output_token + head * output_stride_head
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    pair_valid = pair < PAIRS
    cosine = tl.load(cosine_row + pair, mask=pair_valid, other=0.0)
    sine = tl.load(sine_row + pair, mask=pair_valid, other=0.0)
    # A position outside the table has no angle: its token becomes NaN, for an error cannot be raised here.
    cosine = tl.where(known, cosine, float("nan"))
    if INVERSE:
        sine = -sine
    if INTERLEAVED:
        dim = tl.arange(0, 2 * BLOCK_PAIRS).to(tl.int64)[None, :]
        valid = head_valid & (dim < 2 * PAIRS)
        x = tl.load(x_head + dim * input_stride_dim, mask=valid, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_PAIRS, 2)))
        y = tl.join(a * cosine - b * sine, b * cosine + a * sine)
        y = tl.reshape(y, (BLOCK_HEADS, 2 * BLOCK_PAIRS))
        tl.store(y_head + dim * output_stride_dim, round_to(y, dtype), mask=valid)
    else:
        low = pair.to(tl.int64)
        high = low + PAIRS
        valid = head_valid & pair_valid
        a = tl.load(x_head + low * input_stride_dim, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(x_head + high * input_stride_dim, mask=valid, other=0.0).to(tl.float32)
        tl.store(y_head + low * output_stride_dim, round_to(a * cosine - b * sine, dtype), mask=valid)
        tl.store(y_head + high * output_stride_dim, round_to(b * cosine + a * sine, dtype), mask=valid)
    if COPY_REST:
        dim = (2 * PAIRS + tl.arange(0, BLOCK_REST)).to(tl.int64)[None, :]
        valid = head_valid & (dim < head_dim)
        x = tl.load(x_head + dim * input_stride_dim, mask=valid, other=0.0)
        tl.store(y_head + dim * output_stride_dim, x, mask=valid)


@triton.jit
def _rotary_kernel(
    query_pointer,
    key_pointer,
    query_output_pointer,
    key_output_pointer,
    cosine_pointer,
    sine_pointer,
    position_ids_pointer,
    offsets_pointer,
    cu_seqlens_pointer,
    tokens,
    query_heads,
    key_heads,
    head_dim,
    positions,
    sequences,
    position_ids_stride_batch,
    query_stride_batch,
    query_stride_head,
    query_stride_token,
    query_stride_dim,
    key_stride_batch,
    key_stride_head,
    key_stride_token,
    key_stride_dim,
    query_output_stride_batch,
    query_output_stride_head,
    query_output_stride_token,
    query_output_stride_dim,
    key_output_stride_batch,
    key_output_stride_head,
    key_output_stride_token,
    key_output_stride_dim,
    SEARCH_STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    COPY_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64) // tokens
    token = tl.program_id(0).to(tl.int64) % tokens
    position = _position(
        batch,
        token,
        position_ids_pointer,
        position_ids_stride_batch,
        offsets_pointer,
        cu_seqlens_pointer,
        sequences,
        SEARCH_STEPS,
    )
    known = (position >= 0) & (position < positions)
    table_row = tl.where(known, position, 0) * PAIRS
    cosine_row = cosine_pointer + table_row
    sine_row = sine_pointer + table_row
    query_groups = tl.cdiv(query_heads, BLOCK_HEADS)
    group = tl.program_id(1)
    if group < query_groups:
        _rotate(
            query_pointer + batch * query_stride_batch + token * query_stride_token,
            query_output_pointer + batch * query_output_stride_batch + token * query_output_stride_token,
            group * BLOCK_HEADS,
            query_heads,
            head_dim,
            cosine_row,
            sine_row,
            known,
            query_stride_head,
            query_stride_dim,
            query_output_stride_head,
            query_output_stride_dim,
            PAIRS,
            INTERLEAVED,
            INVERSE,
            COPY_REST,
            BLOCK_HEADS,
            BLOCK_PAIRS,
            BLOCK_REST,
        )
    elif key_pointer is not None:
        _rotate(
            key_pointer + batch * key_stride_batch + token * key_stride_token,
            key_output_pointer + batch * key_output_stride_batch + token * key_output_stride_token,
            (group - query_groups) * BLOCK_HEADS,
            key_heads,
            head_dim,
            cosine_row,
            sine_row,
            known,
            key_stride_head,
            key_stride_dim,
            key_output_stride_head,
            key_output_stride_dim,
            PAIRS,
            INTERLEAVED,
            INVERSE,
            COPY_REST,
            BLOCK_HEADS,
            BLOCK_PAIRS,
            BLOCK_REST,
        )


@kept_launch
def rotate(
    query: torch.Tensor,
    key: torch.Tensor | None,
    outputs: tuple[torch.Tensor, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    offsets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
    inplace: bool,
) -> Launch:
    """Write `query` and `key`, rotated, into the outputs.

    Args:
        query, key: (batch, heads, sequence, head_dim), or packed (total_tokens, heads, head_dim); any strides.
        cos, sin: (positions, rotary_dim / 2) float32, contiguous.
        position_ids: (batch or 1, sequence) or packed (total_tokens,), integer, contiguous.
        offsets: (batch,) integer, added to each sequence's positions.
        cu_seqlens: (batch + 1,) integer, the first token of each packed sequence and the total at the end.
        outputs: like query and key, if there is one.
        inverse: turn back.
        inplace: whether the outputs are query and key.
    """
    query_output, key_output = outputs[0], None if key is None else outputs[1]
    packed = query.dim() == 3
    tokens, batch = (query.shape[0], 1) if packed else (query.shape[2], query.shape[0])
    query_heads, key_heads = query.shape[1], 0 if key is None else key.shape[1]
    head_dim, pairs = query.shape[-1], cos.shape[1]
    block_pairs = triton.next_power_of_2(pairs)
    block_heads = min(max(1, TILE_ELEMENTS // (2 * block_pairs)), triton.next_power_of_2(max(query_heads, key_heads)))
    groups = triton.cdiv(query_heads, block_heads) + triton.cdiv(key_heads, block_heads)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    threads = block_heads * 2 * block_pairs // ELEMENTS_PER_THREAD
    return Launch(
        _rotary_kernel,
        (batch * tokens, groups),
        (
            query,
            key,
            query_output,
            key_output,
            cos,
            sin,
            position_ids,
            offsets,
            cu_seqlens,
            tokens,
            query_heads,
            key_heads,
            head_dim,
            cos.shape[0],
            sequences,
            0 if position_ids is None or position_ids.dim() == 1 or position_ids.shape[0] == 1 else tokens,
            *_strides(query),
            *_strides(key),
            *_strides(query_output),
            *_strides(key_output),
        ),
        {
            "SEARCH_STEPS": sequences.bit_length(),
            "PAIRS": pairs,
            "INTERLEAVED": interleaved,
            "INVERSE": inverse,
            "COPY_REST": not inplace and head_dim > 2 * pairs,
            "BLOCK_HEADS": block_heads,
            "BLOCK_PAIRS": block_pairs,
            "BLOCK_REST": triton.next_power_of_2(max(1, head_dim - 2 * pairs)),
            "num_warps": max(1, threads // architecture_of(query).warp_size),
            **COMPILER_OPTIONS,
        },
    )


def _strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Of batch, head, token and feature."""
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.stride() if tensor.dim() == 4 else (0, tensor.stride(1), tensor.stride(0), tensor.stride(2))
