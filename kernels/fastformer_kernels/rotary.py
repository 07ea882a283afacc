"""Rotary position embedding of queries and keys: it rotates pairs of features by an angle that grows with the position.

Su et al., 2021 (https://arxiv.org/abs/2104.09864), equation 34. For the pair (a, b) number i of a token at position p,
with c = cos[p, i] and s = sin[p, i]:

    a' = a c - b s,  b' = b c + a s

Interleaved pairs are the features (2 i, 2 i + 1), as in the paper. In halves, pairs are (i, i + rotary_dim / 2), as in
Llama. Features from rotary_dim on do not change. The gradient is the same kernel with -s. One launch serves queries
and keys: a program rotates some heads of one token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.kernel_arguments import operand
from fastformer_kernels.constants import constants
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS, architecture_of
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import aligned, alignment

# Elements of a program's tile, and of each thread: one load of 16 bytes for each half of the pairs.
TILE_ELEMENTS = 2048
ELEMENTS_PER_THREAD = 16


class Places(NamedTuple):
    """The source of each token's position. Without any of the tensors it is the token's own index.

    Attributes:
        position_ids: the positions themselves, (batch or 1, sequence) or packed (total_tokens,), integer, contiguous.
        stride_batch: the stride from one sequence's `position_ids` to those of the next; 0 if all share one row.
        offsets: (batch,) integer, added to the positions of each sequence.
        cu_seqlens: (sequences + 1,) integer, the first token of each packed sequence and the total at the end.
        sequences: the number of packed sequences.
    """

    position_ids: torch.Tensor | None
    stride_batch: int
    offsets: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    sequences: int


class Rotation(NamedTuple):
    """The constants of a launch.

    Attributes:
        SEARCH_STEPS: steps of the binary search for a packed token's sequence.
        PAIRS: number of pairs of a head that are rotated.
        INTERLEAVED: whether a pair's features are neighbours.
        INVERSE: whether to rotate backwards.
        COPY_REST: whether to copy the features that are not rotated.
        ALIGNMENT: a number that divides all strides but the features'; 1 where Triton sees their alignment by itself.
        BLOCK_HEADS, BLOCK_PAIRS, BLOCK_REST: the heads of a tile, and for each its pairs and the features to copy.
    """

    SEARCH_STEPS: int
    PAIRS: int
    INTERLEAVED: bool
    INVERSE: bool
    COPY_REST: bool
    ALIGNMENT: int
    BLOCK_HEADS: int
    BLOCK_PAIRS: int
    BLOCK_REST: int


@triton.jit
def _position(batch, token, places, SEARCH_STEPS: tl.constexpr):
    """The position of token `token` of dense sequence `batch`, or of packed token `token`."""
    position = token
    if places.position_ids is not None:
        position = tl.load(places.position_ids + batch * places.stride_batch + token).to(tl.int64)
    else:
        sequence = batch
        if places.cu_seqlens is not None:
            # Find the last sequence that starts at or before the token: [low, high) always contains it.
            low = token * 0
            high = low + places.sequences
            for _ in tl.static_range(SEARCH_STEPS):
                middle = (low + high) // 2
                started = tl.load(places.cu_seqlens + middle).to(tl.int64) <= token
                low = tl.where(started, middle, low)
                high = tl.where(started, high, middle)
            sequence = low
            position = token - tl.load(places.cu_seqlens + sequence).to(tl.int64)
        if places.offsets is not None:
            position += tl.load(places.offsets + sequence).to(tl.int64)
    return position


@triton.jit
def _rotate(source, target, batch, token, first_head, heads, head_dim, cosine_row, sine_row, known, rotation):
    """Rotate heads [first_head, first_head + BLOCK_HEADS) of one token of `source`, and write them to `target`.

    `cosine_row` and `sine_row` point to the rows of the token's position. `known` is false if the table lacks it.
    """
    dtype: tl.constexpr = target.pointer.dtype.element_ty
    head = (first_head + tl.arange(0, rotation.BLOCK_HEADS)).to(tl.int64)[:, None]
    head_valid = head < heads
    x_offset = batch * source.stride_b + token * source.stride_row + head * source.stride_h
    y_offset = batch * target.stride_b + token * target.stride_row + head * target.stride_h
    x_head = source.pointer + aligned(x_offset, rotation.ALIGNMENT)
    y_head = target.pointer + aligned(y_offset, rotation.ALIGNMENT)
    pair = tl.arange(0, rotation.BLOCK_PAIRS)[None, :]
    pair_valid = pair < rotation.PAIRS
    cosine = tl.load(cosine_row + pair, mask=pair_valid, other=0.0)
    sine = tl.load(sine_row + pair, mask=pair_valid, other=0.0)
    # A position outside the table has no angle. Its token becomes NaN, since no error can be raised here.
    cosine = tl.where(known, cosine, float("nan"))
    if rotation.INVERSE:
        sine = -sine
    if rotation.INTERLEAVED:
        dim = tl.arange(0, 2 * rotation.BLOCK_PAIRS).to(tl.int64)[None, :]
        valid = head_valid & (dim < 2 * rotation.PAIRS)
        x = tl.load(x_head + dim * source.stride_dim, mask=valid, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (rotation.BLOCK_HEADS, rotation.BLOCK_PAIRS, 2)))
        y = tl.join(a * cosine - b * sine, b * cosine + a * sine)
        y = tl.reshape(y, (rotation.BLOCK_HEADS, 2 * rotation.BLOCK_PAIRS))
        tl.store(y_head + dim * target.stride_dim, round_to(y, dtype), mask=valid)
    else:
        low = pair.to(tl.int64)
        high = low + rotation.PAIRS
        valid = head_valid & pair_valid
        a = tl.load(x_head + low * source.stride_dim, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(x_head + high * source.stride_dim, mask=valid, other=0.0).to(tl.float32)
        tl.store(y_head + low * target.stride_dim, round_to(a * cosine - b * sine, dtype), mask=valid)
        tl.store(y_head + high * target.stride_dim, round_to(b * cosine + a * sine, dtype), mask=valid)
    if rotation.COPY_REST:
        dim = (2 * rotation.PAIRS + tl.arange(0, rotation.BLOCK_REST)).to(tl.int64)[None, :]
        valid = head_valid & (dim < head_dim)
        x = tl.load(x_head + dim * source.stride_dim, mask=valid, other=0.0)
        tl.store(y_head + dim * target.stride_dim, x, mask=valid)


@triton.jit
def _rotary_kernel(
    query,
    key,
    query_output,
    key_output,
    cosine_pointer,
    sine_pointer,
    places,
    tokens,
    query_heads,
    key_heads,
    head_dim,
    positions,
    rotation,
):
    """Compute a' = a c - b s, b' = b c + a s for every pair (a, b) of some heads of one token.

    Programs along the second dimension of the grid take the queries' heads first, then the keys'.

    Args:
        query, key, query_output, key_output: an `Operand` each; without a key the pointers of key and key_output are
            None.
        cosine_pointer, sine_pointer: (positions, PAIRS) float32, contiguous: c and s.
        places: a `Places`.
        tokens: number of tokens of a sequence, or of all packed sequences together.
        query_heads, key_heads, head_dim: sizes of the tensors.
        rotation: a `Rotation`.
    """
    batch = tl.program_id(0).to(tl.int64) // tokens
    token = tl.program_id(0).to(tl.int64) % tokens
    position = _position(batch, token, places, rotation.SEARCH_STEPS)
    known = (position >= 0) & (position < positions)
    table_row = tl.where(known, position, 0) * rotation.PAIRS
    cosine_row = cosine_pointer + table_row
    sine_row = sine_pointer + table_row
    query_groups = tl.cdiv(query_heads, rotation.BLOCK_HEADS)
    group = tl.program_id(1)
    if group < query_groups:
        head = group * rotation.BLOCK_HEADS
        _rotate(query, query_output, batch, token, head, query_heads, head_dim, cosine_row, sine_row, known, rotation)
    elif key.pointer is not None:
        head = (group - query_groups) * rotation.BLOCK_HEADS
        _rotate(key, key_output, batch, token, head, key_heads, head_dim, cosine_row, sine_row, known, rotation)


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
    """Rotate `query` and `key` into the outputs.

    Args:
        query, key: (batch, heads, sequence, head_dim), or packed (total_tokens, heads, head_dim); any strides.
        cos, sin: (positions, rotary_dim / 2) float32, contiguous.
        position_ids: (batch or 1, sequence) or packed (total_tokens,), integer, contiguous.
        offsets: (batch,) integer, added to each sequence's positions.
        cu_seqlens: (batch + 1,) integer, the first token of each packed sequence and the total at the end.
        outputs: tensors like query and, if there is one, key.
        inverse: whether to rotate backwards.
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
    given = [tensor for tensor in (query, key, query_output, key_output) if tensor is not None]
    strides = alignment(*(stride for tensor in given for stride in tensor.stride()[:-1]))
    one_row = position_ids is None or position_ids.dim() == 1 or position_ids.shape[0] == 1
    return Launch(
        _rotary_kernel,
        (batch * tokens, groups),
        {
            "query": operand(query),
            "key": operand(key),
            "query_output": operand(query_output),
            "key_output": operand(key_output),
            "cosine_pointer": cos,
            "sine_pointer": sin,
            "places": Places(position_ids, 0 if one_row else tokens, offsets, cu_seqlens, sequences),
            "tokens": tokens,
            "query_heads": query_heads,
            "key_heads": key_heads,
            "head_dim": head_dim,
            "positions": cos.shape[0],
            "rotation": constants(
                Rotation(
                    SEARCH_STEPS=sequences.bit_length(),
                    PAIRS=pairs,
                    INTERLEAVED=interleaved,
                    INVERSE=inverse,
                    COPY_REST=not inplace and head_dim > 2 * pairs,
                    ALIGNMENT=strides % 16 or 1,
                    BLOCK_HEADS=block_heads,
                    BLOCK_PAIRS=block_pairs,
                    BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * pairs)),
                )
            ),
            "num_warps": max(1, threads // architecture_of(query).warp_size),
            **COMPILER_OPTIONS,
        },
    )
