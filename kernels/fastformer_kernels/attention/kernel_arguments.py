"""Groups of arguments of the attention kernels. A field that is None is absent at compile time and costs nothing.

No group contains another one: Triton 3.6 loses the constants of a named tuple inside a named tuple.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from fastformer_kernels.attention.decode_arguments import cache_strides
from fastformer_kernels.dropout_numbers import dropout_threshold, kept_scale


class Operand(NamedTuple):
    """A (batch, heads, rows, head_dim) tensor; packed tokens, (rows, heads, head_dim), are a batch of one."""

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
    """A mask, a bias, its gradient or weights: (batch, heads, queries, keys). A broadcast dimension has stride 0."""

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
    """The two numbers of each row that the backward needs, float32, each laid out like a `Rows`.

    Attributes:
        lse_log2: the row's log-sum-exp in units of log2. It is +inf for a row without keys, which makes its weights
            zero.
        delta: rowsum(dO * O) - dLSE.
    """

    lse_log2: torch.Tensor
    delta: torch.Tensor
    stride_b: int
    stride_h: int


class Layout(NamedTuple):
    """The grouping of the heads and the lengths of the sequences.

    Attributes:
        group: number of query heads that share a key/value head.
        key_lengths, cu_seqlens_q, cu_seqlens_k, prefix_lengths: those of `AttentionArguments`.
    """

    group: int
    key_lengths: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    prefix_lengths: torch.Tensor | None


class Features(NamedTuple):
    """The features of a call: everything that changes how products of queries and keys become weights.

    Attributes:
        mask, bias: the fields of an `Addend` each.
        relative, max_distance: the fields of a `Relative`.
        left, right, chunk: limits by position on the keys of a query: distances to both sides, and the chunk's size.
        seed: the dropout generator's state on the device.
        threshold: a weight is dropped if its random word is below this.
        kept_scale: the factor of the weights that are kept, 1 / (1 - p); 0 for p = 1.
        lists, bits: a block mask's lists of the tiles that the kernel's own tiles meet, and its bits.
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
    lists: torch.Tensor | None
    lists_stride_b: int
    lists_stride_h: int
    lists_stride_tile: int
    bits: torch.Tensor | None


class Sizes(NamedTuple):
    """The sizes of a launch. They change from batch to batch, so kernels are not specialised on them.

    Attributes:
        all_tiles: number of tiles of all heads of all sequences.
        tiles: number of tiles of a head of the longest sequence.
        heads_in_cache: see `tile_and_row`.
        heads: number of query heads.
        queries, keys: lengths of the longest sequence.
        query_tokens, key_tokens: number of tokens of all packed sequences together.
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
    """The compile-time constants of a kernel.

    Attributes:
        head_dim, value_dim: columns of queries and keys, and of values.
        BLOCK_M, BLOCK_N: queries and keys of a tile.
        BLOCK_D, BLOCK_V: powers of two, at least head_dim and value_dim.
        BOTTOM_RIGHT: `bottom_right` of `AttentionArguments`.
        FOLD_SCALE: whether exp2's multiply-add takes the scale; see `folds_scale`.
        INPUT_PRECISION: the precision of products.
        LOOPS: the kind of loops over tiles: UNTESTED, TWO_LOOPS or ONE_LOOP of `tiles`.
        PERSISTENT: whether a program takes one tile after another.
        DESCRIPTORS: whether tiles are loaded by tensor descriptors (the bulk copy engine).
        WARP_SPECIALIZE: whether copies and products have separate warps.
        LAZY_RESCALE: whether the forward rescales its sums only where a maximum has grown much: see `lazy_rescaling`.
        WHOLE_TENSORS: whether a program makes one descriptor of each tensor for all its tiles, else one for each tile.
        SCORE_MOD: the `source` of a `ScoreMod`, by which Triton tells its kernels from those of others; or None.
        MOD_SCORES, MOD_GRADIENT: its functions.
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
    LAZY_RESCALE: bool
    WHOLE_TENSORS: bool
    HOIST: bool
    SCORE_MOD: str | None
    MOD_SCORES: Any
    MOD_GRADIENT: Any


def operand(tensor: torch.Tensor | None) -> Operand:
    """`tensor`, dense or packed, as kernels take it."""
    if tensor is None:
        return Operand(None, 0, 0, 0, 0)
    if tensor.dim() == 3:
        return Operand(tensor, 0, tensor.stride(1), tensor.stride(0), tensor.stride(2))
    return Operand(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3))


def cache_operand(cache: torch.Tensor, block_table: torch.Tensor | None) -> Operand:
    """A cache as kernels take it. Its first dimension is pages; a contiguous cache has one page for each sequence."""
    return Operand(cache, *cache_strides(cache, block_table))


def page_table(block_table: torch.Tensor | None) -> PageTable:
    """The pages of each sequence as kernels take them."""
    return PageTable(block_table, *((0, 0) if block_table is None else block_table.stride()))


def rows(tensor: torch.Tensor | None) -> Rows:
    """A log-sum-exp or the like, dense (batch, heads, queries) or packed (heads, total_tokens)."""
    if tensor is None:
        return Rows(None, 0, 0, 0)
    stride_b = 0 if tensor.dim() == 2 else tensor.stride(0)
    return Rows(tensor, stride_b, tensor.stride(-2), tensor.stride(-1))


def addend(tensor: torch.Tensor | None) -> Addend:
    """A 4-D tensor that broadcasts to (batch, heads, queries, keys), as kernels take it."""
    if tensor is None:
        return Addend(None, 0, 0, 0, 0)
    return Addend(tensor, *(0 if size == 1 else s for size, s in zip(tensor.shape, tensor.stride(), strict=True)))


def relative(tensor: torch.Tensor | None) -> Relative:
    """A bias by relative position as kernels take it."""
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
    """The grouping of the heads and the lengths of the sequences."""
    return Layout(
        query.shape[1] // key.shape[1],
        arguments.key_lengths,
        arguments.cu_seqlens_q,
        arguments.cu_seqlens_k,
        arguments.prefix_lengths,
    )


def statistics(lse_log2: torch.Tensor, delta: torch.Tensor) -> Statistics:
    """The numbers of each row that the backward needs. Both tensors have the same layout, with contiguous rows."""
    _, stride_b, stride_h, _ = rows(lse_log2)
    return Statistics(lse_log2, delta, stride_b, stride_h)


def features(arguments: AttentionArguments, *, by_key: bool = False) -> Features:
    """The features of a call as kernels take them; `by_key` for a kernel whose programs own tiles of keys."""
    slopes = arguments.alibi_slopes
    lists = arguments.key_lists if by_key else arguments.query_lists
    bits = arguments.key_bits if by_key else arguments.query_bits
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
        threshold=dropout_threshold(arguments.dropout_p),
        kept_scale=kept_scale(arguments.dropout_p),
        lists=lists,
        lists_stride_b=0 if lists is None or lists.shape[0] == 1 else lists.stride(0),
        lists_stride_h=0 if lists is None or lists.shape[1] == 1 else lists.stride(1),
        lists_stride_tile=0 if lists is None else lists.stride(2),
        bits=bits,
    )


def folds_scale(arguments: AttentionArguments) -> bool:
    """True if exp2's multiply-add can take the scale: nothing is added to scores, and the scale keeps their order."""
    return (
        arguments.scale > 0.0
        and arguments.head_scales is None
        and not arguments.softcap
        and arguments.score_mod is None
        and arguments.bias is None
        and arguments.relative_bias is None
        and arguments.alibi_slopes is None
    )
