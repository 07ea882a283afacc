"""The attention kernels' arguments in groups. A field that is None is absent at compile time and costs nothing.

No group holds another one: Triton 3.6 forgets the constants of a named tuple within a named tuple.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from fastformer_kernels.attention.decode_arguments import cache_strides


class Operand(NamedTuple):
    """A (batch, heads, rows, head_dim) tensor; packed tokens, (rows, heads, head_dim), have one batch."""

    pointer: torch.Tensor | None
    stride_b: int
    stride_h: int
    stride_row: int
    stride_dim: int


class PageTable(NamedTuple):
    """The pages of each sequence in order, (batch, max_pages) int32; a contiguous cache has none."""

    pointer: torch.Tensor | None
    stride_b: int
    stride_page: int


class Rows(NamedTuple):
    """A (batch, heads, rows) float32 tensor, such as the log-sum-exp."""

    pointer: torch.Tensor | None
    stride_b: int
    stride_h: int
    stride_row: int


class Addend(NamedTuple):
    """A mask, a bias, a bias's gradient or weights: (batch, heads, queries, keys), stride 0 where it broadcasts."""

    pointer: torch.Tensor | None
    stride_b: int
    stride_h: int
    stride_m: int
    stride_n: int


class Relative(NamedTuple):
    """A bias by relative position, or its gradient: (heads, 2 * max_distance + 1), contiguous."""

    pointer: torch.Tensor | None
    max_distance: int


class Statistics(NamedTuple):
    """What the backward needs of each row, laid out as a `Rows`, float32 each.

    Attributes:
        lse_log2: its log-sum-exp in units of log2, +inf for a row without keys, which makes its weights zero.
        delta: rowsum(dO * O) - dLSE.
    """

    lse_log2: torch.Tensor
    delta: torch.Tensor
    stride_b: int
    stride_h: int


class Layout(NamedTuple):
    """Which heads belong together, and how long each sequence is.

    Attributes:
        group: query heads that share a key/value head.
        key_lengths, cu_seqlens_q, cu_seqlens_k, prefix_lengths: those of `AttentionArguments`.
    """

    group: int
    key_lengths: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    prefix_lengths: torch.Tensor | None


class Features(NamedTuple):
    """What turns products of queries and keys into weights.

    Attributes:
        mask, bias: with their strides, those of an `Addend`.
        relative, max_distance: a `Relative`.
        left, right, chunk: whom a query may attend to by position: distances to either side and the chunk's size.
        seed: the dropout generator's state on the device.
        threshold: the random word below which a weight is dropped.
        kept_scale: of the weights that are kept, 1 / (1 - p); 0 where none is to be.
    """

    scale: float
    head_scales: torch.Tensor | None
    softcap: float | None
    mask: torch.Tensor | None
    mask_stride_b: int
    mask_stride_h: int
    mask_stride_m: int
    mask_stride_n: int
    bias: torch.Tensor | None
    bias_stride_b: int
    bias_stride_h: int
    bias_stride_m: int
    bias_stride_n: int
    relative: torch.Tensor | None
    max_distance: int
    slopes: torch.Tensor | None
    slopes_stride_b: int
    left: int | None
    right: int | None
    chunk: int | None
    seed: torch.Tensor | None
    threshold: int
    kept_scale: float


class Sizes(NamedTuple):
    """What a launch has to do. Kernels are not specialised on these numbers, which change from batch to batch.

    Attributes:
        all_tiles: tiles of all heads of all sequences.
        tiles: of a head of the longest sequence.
        heads_in_cache: see `tile_and_row`.
        heads: query heads.
        queries, keys: of the longest sequence.
        query_tokens, key_tokens: of all packed sequences together.
    """

    all_tiles: int
    tiles: int
    heads_in_cache: int
    heads: int
    queries: int
    keys: int
    query_tokens: int
    key_tokens: int


class Constants(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        head_dim, value_dim: of queries and keys, and of values.
        BLOCK_M, BLOCK_N: queries and keys of a tile.
        BLOCK_D, BLOCK_V: powers of two that hold head_dim and value_dim.
        BOTTOM_RIGHT: whether a query's position counts from the sequence's end, not from its start.
        FOLD_SCALE: whether exp2's multiply-add takes the scale; see `folds_scale`.
        INPUT_PRECISION: of products.
        LOOPS: how a kernel walks over its tiles: UNTESTED, TWO_LOOPS or ONE_LOOP of `tiles`.
        PERSISTENT: whether a program takes one tile after another.
        DESCRIPTORS: whether tiles are loaded by tensor descriptors (the bulk copy engine).
        WARP_SPECIALIZE: whether copies and products go to warps of their own.
    """

    head_dim: int
    value_dim: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_V: int
    BOTTOM_RIGHT: bool
    FOLD_SCALE: bool
    INPUT_PRECISION: str
    LOOPS: int
    PERSISTENT: bool
    DESCRIPTORS: bool
    WARP_SPECIALIZE: bool


def operand(tensor: torch.Tensor | None) -> Operand:
    """`tensor`, dense or packed."""
    if tensor is None:
        return Operand(None, 0, 0, 0, 0)
    if tensor.dim() == 3:
        return Operand(tensor, 0, tensor.stride(1), tensor.stride(0), tensor.stride(2))
    return Operand(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3))


def cache_operand(cache: torch.Tensor, block_table: torch.Tensor | None) -> Operand:
    """A cache, whose first dimension is its pages: a contiguous one has a page for each sequence."""
    return Operand(cache, *cache_strides(cache, block_table))


def page_table(block_table: torch.Tensor | None) -> PageTable:
    """Where the pages of each sequence are."""
    return PageTable(block_table, *((0, 0) if block_table is None else block_table.stride()))


def rows(tensor: torch.Tensor | None) -> Rows:
    """A log-sum-exp or the like, dense (batch, heads, queries) or packed (heads, total_tokens)."""
    if tensor is None:
        return Rows(None, 0, 0, 0)
    stride_b = 0 if tensor.dim() == 2 else tensor.stride(0)
    return Rows(tensor, stride_b, tensor.stride(-2), tensor.stride(-1))


def addend(tensor: torch.Tensor | None) -> Addend:
    """A 4-D tensor that broadcasts to (batch, heads, queries, keys)."""
    if tensor is None:
        return Addend(None, 0, 0, 0, 0)
    return Addend(tensor, *(0 if size == 1 else s for size, s in zip(tensor.shape, tensor.stride(), strict=True)))


def relative(tensor: torch.Tensor | None) -> Relative:
    """A bias by relative position."""
    return Relative(tensor, 0 if tensor is None else tensor.shape[1] // 2)


def sizes(
    query: torch.Tensor,
    key: torch.Tensor,
    arguments: AttentionArguments,
    *,
    all_tiles: int,
    tiles: int,
    heads_in_cache: int,
) -> Sizes:
    """The sizes of a launch."""
    longest = (arguments.max_seqlen_q, arguments.max_seqlen_k)
    return Sizes(all_tiles, tiles, heads_in_cache, query.shape[1], *longest, query.shape[0], key.shape[0])


def layout(query: torch.Tensor, key: torch.Tensor, arguments: AttentionArguments) -> Layout:
    """Which heads belong together, and how long each sequence is."""
    return Layout(
        query.shape[1] // key.shape[1],
        arguments.key_lengths,
        arguments.cu_seqlens_q,
        arguments.cu_seqlens_k,
        arguments.prefix_lengths,
    )


def statistics(lse_log2: torch.Tensor, delta: torch.Tensor) -> Statistics:
    """What the backward needs of each row; both are laid out alike, rows next to each other."""
    _, stride_b, stride_h, _ = rows(lse_log2)
    return Statistics(lse_log2, delta, stride_b, stride_h)


def features(arguments: AttentionArguments) -> Features:
    """What turns products of queries and keys into weights."""
    slopes = arguments.alibi_slopes
    return Features(
        arguments.scale,
        arguments.head_scales,
        arguments.softcap or None,
        *addend(arguments.mask),
        *addend(arguments.bias),
        *relative(arguments.relative_bias),
        slopes,
        slopes_stride_b=0 if slopes is None or slopes.shape[0] == 1 else slopes.stride(0),
        left=None if arguments.left == UNBOUNDED else arguments.left,
        right=None if arguments.right == UNBOUNDED else arguments.right,
        chunk=arguments.chunk or None,
        seed=arguments.seed,
        threshold=min(round(arguments.dropout_p * 2**32), 2**32 - 1),
        kept_scale=1.0 / (1.0 - arguments.dropout_p) if arguments.dropout_p < 1.0 else 0.0,
    )


def folds_scale(arguments: AttentionArguments) -> bool:
    """Whether exp2's multiply-add can take the scale: nothing is added to the scores, and their order is kept."""
    return (
        arguments.scale > 0.0
        and arguments.head_scales is None
        and not arguments.softcap
        and arguments.bias is None
        and arguments.relative_bias is None
        and arguments.alibi_slopes is None
    )
