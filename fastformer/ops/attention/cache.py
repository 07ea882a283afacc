"""Append new keys and values to a contiguous or paged cache, with rotary position embedding on the way."""

from __future__ import annotations

import torch
from fastformer_kernels.attention.decode_arguments import cache_shape

from fastformer.backends import use_triton
from fastformer.ops.attention.attention import MAX_HEAD_DIM
from fastformer.ops.autocast import to_autocast_dtype
from fastformer.ops.checks import (
    check_counts,
    check_device,
    check_floating,
    check_int32,
    check_like,
    check_no_gradient,
    check_pages,
    check_pages_on_device,
    check_shape,
)
from fastformer.ops.operator import operator

# Absorbed multi-head latent attention (DeepSeek-V2) has 512 elements of latent and 64 of position in each key.
MAX_KEY_DIM = 576


def append_to_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor | None:
    """Write new keys and values after the last token of each sequence, in place, and rotate keys and queries.

    For inference.

    Token i of a sequence gets position ``lengths + i``, in the cache and in the rotary embedding (Su et al. 2021,
    https://arxiv.org/abs/2104.09864): each pair (a, b) of elements becomes ``(a cos - b sin, b cos + a sin)``. The
    caller advances `lengths` afterwards, and hands the result and the new lengths to `fastformer.decode_attention`.

    Args:
        key: (batch, kv_heads, tokens, head_dim), float32, float16 or bfloat16. value: (batch, kv_heads, tokens,
            value_head_dim).
        key_cache, value_cache: contiguous (batch, kv_heads, capacity, head_dim) or, with `block_table`, paged (pages,
            page_size, kv_heads, head_dim), in key's dtype; any strides with which no two elements share memory.
        lengths: (batch,) int32, the number of tokens already in the cache.
        new_lengths: (batch,) int32, the number of new tokens of each sequence (default: all); the rest are padding and
            are not stored.
        block_table: (batch, max_pages) int32, the pages of each sequence in order. A page that is written must not
            appear twice. Entries to which no new token belongs are never read.
        query: (batch, heads, tokens, head_dim) of the same tokens, to be rotated like the keys.
        cos, sin: (positions, rotary_dim // 2) float32; the first rotary_dim elements of a head are rotated, the rest
            stay. Both or neither.
        interleaved: a pair is two neighbours (GPT-J), instead of half a rotary_dim apart (GPT-NeoX, Llama).

    Returns:
        The rotated query, contiguous, with its padding unchanged; None without a query.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted. On a CPU, tokens
            beyond the cache's capacity or the tables' positions raise a ValueError. On a GPU, where reading the lengths
            would stall, they fail a device-side assertion. Nothing is written out of bounds.
        RuntimeError: a gradient is requested.

    >>> cache = torch.zeros(2, 1, 2, 16, 8)
    >>> key = torch.ones(1, 2, 3, 8)
    >>> fastformer.append_to_cache(key, key, *cache, lengths=torch.tensor([4], dtype=torch.int32))
    >>> cache[0, 0, 0, :, 0]
    tensor([0., 0., 0., 0., 1., 1., 1., 0., 0., 0., 0., 0., 0., 0., 0., 0.])
    """
    key, value, query = to_autocast_dtype(key), to_autocast_dtype(value), to_autocast_dtype(query)
    check_no_gradient("append_to_cache", (key, value, key_cache, value_cache, query), "keep no cache while training")
    _check_new(key, value, query)
    check_caches(key_cache, value_cache, block_table, "key", key)
    _check_written(key, value, key_cache, value_cache, block_table)
    check_same_places(key_cache, value_cache)
    batch = key.shape[0]
    check_int32("lengths", lengths, (batch,), "key", key)
    if new_lengths is not None:
        check_int32("new_lengths", new_lengths, (batch,), "key", key)
    _check_rotary(cos, sin, query, key)
    rotated = _append_to_cache(
        key,
        value,
        key_cache,
        value_cache,
        query,
        lengths.contiguous(),
        None if new_lengths is None else new_lengths.contiguous(),
        block_table,
        cos,
        sin,
        interleaved,
    )
    return None if query is None else rotated


def check_caches(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    like_name: str,
    like: torch.Tensor,
) -> None:
    """Check the caches' layout, and their dtype, device and batch against a (batch, heads, tokens, head_dim) tensor."""
    batch, dtype, device = like.shape[0], like.dtype, like.device
    for name, cache, widest in (("key_cache", key_cache, MAX_KEY_DIM), ("value_cache", value_cache, MAX_HEAD_DIM)):
        if cache.dtype != dtype or cache.device != device:
            check_like(name, cache, like_name, like)
        shape = cache.shape
        if len(shape) != 4:
            contiguous, paged = "(batch, kv_heads, capacity, head_dim)", "(pages, page_size, kv_heads, head_dim)"
            layout = contiguous if block_table is None else paged
            raise ValueError(f"{name} must be {layout}; got shape {tuple(shape)}")
        if not 1 <= shape[3] <= widest:
            raise ValueError(f"{name}'s head_dim must be from 1 to {widest}; got {shape[3]}")
        if block_table is None and shape[0] != batch:
            raise ValueError(f"{name} must have {like_name}'s batch size, {batch}; got {shape[0]}")
        if block_table is not None and shape[1] == 0:
            raise ValueError(f"{name}'s page_size must be at least 1; got shape {tuple(shape)}")
    if block_table is not None:
        if block_table.dim() != 2:
            raise ValueError(f"block_table must be (batch, max_pages); got shape {tuple(block_table.shape)}")
        check_int32("block_table", block_table, (batch, block_table.shape[1]), like_name, like)


def check_same_places(key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    """Raise ValueError unless both caches have a place for each token of each head."""
    if key_cache.shape[:3] != value_cache.shape[:3]:
        raise ValueError(
            f"key_cache and value_cache must agree in all but head_dim; got {tuple(key_cache.shape)} and "
            f"{tuple(value_cache.shape)}"
        )


def _check_new(key: torch.Tensor, value: torch.Tensor, query: torch.Tensor | None) -> None:
    check_floating("key", key)
    shape = key.shape
    if len(shape) != 4:
        raise ValueError(f"key must be (batch, kv_heads, tokens, head_dim); got shape {tuple(shape)}")
    check_like("value", value, "key", key)
    if len(value.shape) != 4 or value.shape[:3] != shape[:3]:
        raise ValueError(f"key and value must agree in all but head_dim; got {tuple(shape)} and {tuple(value.shape)}")
    if query is not None:
        check_like("query", query, "key", key)
        if len(query.shape) != 4:
            raise ValueError(f"query must be (batch, heads, tokens, head_dim); got shape {tuple(query.shape)}")
        check_shape("query", query, (shape[0], query.shape[1], *shape[2:]))


def _check_written(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    """Check that the new keys and values fit the caches, and that no two elements of a cache share memory."""
    head_place = 1 if block_table is None else 2
    for new_name, new, name, cache in (
        ("key", key, "key_cache", key_cache),
        ("value", value, "value_cache", value_cache),
    ):
        (_, kv_heads, _, head_dim), shape, strides = new.shape, cache.shape, cache.stride()
        if shape[head_place] != kv_heads or shape[3] != head_dim:
            raise ValueError(
                f"{name} must have {new_name}'s kv_heads and head_dim, {kv_heads} and {head_dim}; got "
                f"{shape[head_place]} and {shape[3]}"
            )
        if 0 in strides and any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
            raise ValueError(f"{name} is written to, so its elements must not share memory; it was expanded")


def _check_rotary(
    cos: torch.Tensor | None, sin: torch.Tensor | None, query: torch.Tensor | None, key: torch.Tensor
) -> None:
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError("cos and sin must be given together")
        if query is not None:
            raise ValueError("query was given without cos and sin: it is only taken to be rotated")
        return
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{name} must be float32; got {table.dtype}")
        check_device(name, table, "key", key)
    shape = cos.shape
    if len(shape) != 2 or not 2 <= 2 * shape[1] <= key.shape[3]:
        raise ValueError(
            f"cos must be (positions, rotary_dim // 2) with rotary_dim from 2 to head_dim, {key.shape[3]}; got shape "
            f"{tuple(shape)}"
        )
    check_shape("sin", sin, shape)


@operator("fastformer::append_to_cache", mutates_args=("key_cache", "value_cache"))
def _append_to_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query: torch.Tensor | None,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> torch.Tensor:
    if key.is_cpu:
        _check_values(key, key_cache, lengths, new_lengths, block_table, cos)
    elif block_table is not None:
        written = lengths + (key.shape[2] if new_lengths is None else new_lengths)
        check_pages_on_device(block_table, written, key_cache.shape[1], key_cache.shape[0])
    rotated = () if query is None else (torch.empty_like(query, memory_format=torch.contiguous_format),)
    if use_triton(key):
        from fastformer_kernels.attention.cache import append
    else:
        append = _append_torch
    append(key, value, key_cache, value_cache, query, rotated, lengths, new_lengths, block_table, cos, sin, interleaved)
    return rotated[0] if rotated else key.new_empty(0)


@_append_to_cache.register_fake
def _(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query: torch.Tensor | None,
    *arguments: torch.Tensor | bool | None,
) -> torch.Tensor:
    return key.new_empty(0) if query is None else torch.empty_like(query, memory_format=torch.contiguous_format)


def _check_values(
    key: torch.Tensor,
    key_cache: torch.Tensor,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cos: torch.Tensor | None,
) -> None:
    """Raise ValueError on a CPU if new tokens have no place; on a GPU reading would stall, so its kernel asserts it."""
    capacity, tokens, starts = cache_shape(key_cache, block_table).capacity, key.shape[2], lengths.tolist()
    check_counts("lengths", starts, "the cache's capacity", capacity)
    counts = [tokens] * len(starts) if new_lengths is None else new_lengths.tolist()
    check_counts("new_lengths", counts, "the number of tokens", tokens)
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    check_counts("lengths plus the new tokens", ends, "the cache's capacity", capacity)
    if cos is not None:
        check_counts("lengths plus the new tokens", ends, "the positions of cos and sin", cos.shape[0])
    if block_table is not None:
        check_pages(block_table, zip(starts, ends, strict=True), key_cache.shape[1], key_cache.shape[0])


def _append_torch(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query: torch.Tensor | None,
    rotated: tuple[torch.Tensor, ...],
    lengths: torch.Tensor,
    new_lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> None:
    """Write the tokens, (batch, tokens, heads, head_dim), or only the real ones, (new tokens, ...), to their places."""
    batch, _, tokens, _ = key.shape
    token = torch.arange(tokens, device=key.device)
    sequence, position = torch.arange(batch, device=key.device)[:, None], lengths[:, None] + token
    real: tuple[torch.Tensor, ...] = ()
    if new_lengths is not None:
        real = (token < new_lengths[:, None]).nonzero(as_tuple=True)
        sequence, position = real[0], position[real]
    page, slot = sequence, position
    if block_table is not None:
        page_size = key_cache.shape[1]
        page, slot = block_table[sequence, position // page_size], position % page_size
    else:
        key_cache, value_cache = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
    new_keys, new_values = (new.transpose(1, 2)[real] for new in (key, value))
    if cos is not None and sin is not None:
        cos_rows, sin_rows = cos[position].unsqueeze(-2), sin[position].unsqueeze(-2)
        new_keys = _rotate(new_keys, cos_rows, sin_rows, interleaved)
        if query is not None:
            queries = _rotate(query.transpose(1, 2)[real], cos_rows, sin_rows, interleaved)
            rotated[0].copy_(query).transpose(1, 2)[real] = queries
    key_cache[page, slot] = new_keys
    value_cache[page, slot] = new_values


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first 2 * pairs elements of x by cos and sin, which broadcast to (..., pairs)."""
    pairs = cos.shape[-1]
    rotated = x.clone()
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    )
    a, b = x[..., first].float(), x[..., second].float()
    rotated[..., first] = a * cos - b * sin
    rotated[..., second] = b * cos + a * sin
    return rotated
