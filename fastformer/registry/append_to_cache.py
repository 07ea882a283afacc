"""The operator that rotates new keys by their positions, and writes new keys and values to a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastformer.registry.decode_attention import caches
from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator
from fastformer.registry.rotary import turned


def _inputs(
    make: Make,
    lengths: Sequence[int] = (30, 9),
    tokens: int = 3,
    heads: int = 4,
    kv_heads: int = 1,
    head_dim: int = 32,
    *,
    capacity: int = 64,
    positions: int = 64,
    page_size: int | None = None,
) -> Call:
    """New keys, values and queries of sequences that already have `lengths` tokens, with caches and rotary tables."""
    batch = len(lengths)
    query, key, value = (make.normal(batch, each, tokens, head_dim) for each in (heads, kv_heads, kv_heads))
    tensors = {"key": key, "value": value, **caches(make, batch, kv_heads, capacity, head_dim, page_size)}
    tensors["lengths"] = make.constant(torch.tensor(lengths, dtype=torch.int32, device="cpu"))
    tensors["query"] = query
    tensors["cos"], tensors["sin"] = make.rotary_table(positions, head_dim)
    return Call(tensors, {})


def _plain(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    new_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    query: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor | None:
    """Write to the caches. Return the query, if given, rotated for all tokens within the new lengths."""
    batch, tokens = key.shape[0], key.shape[2]
    sequence = torch.arange(batch, device=key.device).repeat_interleave(tokens)
    token = torch.arange(tokens, device=key.device).repeat(batch)
    if new_lengths is not None:
        new = token < new_lengths[sequence]
        sequence, token = sequence[new], token[new]
    position = lengths[sequence] + token

    def turn(x: Tensor) -> Tensor:
        """Select the new tokens and rotate them; (tokens, heads, head_dim)."""
        x = x[sequence, :, token]
        return x if cos is None or sin is None else turned(x, cos[position, None], sin[position, None], interleaved)

    for cache, written in ((key_cache, turn(key)), (value_cache, value[sequence, :, token])):
        if block_table is None:
            cache[sequence, :, position] = written
        else:
            size = cache.shape[1]
            cache[block_table[sequence, position // size], position % size] = written
    if query is None:
        return None
    rotated = query.clone()
    rotated[sequence, :, token] = turn(query)
    return rotated


APPEND_TO_CACHE = Operator(
    "append_to_cache",
    _inputs,
    _plain,
    constants=frozenset({"key", "value", "key_cache", "value_cache", "query", "cos", "sin"}),
    written=("key_cache", "value_cache"),
)
