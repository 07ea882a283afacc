"""Tiles of a boolean mask: whether each shows nothing, everything or a part of its elements, and all elements as bits.

A mask that all heads share is read once here, one byte an element, instead of once for each head, layer and pass. The
limits by position and by length of the call become a part of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import MASK_TILE, MASK_WORDS, AttentionArguments
from fastformer_kernels.attention.kernel_arguments import features, layout
from fastformer_kernels.attention.tiles import (
    TILE,
    WORD,
    WORDS,
    Span,
    key_bounds,
    key_limits,
    mask_at_head,
    prefix_length,
)
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS

NOTHING, EVERYTHING, PART = 0, 1, 2
"""What a tile shows."""


@triton.jit(do_not_specialize=["row_tiles", "column_tiles"])
def _mask_tiles_kernel(
    shown_pointer,
    bits_pointer,
    row_tiles,
    column_tiles,
    queries,
    keys,
    layout,
    features,
    BOTTOM_RIGHT: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """Read a tile of a mask that all heads share, and write what it shows and its bits.

    Args:
        shown_pointer: (batch, row tiles, column tiles) int32, written: NOTHING, EVERYTHING or PART.
        bits_pointer: (batch, row tiles, column tiles, 128 rows, 4 words of 32 columns) int32, written.
        row_tiles, column_tiles: numbers of tiles. The rows are queries, or keys if BY_KEY.
        queries, keys: those of a sequence.
        layout, features: a `Layout`, and a `Features` of which the mask and the limits by position count.
    """
    number = tl.program_id(0).to(tl.int64)
    column_tile = number % column_tiles
    row_tile = number // column_tiles % row_tiles
    batch = number // column_tiles // row_tiles
    rows = tl.arange(0, TILE)[:, None]
    columns = tl.arange(0, TILE)[None, :]
    _, seen_keys, _ = key_bounds(batch, layout, keys, keys)
    span = Span(queries, seen_keys, seen_keys - queries if BOTTOM_RIGHT else 0, prefix_length(batch, layout))
    if BY_KEY:
        key = (row_tile * TILE).to(tl.int32) + rows
        query = (column_tile * TILE).to(tl.int32) + columns
    else:
        query = (row_tile * TILE).to(tl.int32) + rows
        key = (column_tile * TILE).to(tl.int32) + columns
    limits = key_limits(query, span, features)
    at = query.to(tl.int64) * features.mask_stride_m + key.to(tl.int64) * features.mask_stride_n
    # Nothing else decides what is loaded: then up to 16 bytes are loaded at once.
    inside = (query < queries) & (key < keys)
    shown = tl.load(mask_at_head(features, batch, 0) + at, mask=inside, other=0) != 0
    shown = (shown & (key >= limits.low) & (key < limits.high)).to(tl.int32)
    words = tl.reshape(shown, (TILE, WORDS, WORD)) << tl.arange(0, WORD)[None, None, :]
    # The bits of a word are different, so their sum is their union.
    word = tl.sum(words, axis=2)
    place = tl.arange(0, TILE)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    tl.store(bits_pointer + number * (TILE * WORDS) + place, word)
    count = tl.sum(shown)
    tl.store(shown_pointer + number, tl.where(count == TILE * TILE, 1, tl.where(count == 0, 0, 2)))


def mask_tiles(arguments: AttentionArguments, batch: int, *, by_key: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What each tile of a call's mask shows, and its bits.

    Args:
        arguments: those of a dense call. The mask has one head.
        batch: 1 if all sequences see the same, else their number.
        by_key: whether the rows of the tiles are keys, and their columns queries.

    Returns:
        NOTHING, EVERYTHING or PART, (batch, 1, row tiles, column tiles) int32, and bits, (batch, 1, row tiles, column
        tiles, 128, 4) int32. What lies beyond the ends is hidden.
    """
    assert arguments.mask is not None
    sizes = (arguments.max_seqlen_q, arguments.max_seqlen_k)
    tiles = [triton.cdiv(size, MASK_TILE) for size in (reversed(sizes) if by_key else sizes)]
    shown = arguments.mask.new_empty((batch, 1, *tiles), dtype=torch.int32)
    bits = arguments.mask.new_empty((batch, 1, *tiles, MASK_TILE, MASK_WORDS), dtype=torch.int32)
    _launch_mask_tiles(arguments.mask, (shown, bits), by_key, *_who_sees_whom(arguments).for_launch())
    return shown, bits


def _who_sees_whom(arguments: AttentionArguments) -> AttentionArguments:
    """The arguments that decide who may attend to whom; the others have values that change no kernel."""
    return arguments._replace(
        bias=None,
        relative_bias=None,
        alibi_slopes=None,
        head_scales=None,
        sinks=None,
        scale=1.0,
        softcap=0.0,
        score_mod=None,
        dropout_p=0.0,
        seed=None,
    )


@kept_launch
def _launch_mask_tiles(
    mask: torch.Tensor, outputs: tuple[torch.Tensor, torch.Tensor], by_key: bool, *fields: Any
) -> Launch:
    """Describe the launch that reads a mask.

    Args:
        outputs: what the tiles show, and their bits, to be written.
        fields: the values of `AttentionArguments.for_launch`.
    """
    (shown, bits), arguments = outputs, AttentionArguments.of_launch(fields)
    _, _, row_tiles, column_tiles = shown.shape
    return Launch(
        _mask_tiles_kernel,
        (shown.numel(),),
        {
            "shown_pointer": shown,
            "bits_pointer": bits,
            "row_tiles": row_tiles,
            "column_tiles": column_tiles,
            "queries": arguments.max_seqlen_q,
            "keys": arguments.max_seqlen_k,
            "layout": layout(mask, mask, arguments),
            "features": features(arguments),
            "BOTTOM_RIGHT": arguments.bottom_right,
            "BY_KEY": by_key,
            "num_warps": 8,
            **COMPILER_OPTIONS,
        },
        False,
    )
