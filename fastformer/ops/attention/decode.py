"""Attention of a few new queries over a cache of keys and values: the step of autoregressive generation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from fastformer_kernels.attention.arguments import UNBOUNDED
from fastformer_kernels.attention.decode_arguments import DecodeArguments, cache_shape, empty_decode_results

from fastformer.backends import use_triton
from fastformer.ops.attention.attention import _check_sinks, _check_slopes, _check_window
from fastformer.ops.attention.block_mask import FROM_FLEX, BlockMask, shown_in_rows
from fastformer.ops.attention.cache import check_caches, check_same_places
from fastformer.ops.attention.explicit import largest_score, product_of_visible
from fastformer.ops.attention.flash import is_finite
from fastformer.ops.autocast import to_autocast_dtype, without_autocast
from fastformer.ops.checks import (
    broadcasts,
    check_device,
    check_floating,
    check_int32,
    check_lengths,
    check_no_gradient,
    check_pages,
    check_pages_on_device,
    check_softcap,
    class_name,
)
from fastformer.ops.operator import operator

# The number of key elements that are widened or gathered at once, and of scores held at once: both fit a CPU's cache.
CHUNK_ELEMENTS = 1 << 20
SCORE_ELEMENTS = 1 << 22
NEGATIVE_INFINITY = float("-inf")
_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    lengths: torch.Tensor,
    query_lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    mask: BlockMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    splits: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few queries over a key/value cache whose sequences have different lengths. For inference.

    The queries are the last tokens of their sequences (positions ``lengths - queries`` to ``lengths - 1``): one token
    per step, several for speculative decoding or a chunk of a prompt. `fastformer.append_to_cache` puts their keys and
    values into the cache first. On a GPU the keys of each sequence are split among programs, so that even a few long
    sequences fill it (Flash-Decoding, Dao et al. 2023, https://pytorch.org/blog/flash-decoding/).

    Two layouts of the cache. *Contiguous*: (batch, kv_heads, capacity, head_dim). *Paged*, when `block_table` is given
    (Kwon et al. 2023, https://arxiv.org/abs/2309.06180): (pages, page_size, kv_heads, head_dim). Any strides.

    Args:
        query: (batch, heads, queries, head_dim), float32, float16 or bfloat16; heads a multiple of kv_heads.
        key_cache, value_cache: in one of the layouts, in query's dtype, with a head_dim of up to 576 for keys and 512
            for values. Elements beyond a sequence's length are never used. Values may be a view of the keys, such as
            ``key_cache[..., :512]`` in absorbed multi-head latent attention (DeepSeek-V2): nothing is copied.
        lengths: (batch,) int32, the number of keys of each sequence, including those of the queries; 0 gives zeros.
        query_lengths: (batch,) int32, the number of queries of each sequence (default: all); the rest are padding
            and give zeros.
        block_table: (batch, max_pages) int32, the pages of each sequence in order. Entries beyond its length or wholly
            outside the window of its queries are never read.
        mask: a `fastformer.BlockMask` (batch or 1, kv_heads or 1, capacity, capacity), whose rows and columns are
            positions, so that one serves all steps. It holds together with `causal` and `window`.
        causal, window, softcap, alibi_slopes, sinks: as in `fastformer.attention`, with queries aligned to the end.
        scale: multiplies ``query @ key^T``; default ``1 / sqrt(head_dim)``.
        splits: the number of programs that share the keys of a sequence on a GPU; None chooses by rule from the batch,
            the capacity and the device. A fixed number makes a sequence's result independent of the rest of its batch.
        return_lse: also return the log-sum-exp of the scores, float32, (batch, heads, queries), as
            `fastformer.merge_attention` takes it.

    Returns:
        (batch, heads, queries, value_head_dim) in query's dtype; with `return_lse` also the log-sum-exp. A query that
        may attend to nothing gives zeros (log-sum-exp -inf, or its sink).

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted. A length beyond the
            capacity raises a ValueError on a CPU. On a GPU, where reading it would stall, it fails a device-side
            assertion.
        RuntimeError: a gradient is requested.

    >>> query = torch.randn(2, 8, 1, 64); cache = torch.randn(2, 2, 4096, 64)
    >>> lengths = torch.tensor([1000, 17], dtype=torch.int32)
    >>> fastformer.decode_attention(query, cache, cache, lengths=lengths).shape
    torch.Size([2, 8, 1, 64])
    """
    query = to_autocast_dtype(query)
    tensors = (query, key_cache, value_cache, alibi_slopes, sinks)
    check_no_gradient("decode_attention", tensors, "use fastformer.attention, which takes key_lengths")
    _check_tensors(query, key_cache, value_cache, block_table)
    batch, heads, _, head_dim = query.shape
    check_int32("lengths", lengths, (batch,), "query", query)
    if query_lengths is not None:
        check_int32("query_lengths", query_lengths, (batch,), "query", query)
    check_softcap(softcap)
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, or None to choose by rule; got {splits}")
    left, right = _check_window(window, causal)
    lists, bits = (None, None) if mask is None else _check_mask(mask, key_cache, block_table, query)
    output, lse = _decode_attention(
        query,
        key_cache,
        value_cache,
        lengths.contiguous(),
        None if query_lengths is None else query_lengths.contiguous(),
        block_table,
        _check_slopes(alibi_slopes, batch, heads, query),
        _check_sinks(sinks, heads, query),
        lists,
        bits,
        1.0 / math.sqrt(head_dim) if scale is None else float(scale),
        left,
        right,
        softcap or 0.0,
        splits,
    )
    return (output, lse) if return_lse else output


def _check_tensors(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, block_table: torch.Tensor | None
) -> None:
    check_floating("query", query)
    shape = query.shape
    if len(shape) != 4:
        raise ValueError(f"query must be (batch, heads, queries, head_dim); got shape {tuple(shape)}")
    check_caches(key_cache, value_cache, block_table, "query", query)
    check_same_places(key_cache, value_cache)
    _, first, second, head_dim = key_cache.shape
    if shape[3] != head_dim:
        raise ValueError(f"query and key_cache must have the same head_dim; got {shape[3]} and {head_dim}")
    kv_heads = first if block_table is None else second
    if kv_heads == 0 or shape[1] % kv_heads:
        raise ValueError(f"query's heads must be a multiple of key_cache's; got {shape[1]} and {kv_heads}")


def _check_mask(
    mask: BlockMask, key_cache: torch.Tensor, block_table: torch.Tensor | None, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mask's lists and bits."""
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a fastformer.BlockMask{FROM_FLEX}; got {class_name(mask)}")
    check_device("mask", mask.by_query.lists, "query", query)
    cache = cache_shape(key_cache, block_table)
    heads, capacity = (query.shape[0], cache.kv_heads), (cache.capacity, cache.capacity)
    if not broadcasts(mask.shape[:2], heads) or tuple(mask.shape[2:]) != capacity:
        raise ValueError(
            f"mask must have the sizes (batch or 1, kv_heads or 1, capacity, capacity) of "
            f"{(query.shape[0], cache.kv_heads, cache.capacity, cache.capacity)}; got {mask.shape}"
        )
    return mask.by_query


@operator(
    "fastformer::decode_attention",
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, Tensor? query_lengths, "
        "Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, Tensor? lists, Tensor? bits, float scale, "
        "SymInt left, SymInt right, float softcap, SymInt? splits) -> (Tensor, Tensor)"
    ),
)
def _decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor,
    query_lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    lists: torch.Tensor | None,
    bits: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    splits: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    cache = cache_shape(key_cache, block_table)
    check_lengths("lengths", lengths, "the cache's capacity", cache.capacity)
    if query_lengths is not None:
        check_lengths("query_lengths", query_lengths, "the number of queries", query.shape[2])
    arguments = DecodeArguments(
        lengths, query_lengths, block_table, alibi_slopes, sinks, lists, bits, scale, left, right, softcap
    )
    if block_table is not None and block_table.is_cpu:
        seen = (
            _visible_keys(length, length - count, count, arguments)
            for sequences, length, count in _equal_sequences(query, arguments)
        )
        used = [(keys.start, keys.stop) for keys in seen]
        check_pages(block_table, used, cache.page_size, key_cache.shape[0])
    elif block_table is not None and left == UNBOUNDED:
        check_pages_on_device(block_table, lengths, cache.page_size, key_cache.shape[0])
    if use_triton(query):
        from fastformer_kernels.attention.decode import decode_forward

        return decode_forward(query, key_cache, value_cache, arguments, splits)
    return _decode_torch(query, key_cache, value_cache, arguments)


@_decode_attention.register_fake
def _(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, lengths: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_decode_results(query, value_cache.shape[-1])


@without_autocast
def _decode_torch(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, arguments: DecodeArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    query = query if query.stride(-1) == 1 else query.contiguous()
    # PyTorch's flash attention returns zeros for a non-finite query if there are few keys.
    whole = query.numel() > 0 and arguments.query_lengths is None and (not query.is_cpu or is_finite(query))
    if whole and _fits_flash(key_cache, value_cache, query.shape[2], max(arguments.lengths.tolist()), arguments):
        return _decode_flash(query, key_cache, value_cache, arguments)
    output, lse = empty_decode_results(query, value_cache.shape[-1])
    for sequences, length, queries in _equal_sequences(query, arguments):
        if queries < query.shape[2]:
            output[sequences, :, queries:] = 0.0
            lse[sequences, :, queries:] = NEGATIVE_INFINITY
        rows = max(1, SCORE_ELEMENTS // max(1, (sequences.stop - sequences.start) * query.shape[1] * length))
        for first in range(0, queries, rows):
            some = slice(first, min(first + rows, queries))
            position = length - queries + first
            q = query[sequences, :, some].float()
            part = _attend(q, key_cache, value_cache, sequences, length, position, arguments)
            output[sequences, :, some], lse[sequences, :, some] = part
    return output, lse


def _decode_flash(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, arguments: DecodeArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode with one flash attention call for each run of equal lengths.

    Python overhead is kept minimal: each call takes no longer than the code around it.
    """
    batch, heads, queries, head_dim = query.shape
    packed = query.reshape(batch, cache_shape(key_cache, arguments.block_table).kv_heads, -1, head_dim)
    outputs, lses = [], []
    for sequences, length, _ in _equal_sequences(query, arguments):
        keys = _visible_keys(length, length - queries, queries, arguments)
        output, lse = _flash(packed[sequences], key_cache, value_cache, sequences, keys, arguments)
        outputs.append(output)
        lses.append(lse)
    output, lse = (torch.cat(each) if len(each) > 1 else each[0] for each in (outputs, lses))
    return output.reshape(batch, heads, queries, head_dim), lse.reshape(batch, heads, queries)


def _flash(
    packed: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sequences: slice,
    keys: slice,
    arguments: DecodeArguments,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of (sequences, kv_heads, queries of a group, head_dim) to a range of keys, without a mask."""
    if keys.start == keys.stop:
        nothing = packed.new_full(packed.shape[:-1], NEGATIVE_INFINITY)
        return packed.new_zeros(*packed.shape[:-1], value_cache.shape[-1]), nothing
    key, value = (_cached(cache, arguments.block_table, sequences, keys) for cache in (key_cache, value_cache))
    return _flash_forward(packed, key, value, scale=arguments.scale)


def _equal_sequences(query: torch.Tensor, arguments: DecodeArguments) -> Iterator[tuple[slice, int, int]]:
    """Yield runs of neighbouring sequences of equal lengths, with their numbers of keys and queries.

    In a paged cache each sequence is a run.
    """
    lengths = arguments.lengths.tolist()
    queries = [query.shape[2]] * len(lengths) if arguments.query_lengths is None else arguments.query_lengths.tolist()
    stop = 0
    for (length, count), equal in itertools.groupby(zip(lengths, queries, strict=True)):
        start, stop = stop, stop + len(list(equal))
        step = stop - start if arguments.block_table is None else 1
        for first in range(start, stop, step):
            yield slice(first, first + step), length, count


def _attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sequences: slice,
    length: int,
    position: int,
    arguments: DecodeArguments,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of float32 queries (sequences, heads, queries, head_dim); the first query is at `position`."""
    table, (count, heads, queries, head_dim) = arguments.block_table, q.shape
    kv_heads = cache_shape(key_cache, table).kv_heads
    keys = _visible_keys(length, position, queries, arguments)
    # All query heads that share a key/value head become rows of one product.
    packed = q.reshape(count * kv_heads, heads // kv_heads * queries, head_dim)
    if _fits_flash(key_cache, value_cache, queries, keys.stop - keys.start, arguments) and is_finite(q):
        grouped = packed.unflatten(0, (count, kv_heads))
        output, lse = _flash(grouped, key_cache, value_cache, sequences, keys, arguments)
        return output.reshape(count, heads, queries, -1), lse.reshape(count, heads, queries)

    step = max(1, CHUNK_ELEMENTS // (count * kv_heads * max(head_dim, value_cache.shape[-1])))
    chunks = [slice(start, min(start + step, keys.stop)) for start in range(keys.start, keys.stop, step)]
    products = [torch.bmm(packed, _read(key_cache, table, sequences, chunk).transpose(1, 2)) for chunk in chunks]
    scores = torch.cat(products, -1) if products else packed.new_empty(*packed.shape[:2], 0)
    scores = scores.view(count, heads, queries, keys.stop - keys.start)
    _scale_and_mask(scores, sequences, keys, position, arguments)
    maximum = largest_score(scores, arguments.sinks)
    weights = scores.sub_(maximum).exp_()
    total = weights.sum(-1, keepdim=True)
    if arguments.sinks is not None:
        total += torch.exp(arguments.sinks[:, None, None] - maximum)
    weights = weights.view(*packed.shape[:2], keys.stop - keys.start)
    output = q.new_zeros(*packed.shape[:2], value_cache.shape[-1])
    for chunk in chunks:
        values = _read(value_cache, table, sequences, chunk)
        output.baddbmm_(weights[:, :, chunk.start - keys.start : chunk.stop - keys.start], values)
    visible = _visible(queries, sequences, keys, position, arguments, q.device)
    if visible is not None and q.is_cpu and not is_finite(output):
        # A non-finite value may be one that some of the queries do not see.
        values = _read(value_cache, table, sequences, keys)
        of_group = visible[:, :, None].expand(count, kv_heads, heads // kv_heads, *visible.shape[2:])
        output = product_of_visible(weights, values, of_group.flatten(2, 3).flatten(0, 1))
    output = output.view(count, heads, queries, output.shape[-1]) / total.masked_fill(total == 0.0, 1.0)
    return output, (maximum + total.log()).squeeze(-1)


def _visible_keys(length: int, position: int, queries: int, arguments: DecodeArguments) -> slice:
    """Return the range of keys that at least one of the queries from `position` on sees."""
    low, high = 0, length
    if arguments.left != UNBOUNDED:
        low = max(0, position - arguments.left)
    if arguments.right != UNBOUNDED:
        high = min(length, position + queries + arguments.right)
    return slice(low, max(low, high))


def _fits_flash(
    key_cache: torch.Tensor, value_cache: torch.Tensor, queries: int, keys: int, arguments: DecodeArguments
) -> bool:
    """Whether PyTorch's CPU flash attention can compute this and is faster: in 16 bits it is slow on few rows."""
    return (
        key_cache.is_cpu
        and key_cache.dtype == torch.float32
        and key_cache.shape[-1] == value_cache.shape[-1]
        # Flash attention reads the pages of a sequence gathered together.
        and (arguments.block_table is None or keys * key_cache.shape[2] * key_cache.shape[3] <= CHUNK_ELEMENTS)
        # Flash attention reads neighbouring elements and ignores the last stride.
        and key_cache.stride(-1) == value_cache.stride(-1) == 1
        and (queries == 1 or arguments.left == arguments.right == UNBOUNDED)
        and arguments.softcap == 0.0
        and arguments.alibi_slopes is None
        and arguments.sinks is None
        and arguments.lists is None
    )


def _scale_and_mask(
    scores: torch.Tensor, sequences: slice, keys: slice, position: int, arguments: DecodeArguments
) -> None:
    """Turn products (sequences, heads, queries, keys) into scores, in place."""
    queries = scores.shape[2]
    scores.mul_(arguments.scale)
    if arguments.softcap:
        scores.div_(arguments.softcap).tanh_().mul_(arguments.softcap)
    if arguments.alibi_slopes is not None:
        query_position = torch.arange(position, position + queries, device=scores.device)
        distance = torch.arange(keys.start, keys.stop, device=scores.device) - query_position[:, None]
        slopes = arguments.alibi_slopes if arguments.alibi_slopes.shape[0] == 1 else arguments.alibi_slopes[sequences]
        scores.sub_(slopes[:, :, None, None] * distance.abs())
    visible = _visible(queries, sequences, keys, position, arguments, scores.device)
    if visible is not None:
        of_heads = visible.repeat_interleave(scores.shape[1] // visible.shape[1], 1)
        scores.masked_fill_(~of_heads, NEGATIVE_INFINITY)


def _visible(
    queries: int, sequences: slice, keys: slice, position: int, arguments: DecodeArguments, device: torch.device
) -> torch.Tensor | None:
    """The keys that each query sees, boolean, broadcasting to (sequences, kv_heads, queries, keys); None for all."""
    visible = _visible_by_position(queries, keys, position, arguments, device)
    if arguments.lists is None or arguments.bits is None:
        return None if visible is None else visible[None, None]
    rows = slice(max(position, 0), max(position + queries, 0))
    shown = shown_in_rows(arguments.lists, arguments.bits, sequences, rows, keys.stop)[..., keys]
    # A query before the first position sees nothing.
    shown = torch.nn.functional.pad(shown, (0, 0, queries - (rows.stop - rows.start), 0))
    return shown if visible is None else shown & visible


def _visible_by_position(
    queries: int, keys: slice, position: int, arguments: DecodeArguments, device: torch.device
) -> torch.Tensor | None:
    """The keys that each query sees by position, (queries, keys) boolean; None if each query sees all of them."""
    left, right = arguments.left, arguments.right
    if queries == 1 or left == right == UNBOUNDED:
        return None
    query_position = torch.arange(position, position + queries, device=device)
    distance = torch.arange(keys.start, keys.stop, device=device) - query_position[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left != UNBOUNDED:
        visible &= distance >= -left
    if right != UNBOUNDED:
        visible &= distance <= right
    return visible


def _read(cache: torch.Tensor, block_table: torch.Tensor | None, sequences: slice, keys: slice) -> torch.Tensor:
    """Read some keys of some sequences (of one if paged) as float32 (sequences * kv_heads, keys, head_dim)."""
    return _cached(cache, block_table, sequences, keys).flatten(0, 1).float()


def _cached(cache: torch.Tensor, block_table: torch.Tensor | None, sequences: slice, keys: slice) -> torch.Tensor:
    """Read like `_read`, but as (sequences, kv_heads, keys, head_dim) in the cache's dtype; paged keys are copied."""
    if block_table is None:
        return cache[sequences, :, keys]
    page_size = cache.shape[1]
    first, stop = keys.start // page_size, -(-keys.stop // page_size)
    pages = cache.index_select(0, block_table[sequences.start, first:stop]).flatten(0, 1)
    return pages[keys.start - first * page_size : keys.stop - first * page_size].transpose(0, 1)[None]
