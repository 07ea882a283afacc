"""Attention of a few queries over a long cache: O = softmax(S) V, S = softcap(scale Q K^T) - slope |distance|, masked.

Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023, https://pytorch.org/blog/flash-decoding/): the keys of a sequence
are split among programs, since otherwise there would be too few programs to fill a GPU. Each program stores its output
and log-sum-exp, and `merge` combines them. All query heads that share a key/value head, with all tokens of a
speculative query, are the rows of one tile. So the cache is read once for all of them, and a tensor core has enough
rows. Paged caches (Kwon et al. 2023, https://arxiv.org/abs/2309.06180) differ only in the addresses of keys and values.

Reading the cache limits the speed. One loop tests every tile: a second loop for border tiles would drain the pipeline
of loads, which costs more than the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import UNBOUNDED
from fastformer_kernels.attention.decode_arguments import (
    CacheShape,
    DecodeArguments,
    cache_shape,
    empty_decode_results,
)
from fastformer_kernels.attention.kernel_arguments import cache_operand, operand, page_table
from fastformer_kernels.attention.merge import merge_launch
from fastformer_kernels.attention.tiles import HEADER, TILE, WORD, WORDS, shown_by_bits, tanh
from fastformer_kernels.configurations import chosen, size_class
from fastformer_kernels.constants import LN_2, LOG2_E, constants
from fastformer_kernels.kept_launches import Launch, kept_choice, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS, architecture_of, multiprocessors_of
from fastformer_kernels.precision import dot, input_precision, round_to

SMALLEST_BLOCK_M = 16


@dataclass(frozen=True)
class DecodeConfiguration:
    """The launch configuration of the decode kernel.

    Attributes:
        block_n: keys in a tile.
        most_rows: the largest number of rows of a tile; it has fewer if the call needs fewer.
        num_warps, num_stages: the compiler's options.
        programs: the number of programs for each multiprocessor when keys are split: two keep the memory pipeline full
            while one of them starts or ends.
        tiles_per_split: the least number of tiles of a split. A split with fewer costs more time for its start and for
            the merge than it saves.
    """

    block_n: int
    most_rows: int
    num_warps: int
    num_stages: int
    programs: int = 2
    tiles_per_split: int = 4

    def block_m(self, rows: int) -> int:
        """Rows of a tile if a key/value head has `rows` rows of queries. A tile of a product has at least 16."""
        return min(max(triton.next_power_of_2(rows), SMALLEST_BLOCK_M), self.most_rows)


# Configurations by element size and by the largest head_dim that each serves. float32 products do not use tensor cores,
# so more rows in a tile would only cost registers.
_LARGE_SHARED_MEMORY = {
    2: {
        64: DecodeConfiguration(64, 64, 4, 4),
        128: DecodeConfiguration(64, 64, 4, 3),
        256: DecodeConfiguration(32, 32, 4, 3),
        576: DecodeConfiguration(32, 32, 8, 2),
    },
    4: {
        64: DecodeConfiguration(32, 16, 8, 3),
        128: DecodeConfiguration(32, 16, 8, 3),
        256: DecodeConfiguration(32, 16, 8, 3),
        576: DecodeConfiguration(16, 16, 8, 2),
    },
}
# For 99 KiB of shared memory.
_SMALL_SHARED_MEMORY = {
    2: {
        64: DecodeConfiguration(64, 64, 4, 4),
        128: DecodeConfiguration(64, 32, 4, 3),
        256: DecodeConfiguration(32, 32, 4, 3),
        576: DecodeConfiguration(16, 32, 8, 2),
    },
    4: {
        64: DecodeConfiguration(32, 16, 8, 3),
        128: DecodeConfiguration(32, 16, 8, 3),
        256: DecodeConfiguration(16, 16, 8, 3),
        576: DecodeConfiguration(16, 16, 8, 1),
    },
}
_AMD = {
    2: {
        64: DecodeConfiguration(64, 64, 4, 2),
        128: DecodeConfiguration(64, 32, 4, 2),
        256: DecodeConfiguration(32, 32, 4, 2),
        576: DecodeConfiguration(16, 32, 4, 1),
    },
    4: {
        64: DecodeConfiguration(32, 32, 4, 2),
        128: DecodeConfiguration(32, 16, 4, 2),
        256: DecodeConfiguration(16, 16, 4, 2),
        576: DecodeConfiguration(16, 16, 4, 1),
    },
}
_BY_ARCHITECTURE = {
    "sm_80": _LARGE_SHARED_MEMORY,
    "sm_86": _SMALL_SHARED_MEMORY,
    "sm_89": _SMALL_SHARED_MEMORY,
    "sm_90": _LARGE_SHARED_MEMORY,
    "sm_100": _LARGE_SHARED_MEMORY,
    "sm_120": _SMALL_SHARED_MEMORY,
    "gfx90a": _AMD,
    "gfx942": _AMD,
    "gfx950": _AMD,
    # Small tiles, so that small tests have several of them.
    "interpreter": {size: {576: DecodeConfiguration(16, 16, 1, 1)} for size in (2, 4)},
}

MOST_SPLITS = 128
# Upper bounds of the classes of sequences times query heads whose launches are measured.
ROW_CLASSES = (64, 512)


class DecodeFeatures(NamedTuple):
    """The features that turn products of queries and keys into weights.

    Attributes:
        slopes, slopes_stride_b: the slopes of ALiBi, (1 or batch, heads) float32 or None, and their batch stride.
        sinks: (heads,) float32, or None.
        left, right: how far before and after its own position a query may attend, if the constants bound that side.
        lists, bits: a block mask's lists of the tiles that each tile of positions sees, and its bits; or None.
    """

    scale: float
    softcap: float
    left: int
    right: int
    slopes: torch.Tensor | None
    slopes_stride_b: int
    sinks: torch.Tensor | None
    lists: torch.Tensor | None
    lists_stride_b: int
    lists_stride_h: int
    lists_stride_tile: int
    bits: torch.Tensor | None


class DecodeConstants(NamedTuple):
    """The compile-time constants of the kernel.

    Attributes:
        PAGE_SIZE: keys of a page; 1 without pages.
        GROUP: number of query heads that share a key/value head.
        head_dim, value_dim: elements of a key and of a value.
        LEFT_BOUNDED, RIGHT_BOUNDED, SOFTCAP: whether the call has these features.
        INPUT_PRECISION: the precision of products.
        BLOCK_M, BLOCK_N: rows and keys of a tile.
        BLOCK_D, BLOCK_REST: the two parts of a key, from `_parts_of`; BLOCK_REST is 0 if there is one part.
        BLOCK_V: a power of two, at least value_dim.
    """

    PAGE_SIZE: int
    GROUP: int
    head_dim: int
    value_dim: int
    LEFT_BOUNDED: bool
    RIGHT_BOUNDED: bool
    SOFTCAP: bool
    INPUT_PRECISION: str
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_REST: int
    BLOCK_V: int


@triton.jit
def _columns(operand, first: tl.constexpr, head_dim: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of the columns [first, first + BLOCK) of an `Operand`, and whether its matrix has them; (1, BLOCK)."""
    dim = first + tl.arange(0, BLOCK)
    return dim.to(tl.int64)[None, :] * operand.stride_dim, (dim < head_dim)[None, :]


@triton.jit
def _decode_kernel(
    q,
    k,
    v,
    output_pointer,
    lse_pointer,
    lengths_pointer,
    query_lengths_pointer,
    table,
    row_tiles,
    splits,
    kv_heads,
    queries,
    total_rows,
    capacity,
    pages,
    features,
    constants,
):
    """Compute the output O and the log-sum-exp for the keys of one split.

    O = softmax(S) V, S = softcap(scale Q K^T) - slope |distance|, masked. Rows are (query, query head of the group).
    The head changes fastest, so that a tile covers few positions.

    Args:
        q, k, v: an `Operand` each; the first dimension of the caches k and v is pages.
        output_pointer, lse_pointer: (splits, total_rows, value_dim) and (splits, total_rows), contiguous, written.
        lengths_pointer, query_lengths_pointer: (batch,) int32, number of keys and of queries of each sequence;
            query_lengths_pointer may be None.
        table: a `PageTable`.
        row_tiles, splits: number of tiles of a key/value head's rows, and of programs that share its keys.
        kv_heads, queries, capacity, pages: sizes of queries and caches.
        total_rows: number of rows of all sequences and heads.
        features, constants: a `DecodeFeatures`, a `DecodeConstants`.
    """
    PAGE_SIZE: tl.constexpr = constants.PAGE_SIZE
    GROUP: tl.constexpr = constants.GROUP
    head_dim: tl.constexpr = constants.head_dim
    value_dim: tl.constexpr = constants.value_dim
    LEFT_BOUNDED: tl.constexpr = constants.LEFT_BOUNDED
    RIGHT_BOUNDED: tl.constexpr = constants.RIGHT_BOUNDED
    INPUT_PRECISION: tl.constexpr = constants.INPUT_PRECISION
    BLOCK_M: tl.constexpr = constants.BLOCK_M
    BLOCK_N: tl.constexpr = constants.BLOCK_N
    BLOCK_D: tl.constexpr = constants.BLOCK_D
    BLOCK_REST: tl.constexpr = constants.BLOCK_REST
    BLOCK_V: tl.constexpr = constants.BLOCK_V
    program = tl.program_id(0)
    row_tile = program % row_tiles
    split = program // row_tiles % splits
    kv_head = (program // row_tiles // splits % kv_heads).to(tl.int64)
    batch = (program // row_tiles // splits // kv_heads).to(tl.int64)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    row_stored = query < queries
    target = split.to(tl.int64) * total_rows + (batch * queries + query) * (kv_heads * GROUP) + head
    length = tl.load(lengths_pointer + batch)
    tl.device_assert((length >= 0) & (length <= capacity), "lengths must be from 0 to the cache's capacity")
    if query_lengths_pointer is not None:
        queries = tl.load(query_lengths_pointer + batch)
    row_valid = query < queries
    offset = length - queries

    low = length * 0
    high = length
    if LEFT_BOUNDED:
        low = tl.maximum(row_tile * BLOCK_M // GROUP + offset - features.left, 0)
    if RIGHT_BOUNDED:
        last_query = tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // GROUP, queries - 1)
        high = tl.minimum(length, last_query + offset + features.right + 1)
    origin, stop = low, high
    if features.lists is not None:
        # The queries lie in one tile of positions or in two: the keys of the second one's list follow the first one's.
        lists = features.lists + batch * features.lists_stride_b + kv_head * features.lists_stride_h
        last_query = tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // GROUP, queries - 1)
        first_list = tl.maximum(row_tile * BLOCK_M // GROUP + offset, 0) // TILE
        second_list = tl.maximum(tl.maximum(last_query + offset, 0) // TILE, first_list)
        listed = lists + first_list.to(tl.int64) * features.lists_stride_tile
        in_first = (tl.load(listed) + tl.load(listed + 1)) * TILE
        listed = lists + second_list.to(tl.int64) * features.lists_stride_tile
        in_second = (tl.load(listed) + tl.load(listed + 1)) * TILE
        origin = 0
        stop = in_first + tl.where(second_list > first_list, in_second, 0)
    first_tile = origin // BLOCK_N
    share = tl.cdiv(tl.cdiv(tl.maximum(stop, origin), BLOCK_N) - first_tile, splits)
    begin = (first_tile + split * share) * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, stop)

    q_row = (q.pointer + batch * q.stride_b + head * q.stride_h + query.to(tl.int64) * q.stride_row)[:, None]
    k_head = k.pointer + kv_head * k.stride_h
    v_head = v.pointer + kv_head * v.stride_h
    q_column, d_valid = _columns(q, 0, head_dim, BLOCK_D)
    k_column, _ = _columns(k, 0, head_dim, BLOCK_D)
    v_column, v_valid = _columns(v, 0, value_dim, BLOCK_V)
    q_rows = tl.load(q_row + q_column, mask=row_valid[:, None] & d_valid, other=0.0)
    if BLOCK_REST:
        q_rest_column, rest_valid = _columns(q, BLOCK_D, head_dim, BLOCK_REST)
        k_rest_column, _ = _columns(k, BLOCK_D, head_dim, BLOCK_REST)
        q_rest = tl.load(q_row + q_rest_column, mask=row_valid[:, None] & rest_valid, other=0.0)
    if features.slopes is not None:
        slope = tl.load(features.slopes + batch * features.slopes_stride_b + head, mask=row_valid, other=0.0) * LOG2_E

    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if features.sinks is not None:
        # Only the first split counts the sink.
        sink = tl.load(features.sinks + head, mask=row_valid, other=float("-inf"))
        sink = tl.where(split == 0, sink, float("-inf"))
        maximum = sink * LOG2_E
        total = tl.where(sink == float("-inf"), 0.0, 1.0)
    for start in range(begin, end, BLOCK_N):
        last = end
        if features.lists is not None:
            # `start` is a place in the lists. Instead of a tile without keys that may be seen, the first one is hidden.
            number = tl.where(start < in_first, first_list, second_list)
            place = tl.where(start < in_first, start, start - in_first)
            listed = lists + number.to(tl.int64) * features.lists_stride_tile
            start = tl.load(listed + HEADER + place // TILE) * TILE + place % TILE
            seen_wholly = tl.load(listed)
            tile = tl.where(place // TILE < seen_wholly, 1, tl.load(listed + 2) + place // TILE - seen_wholly)
            present = (start < high) & (start + BLOCK_N > low)
            start = tl.where(present, start, 0)
            position = query + offset
            listed_row = present & (position >= 0) & (position // TILE == number)
            bits = features.bits + tile.to(tl.int64) * (TILE * WORDS) + start % TILE // WORD
            bits += tl.where(listed_row, position % TILE, 0)[:, None] * WORDS
            last = high
        key = start + tl.arange(0, BLOCK_N)
        # A page that no query sees may not exist any more: neither the page nor its table entry is read. An entry that
        # is no page of the cache, such as a negative one, becomes the last page, so that nothing outside is read.
        present = (key >= low) & (key < last)
        if table.pointer is None:
            page = batch
            slot = key.to(tl.int64)
        elif PAGE_SIZE % BLOCK_N == 0:
            entry = table.pointer + batch * table.stride_b + tl.cast(start // PAGE_SIZE, tl.int64) * table.stride_page
            page = tl.minimum(tl.load(entry).to(tl.uint32), pages - 1).to(tl.int64)
            slot = (start % PAGE_SIZE + tl.arange(0, BLOCK_N)).to(tl.int64)
        else:
            entry = table.pointer + batch * table.stride_b + (key // PAGE_SIZE).to(tl.int64) * table.stride_page
            page = tl.load(entry, mask=present, other=0)
            page = tl.minimum(page.to(tl.uint32), pages - 1).to(tl.int64)
            slot = (key % PAGE_SIZE).to(tl.int64)
        k_row = (page * k.stride_b + slot * k.stride_row)[:, None]
        v_row = (page * v.stride_b + slot * v.stride_row)[:, None]
        k_tile = tl.load(k_head + k_column + k_row, mask=present[:, None] & d_valid, other=0.0)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = dot(q_rows, tl.trans(k_tile), zeros, INPUT_PRECISION)
        if BLOCK_REST:
            k_rest = tl.load(k_head + k_rest_column + k_row, mask=present[:, None] & rest_valid, other=0.0)
            scores = dot(q_rest, tl.trans(k_rest), scores, INPUT_PRECISION)
        if constants.SOFTCAP:
            scores = tanh(scores * (features.scale / features.softcap)) * (features.softcap * LOG2_E)
        else:
            scores *= features.scale * LOG2_E
        distance = key[None, :] - (query + offset)[:, None]
        if features.slopes is not None:
            scores -= slope[:, None] * tl.abs(distance).to(tl.float32)
        allowed = present[None, :]
        if LEFT_BOUNDED:
            allowed = allowed & (distance >= -features.left)
        if RIGHT_BOUNDED:
            allowed = allowed & (distance <= features.right)
        if query_lengths_pointer is not None:
            allowed = allowed & row_valid[:, None]
        if features.lists is not None:
            allowed = allowed & listed_row[:, None] & shown_by_bits(bits, key[None, :], BLOCK_N)
        scores = tl.where(allowed, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        v_tile = tl.load(v_head + v_column + v_row, mask=present[:, None] & v_valid, other=0.0)
        accumulator = dot(round_to(weights, v_tile.dtype), v_tile, accumulator * rescale[:, None], INPUT_PRECISION)
        maximum = new_maximum

    empty = total == 0.0
    output = accumulator / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), maximum * LN_2 + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse_pointer + target, lse, mask=row_stored)
    o_tile = output_pointer + target[:, None] * value_dim + tl.arange(0, BLOCK_V)[None, :]
    output = round_to(output, output_pointer.dtype.element_ty)
    tl.store(o_tile, output, mask=row_stored[:, None] & v_valid)


def decode_forward(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    arguments: DecodeArguments,
    splits: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp of checked arguments.

    Args:
        query: (batch, heads, queries, head_dim), any strides.
        key_cache, value_cache: (batch, kv_heads, capacity, head_dim) or, with a block table, (pages, page_size,
            kv_heads, head_dim), any strides.
        splits: the number of programs that share a sequence's keys; None to choose it by rule.
    """
    batch, heads, queries, _ = query.shape
    value_dim = value_cache.shape[-1]
    results = empty_decode_results(query, value_dim)
    rows = batch * queries * heads
    if rows == 0:
        return results
    if splits is None:
        splits = _chosen_splits(query, key_cache, value_cache, arguments.block_table, arguments.left)
    partial = results
    if splits > 1:
        partial = (
            query.new_empty((splits, rows, value_dim), dtype=torch.float32),
            query.new_empty((splits, rows), dtype=torch.float32),
        )
    _launch(query, key_cache, value_cache, results, partial, *arguments, splits, input_precision(query.dtype))
    return results


@kept_choice
def _chosen_splits(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    left: int,
) -> int:
    """The number of programs that share a sequence's keys, for these shapes."""
    cache = cache_shape(key_cache, block_table)
    configuration = decode_configuration(query, value_cache, block_table is not None)
    queries = query.shape[2]
    # The largest number of keys that the queries of a sequence can see together.
    keys = cache.capacity if left == UNBOUNDED else min(cache.capacity, left + queries)
    return choose_splits(_programs(query, cache, configuration), keys, configuration, query)


def _programs(query: torch.Tensor, cache: CacheShape, configuration: DecodeConfiguration) -> int:
    """The number of programs without splits."""
    batch, heads, queries, _ = query.shape
    rows = heads // cache.kv_heads * queries
    return batch * cache.kv_heads * triton.cdiv(rows, configuration.block_m(rows))


@kept_launch
def _launch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    results: tuple[torch.Tensor, ...],
    partial: tuple[torch.Tensor, ...],
    lengths: torch.Tensor,
    query_lengths: torch.Tensor | None,
    table: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    lists: torch.Tensor | None,
    bits: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    splits: int,
    precision: str,
) -> list[Launch]:
    """Describe the launches: attention to each split's keys and, with several splits, their merge."""
    batch, heads, queries, head_dim = query.shape
    value_dim = value_cache.shape[-1]
    cache = cache_shape(key_cache, table)
    configuration = decode_configuration(query, value_cache, table is not None)
    group = heads // cache.kv_heads
    block_m = configuration.block_m(group * queries)
    block_d, block_rest = _parts_of(head_dim)
    # A window beyond the capacity is no limit. With this bound, positions cannot overflow.
    left, right = (min(extent, cache.capacity + queries) for extent in (left, right))
    # The compiler divides the stages between a load and the loads that depend on it: lists or pages, then keys.
    depends = table is not None or lists is not None
    attend = Launch(
        _decode_kernel,
        (_programs(query, cache, configuration) * splits,),
        {
            "q": operand(query),
            "k": cache_operand(key_cache, table),
            "v": cache_operand(value_cache, table),
            "output_pointer": partial[0],
            "lse_pointer": partial[1],
            "lengths_pointer": lengths,
            "query_lengths_pointer": query_lengths,
            "table": page_table(table),
            "row_tiles": triton.cdiv(group * queries, block_m),
            "splits": splits,
            "kv_heads": cache.kv_heads,
            "queries": queries,
            "total_rows": batch * queries * heads,
            "capacity": cache.capacity,
            "pages": key_cache.shape[0],
            "features": DecodeFeatures(
                scale,
                softcap,
                left,
                right,
                slopes,
                slopes_stride_b=0 if slopes is None or slopes.shape[0] == 1 else slopes.stride(0),
                sinks=sinks,
                lists=lists,
                lists_stride_b=0 if lists is None or lists.shape[0] == 1 else lists.stride(0),
                lists_stride_h=0 if lists is None or lists.shape[1] == 1 else lists.stride(1),
                lists_stride_tile=0 if lists is None else lists.stride(2),
                bits=bits,
            ),
            "constants": constants(
                DecodeConstants(
                    PAGE_SIZE=1 if table is None else cache.page_size,
                    GROUP=group,
                    head_dim=head_dim,
                    value_dim=value_dim,
                    LEFT_BOUNDED=left != UNBOUNDED,
                    RIGHT_BOUNDED=right != UNBOUNDED,
                    SOFTCAP=softcap != 0.0,
                    INPUT_PRECISION=precision,
                    BLOCK_M=block_m,
                    BLOCK_N=configuration.block_n,
                    BLOCK_D=block_d,
                    BLOCK_REST=block_rest,
                    BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
                )
            ),
            "num_warps": configuration.num_warps,
            "num_stages": 2 * configuration.num_stages - 1 if depends else configuration.num_stages,
            # This keeps device_assert: an impossible length must fail, not read another sequence's keys. It costs forty
            # instructions before the loop, and no register.
            "debug": True,
            "sanitize_overflow": False,
            **COMPILER_OPTIONS,
        },
    )
    return [attend, merge_launch(*partial, *results)] if splits > 1 else [attend]


def _parts_of(head_dim: int) -> tuple[int, int]:
    """The parts of a key that one tile and a smaller one hold, as powers of two; (all, 0) if two would not be smaller.

    A key of 576 elements has 512 and 64: a single tile would have 1024 columns, almost half of them empty.
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(head_dim - first))
    return (first, rest) if first >= 16 and rest < first else (whole, 0)


def decode_configuration(query: torch.Tensor, value_cache: torch.Tensor, paged: bool) -> DecodeConfiguration:
    """The decode kernel's configuration for these tensors."""
    table = _BY_ARCHITECTURE[architecture_of(query).name][query.element_size()]
    head_dim = max(query.shape[-1], value_cache.shape[-1])
    largest, default = next((largest, choice) for largest, choice in table.items() if head_dim <= largest)

    def shape() -> tuple[str, ...]:
        rows = query.shape[0] * query.shape[1]
        return (
            f"{8 * query.element_size()}-bit",
            f"head_dim<={largest}",
            f"batch*heads{size_class(rows, ROW_CLASSES)}",
            "paged" if paged else "contiguous",
        )

    return chosen("decode", query, default, shape)


def choose_splits(programs: int, keys: int, configuration: DecodeConfiguration, tensor: torch.Tensor) -> int:
    """The number of programs that share a sequence's keys: what one wave of the device holds, if no split is too small.

    Args:
        programs: the programs without splits.
        keys: the largest number of keys that a row can see. Only the device knows the actual number.
        tensor: any tensor on the device that will run them.
    """
    wave = multiprocessors_of(tensor) * configuration.programs
    fewest_keys = configuration.block_n * configuration.tiles_per_split
    return max(1, min(wave // programs, keys // fewest_keys, MOST_SPLITS))
