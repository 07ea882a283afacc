"""Attention forward: O = softmax(S) V with S = softcap(scale Q K^T) + bias, masked, and its log-sum-exp.

FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691): a program owns a tile of queries and takes one tile of
keys after another with an online softmax. Where the compiler can give copies and products warps of their own, there is
one loop, which tests every tile if some need a test. Else tiles in which causality, window, chunk and length exclude
nothing have a separate loop without tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import AttentionArguments, empty_lse, empty_output
from fastformer_kernels.attention.kernel_arguments import Sizes, features, layout, operand, rows, sizes
from fastformer_kernels.attention.launch import (
    constants_of_call,
    describes_whole_tensors,
    forward_configuration,
    heads_in_cache,
    launch_size,
    loops_of,
    needs_tests,
    specializes_warps,
    uses_descriptors,
    with_aligned_rows,
)
from fastformer_kernels.attention.lazy_rescaling import lazily_rescaled, lazy_maximum
from fastformer_kernels.attention.tiles import (
    ONE_LOOP,
    UNTESTED,
    HeadFeatures,
    Span,
    at_head,
    bias_and_mask,
    bias_at_head,
    bits_at,
    dropout_keep,
    hide,
    key_bounds,
    key_limits,
    key_ranges,
    listed_at,
    listed_ranges,
    load_rows,
    mask_at_head,
    place_in_tensor,
    prefix_length,
    query_bounds,
    relative_at_head,
    rows_of,
    scale_of,
    scores_of,
    slope_of,
    store_rows,
    tensor_rows,
    tile_and_row,
    tile_start,
    tiles_ahead,
    tiles_in,
)
from fastformer_kernels.constants import LN_2, LOG2_E
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.precision import dot, input_precision, round_to


class _OnlineSoftmax(NamedTuple):
    """The sums over the keys so far, for each query of a tile.

    Attributes:
        accumulator: (BLOCK_M, BLOCK_V), the sum of values, weighted by exp2(score - maximum).
        maximum: (BLOCK_M,), the greatest score in units of log2, or near it with LAZY_RESCALE.
        total: (BLOCK_M,), the sum of the weights.
    """

    accumulator: Any
    maximum: Any
    total: Any


class _Sources(NamedTuple):
    """The memory that tiles are loaded from: pointers or tensor descriptors, and a head's place in a descriptor."""

    k: Any
    v: Any
    k_row: Any
    k_column: Any
    v_row: Any
    v_column: Any


class _Tensors(NamedTuple):
    """Descriptors of whole tensors, which a program makes once for all its tiles."""

    q: Any
    k: Any
    v: Any


class _Place(NamedTuple):
    """The tile of queries that meets the keys.

    Attributes:
        first_query: the first query of the tile.
        batch, head: indices of its sequence and head.
        dropout_row: the number of (batch, head), for the random words.
    """

    first_query: Any
    batch: Any
    head: Any
    dropout_row: Any


@triton.jit
def _attend(
    softmax, q_tile, sources, k, v, place, ranges, span, head_features, features, constants, TESTED: tl.constexpr
):
    """Add tiles of keys to an `_OnlineSoftmax`: those that need a test if TESTED, else those that need none."""
    accumulator, maximum, total = softmax
    multiplier = head_features.scale * LOG2_E if constants.FOLD_SCALE else 1.0
    query = (place.first_query + tl.arange(0, constants.BLOCK_M))[:, None]
    limits = key_limits(query, span, features)
    for index in tl.range(0, tiles_in(ranges, TESTED, constants.BLOCK_N), warp_specialize=constants.WARP_SPECIALIZE):
        start = tile_start(index, ranges, head_features.listed, TESTED, constants.BLOCK_N)
        key_tile = load_rows(
            sources.k,
            start,
            span.keys,
            k,
            constants.head_dim,
            constants.BLOCK_N,
            constants.BLOCK_D,
            TESTED,
            constants.DESCRIPTORS,
            sources.k_row,
            sources.k_column,
        )
        zeros = tl.zeros((constants.BLOCK_M, constants.BLOCK_N), tl.float32)
        products = dot(q_tile, tl.trans(key_tile), zeros, constants.INPUT_PRECISION)
        scores = scores_of(products, head_features.scale, features, constants.FOLD_SCALE)
        key = (start + tl.arange(0, constants.BLOCK_N))[None, :]
        if constants.SCORE_MOD is not None:
            scores = constants.MOD_SCORES(scores * LN_2, place.batch, place.head, query, key) * LOG2_E
        bits = bits_at(features, head_features.listed, place.first_query, index, start, TESTED, constants.BLOCK_N)
        scores = bias_and_mask(scores, query, key, span, head_features, bits, features)
        if TESTED and bits is None:
            scores = hide(scores, start, limits, features, True)
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * multiplier)
        if constants.LAZY_RESCALE:
            new_maximum = lazy_maximum(new_maximum, maximum)
        shift = new_maximum
        if (
            TESTED
            or head_features.mask is not None
            or head_features.bias is not None
            or head_features.relative is not None
            or constants.SCORE_MOD is not None
        ):
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores * multiplier - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        if constants.LAZY_RESCALE:
            accumulator = lazily_rescaled(accumulator, rescale[:, None], constants.BLOCK_V)
        total = total * rescale + tl.sum(weights, axis=1)
        if features.seed is not None:
            keep = dropout_keep(
                features, place.dropout_row, place.first_query, start, constants.BLOCK_M, constants.BLOCK_N
            )
            weights = tl.where(keep, weights, 0.0)
        value_tile = load_rows(
            sources.v,
            start,
            span.keys,
            v,
            constants.value_dim,
            constants.BLOCK_N,
            constants.BLOCK_V,
            TESTED,
            constants.DESCRIPTORS,
            sources.v_row,
            sources.v_column,
        )
        weights = round_to(weights, value_tile.dtype)
        if not constants.LAZY_RESCALE:
            accumulator *= rescale[:, None]
        accumulator = dot(weights, value_tile, accumulator, constants.INPUT_PRECISION)
        maximum = new_maximum
    return _OnlineSoftmax(accumulator, maximum, total)


@triton.jit(do_not_specialize=Sizes._fields)
def _attention_forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    sinks_pointer,
    all_tiles,
    tiles,
    heads_in_cache,
    heads,
    queries,
    keys,
    query_tokens,
    key_tokens,
    layout,
    features,
    constants,
):
    """Compute O = softmax(S) V with S = softcap(scale Q K^T) + bias, masked, and the log-sum-exp of its rows.

    Args:
        q, k, v, o: an `Operand` each; o is written.
        lse: a `Rows`, written.
        sinks_pointer: (heads,) float32, one more logit of each head, which has no value; or None.
        all_tiles, tiles, heads_in_cache, heads, queries, keys, query_tokens, key_tokens: the fields of a `Sizes`.
            They are separate arguments, since Triton specialises on every number in a tuple.
        layout, features, constants: a `Layout`, a `Features`, a `Constants`.
    """
    sizes = Sizes(all_tiles, tiles, heads_in_cache, heads, queries, keys, query_tokens, key_tokens)
    whole = None
    if constants.WHOLE_TENSORS:
        kv_heads = heads // layout.group
        whole = _Tensors(
            tensor_rows(q, query_tokens, heads, queries, constants.BLOCK_M, constants.BLOCK_D),
            tensor_rows(k, key_tokens, kv_heads, keys, constants.BLOCK_N, constants.BLOCK_D),
            tensor_rows(v, key_tokens, kv_heads, keys, constants.BLOCK_N, constants.BLOCK_V),
        )
    stop, step = tiles_ahead(all_tiles, constants.PERSISTENT)
    for ahead in range(0, stop, step):
        number = tl.program_id(0) + ahead
        _forward_tile(q, k, v, o, lse, sinks_pointer, whole, number, sizes, layout, features, constants)


@triton.jit
def _forward_tile(q, k, v, o, lse, sinks_pointer, whole, number, sizes, layout, features, constants):
    """Compute output and log-sum-exp of tile number `number`: some queries of one head of one sequence."""
    DESCRIPTORS: tl.constexpr = constants.DESCRIPTORS
    BLOCK_M: tl.constexpr = constants.BLOCK_M
    BLOCK_N: tl.constexpr = constants.BLOCK_N
    BLOCK_D: tl.constexpr = constants.BLOCK_D
    BLOCK_V: tl.constexpr = constants.BLOCK_V
    rank, row = tile_and_row(number, sizes)
    head = (row % sizes.heads).to(tl.int64)
    batch = (row // sizes.heads).to(tl.int64)
    # Under causality the last queries meet the most keys.
    first = (sizes.tiles - 1 - rank) * BLOCK_M
    q_start, queries = query_bounds(batch, layout, sizes.queries, sizes.query_tokens)
    k_start, keys, _ = key_bounds(batch, layout, sizes.keys, sizes.key_tokens)
    span = Span(queries, keys, keys - queries if constants.BOTTOM_RIGHT else 0, prefix_length(batch, layout))
    kv_head = head // layout.group
    q_row, q_column, k_row, k_column, v_row, v_column = 0, 0, 0, 0, 0, 0
    if constants.WHOLE_TENSORS:
        q_source, k_source, v_source = whole
        q_row, q_column = place_in_tensor(q, batch, head)
        k_row, k_column = place_in_tensor(k, batch, kv_head)
        v_row, v_column = place_in_tensor(v, batch, kv_head)
    else:
        k_pointer = at_head(k, batch, kv_head, k_start)
        v_pointer = at_head(v, batch, kv_head, k_start)
        k_source = rows_of(k_pointer, keys, k, constants.head_dim, BLOCK_N, BLOCK_D, DESCRIPTORS)
        v_source = rows_of(v_pointer, keys, v, constants.value_dim, BLOCK_N, BLOCK_V, DESCRIPTORS)
        q_pointer = at_head(q, batch, head, q_start)
        q_source = rows_of(q_pointer, queries, q, constants.head_dim, BLOCK_M, BLOCK_D, DESCRIPTORS)
    # An empty sequence's descriptor has one row, which does not exist: start after it.
    q_first = tl.where(first < queries, first, tl.maximum(first, 1))
    q_tile = load_rows(
        q_source, q_first, queries, q, constants.head_dim, BLOCK_M, BLOCK_D, True, DESCRIPTORS, q_row, q_column
    )
    head_features = HeadFeatures(
        scale_of(features, head),
        slope_of(features, batch, head),
        mask_at_head(features, batch, head),
        bias_at_head(features, batch, head),
        relative_at_head(features, head),
        listed_at(features, batch, head, first),
    )
    query = first + tl.arange(0, BLOCK_M)

    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_pointer is not None:
        maximum = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_pointer + head) * LOG2_E
        total = tl.where(maximum == float("-inf"), 0.0, 1.0)
    if features.lists is not None:
        ranges = listed_ranges(head_features.listed)
    else:
        ranges = key_ranges(first, span, features, constants)
    softmax = _OnlineSoftmax(accumulator, maximum, total)
    sources = _Sources(k_source, v_source, k_row, k_column, v_row, v_column)
    place = _Place(first, batch, head, batch * sizes.heads + head)
    for tested in tl.static_range(1 if constants.LOOPS == ONE_LOOP else 0, 1 if constants.LOOPS == UNTESTED else 2):
        softmax = _attend(
            softmax, q_tile, sources, k, v, place, ranges, span, head_features, features, constants, tested == 1
        )
    accumulator, maximum, total = softmax
    empty = total == 0.0
    output = accumulator * (features.kept_scale / tl.where(empty, 1.0, total))[:, None]
    row_lse = tl.where(empty, float("-inf"), maximum * LN_2 + tl.log(tl.where(empty, 1.0, total)))
    lse_pointer = lse.pointer + batch * lse.stride_b + head * lse.stride_h + q_start
    tl.store(lse_pointer + query, row_lse, mask=query < queries)
    o_pointer = at_head(o, batch, head, q_start)
    store_rows(o_pointer, output, first, queries, o, constants.value_dim, BLOCK_M, BLOCK_V)


def attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp of checked arguments, in the layouts of `AttentionArguments`."""
    output, lse = empty_output(query, value), empty_lse(query)
    if query.numel():
        precision = input_precision(query.dtype)
        query, key, value = with_aligned_rows(query, key, value)
        _launch_forward(query, key, value, (output, lse), precision, *arguments.for_launch())
    return output, lse


@kept_launch
def _launch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    outputs: tuple[torch.Tensor, torch.Tensor],
    precision: str,  # The kernel's constants depend on it, so it distinguishes kinds of calls.
    *fields: Any,
) -> Launch | None:
    """Describe the launch of a forward, or return None if there are no queries.

    Args:
        outputs: the output and the log-sum-exp, to be written.
        fields: the values of `AttentionArguments.for_launch`.
    """
    (output, lse), arguments = outputs, AttentionArguments.of_launch(fields)
    configuration = forward_configuration(query, key, value, arguments)
    tiles = triton.cdiv(arguments.max_seqlen_q, configuration.block_m)
    all_tiles = tiles * query.shape[1] * arguments.batch(query)
    if all_tiles == 0:
        return None
    descriptors = configuration.descriptors and uses_descriptors(query, key, value)
    loops = loops_of(configuration, arguments, needs_tests(arguments, arguments.max_seqlen_k, configuration.block_n))
    programs = launch_size(all_tiles, query, arguments, configuration)
    together = heads_in_cache(key, value, arguments)
    return Launch(
        _attention_forward_kernel,
        (programs,),
        {
            "q": operand(query),
            "k": operand(key),
            "v": operand(value),
            "o": operand(output),
            "lse": rows(lse),
            "sinks_pointer": arguments.sinks,
            **sizes(query, key, arguments, all_tiles=all_tiles, tiles=tiles, heads_in_cache=together)._asdict(),
            "layout": layout(query, key, arguments),
            "features": features(arguments),
            "constants": constants_of_call(
                query,
                value,
                arguments,
                configuration,
                loops=loops,
                persistent=programs < all_tiles,
                descriptors=descriptors,
                warp_specialize=descriptors and specializes_warps(configuration, arguments, loops),
                whole_tensors=descriptors
                and programs < all_tiles
                and describes_whole_tensors(query, key, value, arguments, configuration),
            ),
            **configuration.options,
        },
        descriptors,
    )
