"""Attention of one new token to a full cache, and the call of Fastformer and of each peer that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastformer.benchmarking.attention_peers import FLEX
from fastformer.benchmarking.calls import Call, Function, compiled
from fastformer.benchmarking.inputs import maker
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.study import Peer
from fastformer.ops import decode_attention
from fastformer.registry.decode_attention import contiguous_cache


@dataclass(frozen=True)
class Decode:
    """Attention of one new token in each sequence of a batch.

    Attributes:
        batch, heads, head_dim: the shape of the query.
        kv_heads: heads of the cache.
        keys: the number of keys of each sequence; all are used.
        dtype, device: the dtype and the device of all tensors.
        page: tokens of a page; None if the cache is not paged. Pages are in random order.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    keys: int
    dtype: torch.dtype
    device: torch.device
    page: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, each read once."""
        return 2 * self.batch * self.kv_heads * self.keys * self.head_dim * self.dtype.itemsize


def peers(call: Decode) -> dict[str, Peer]:
    """All peers that can compute `call`, by name. PyTorch's functions must first gather the pages of a paged cache."""
    gathered = "" if call.page is None else ", pages gathered"
    backends = {
        "SDPA cuDNN": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
        "SDPA flash": (SDPBackend.FLASH_ATTENTION, ()),
        "SDPA memory-efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    }
    found = {OURS: Peer(partial(_call, call, _fastformer))}
    for name, (backend, devices) in backends.items():
        found[f"{name}{gathered}"] = Peer(partial(_call, call, partial(_sdpa, backend)), devices=devices)
    found["flash-attn"] = Peer(partial(_call, call, _flash_attn), packages=("flash_attn",), devices=("cuda",))
    if call.page is None:
        found[FLEX] = Peer(partial(_call, call, _flex), compiled=True)
    return found


def of_some(call: Decode, results: list[Tensor]) -> list[Tensor]:
    """Select the output of the query heads of the first key/value head, in the first and in the last sequence."""
    return [results[0][_ends(call), : call.heads // call.kv_heads]]


def exact_of_some(call: Decode) -> list[Tensor]:
    """Compute in float32 what `of_some` selects from a correct result."""
    query, *caches, table = _call(call, _fastformer).inputs
    ends, group = _ends(call), call.heads // call.kv_heads
    key, value = (_dense(cache, None if table is None else table[ends], ends)[:, 0].float() for cache in caches)
    weights = (query[ends, :group, 0].float() @ key.transpose(1, 2) * call.head_dim**-0.5).softmax(-1)
    return [(weights @ value)[:, :, None]]


def _ends(call: Decode) -> Tensor:
    return torch.tensor([0, call.batch - 1], device=call.device)


def _dense(cache: Tensor, table: Tensor | None, sequences: Tensor) -> Tensor:
    """The cache of `sequences` as (sequences, kv_heads, keys, head_dim)."""
    return cache[sequences] if table is None else contiguous_cache(cache, table)


def _call(call: Decode, make_function: Any) -> Call:
    """Make the call of a function of query, key cache, value cache, and the table of pages (None without pages)."""
    make = maker(call.dtype, call.device)
    query = make.normal(call.batch, call.heads, 1, call.head_dim, grad=False)
    if call.page is None:
        shape = (call.batch, call.kv_heads, call.keys, call.head_dim)
        return Call(make_function(call), [query, *(make.normal(*shape, grad=False) for _ in range(2)), None])
    pages = call.batch * call.keys // call.page
    caches = [make.normal(pages, call.page, call.kv_heads, call.head_dim, grad=False) for _ in range(2)]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Call(make_function(call), [query, *caches, make.constant(order.view(call.batch, -1))])


def _lengths(call: Decode) -> Tensor:
    return torch.full((call.batch,), call.keys, dtype=torch.int32, device=call.device)


def _fastformer(call: Decode) -> Function:
    lengths = _lengths(call)

    def function(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None) -> Any:
        return decode_attention(query, key, value, lengths=lengths, block_table=table)

    return function


def _sdpa(backend: SDPBackend, call: Decode) -> Function:
    """SDPA with all query heads of a key/value head as its queries. This is valid because a new token sees all keys."""

    def function(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None) -> Tensor:
        if table is not None:
            # The same as `contiguous_cache`, without the time that einops takes: this is measured.
            key, value = (each[table].flatten(1, 2).transpose(1, 2) for each in (key, value))
        grouped = query.view(call.batch, call.kv_heads, -1, call.head_dim)
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(grouped, key, value)
        return output.reshape(query.shape)

    return function


def _flex(call: Decode) -> Function:
    from torch.nn.attention.flex_attention import flex_attention

    attend = compiled(flex_attention)

    def function(query: Tensor, key: Tensor, value: Tensor, _: None) -> Any:
        return attend(query, key, value, enable_gqa=True)

    return function


def _flash_attn(call: Decode) -> Function:
    from flash_attn import flash_attn_with_kvcache

    lengths = _lengths(call)

    def function(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None) -> Tensor:
        if table is None:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
        output = flash_attn_with_kvcache(
            query.transpose(1, 2), key, value, cache_seqlens=lengths, block_table=table, causal=True
        )
        return output.transpose(1, 2)

    return function
