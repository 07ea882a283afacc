"""Keys and values of the sequences in generation, in memory that is allocated once, contiguous or in pages."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastformer.generation.devices import on_device


class CacheShape(NamedTuple):
    """The sizes of a token's entries in a cache.

    Attributes:
        layers: the number of blocks with keys and values.
        kv_heads, head_dim: the sizes in each block.
        dtype, device: the dtype and device of all keys and values.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class LayerCache(NamedTuple):
    """Keys and values of one block and the places of its sequences, as the operators take them."""

    keys: Tensor
    values: Tensor
    block_table: Tensor | None


class KeyValueCache(Protocol):
    """A cache with `slots` sequences; running sequences use the first ones."""

    capacity: int
    """The most tokens of a sequence."""

    def layer(self, layer: int, batch: int) -> LayerCache:
        """Return the entries of block number `layer` for the first `batch` sequences."""

    def places(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The places of tokens (tokens,) at `positions` of the sequences in `slots`, as `write` takes them."""

    def write(self, layer: int, places: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> None:
        """Store `key` and `value`, each (tokens, kv_heads, head_dim)."""

    def has_room(self, tokens: int) -> bool:
        """Whether there is room now for a sequence of this many tokens."""

    def reserve(self, slot: int, tokens: int) -> None:
        """Reserve room for a sequence of up to `tokens` tokens."""

    def move(self, source: int, target: int, tokens: int) -> None:
        """Move the sequence of `tokens` tokens in slot `source` to the free slot `target`."""

    def release(self, slot: int) -> None:
        """Free the room of the sequence in `slot`."""

    def clear(self) -> None:
        """Free the room of all sequences."""


class ContiguousCache:
    """A tensor (slots, kv_heads, capacity, head_dim) for keys and for values of each block.

    On a CPU only the parts that are written take memory.
    """

    def __init__(self, shape: CacheShape, slots: int, capacity: int) -> None:
        self.capacity = capacity
        self._caches = _empty_caches(shape, (slots, shape.kv_heads, capacity, shape.head_dim))

    def layer(self, layer: int, batch: int) -> LayerCache:
        keys, values = self._caches[layer]
        return LayerCache(keys[:batch], values[:batch], None)

    def places(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return slots, positions

    def write(self, layer: int, places: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> None:
        for cache, new in zip(self._caches[layer], (key, value), strict=True):
            cache.transpose(1, 2)[places] = new

    def has_room(self, tokens: int) -> bool:
        return tokens <= self.capacity

    def reserve(self, slot: int, tokens: int) -> None:
        """Do nothing: each slot has its own memory."""

    def move(self, source: int, target: int, tokens: int) -> None:
        for caches in self._caches:
            for cache in caches:
                cache[target, :, :tokens] = cache[source, :, :tokens]

    def release(self, slot: int) -> None:
        """Do nothing: each slot keeps its memory."""

    def clear(self) -> None:
        """Do nothing: each slot keeps its memory."""


class PagedCache:
    """Pages (pages, page_size, kv_heads, head_dim) for keys and values of each block, and each sequence's page table.

    At its start a sequence gets the pages for all tokens it may have, so that it never runs out of them. If too few are
    free, it waits until others have finished. The layout is that of Kwon et al. 2023,
    https://arxiv.org/abs/2309.06180.
    """

    def __init__(self, shape: CacheShape, slots: int, capacity: int, page_size: int, pages: int) -> None:
        self.page_size = page_size
        self.capacity = min(capacity, pages * page_size)
        self._caches = _empty_caches(shape, (pages, page_size, shape.kv_heads, shape.head_dim))
        self._table = torch.zeros(slots, -(-self.capacity // page_size), dtype=torch.int32, device=shape.device)
        self._free = list(range(pages - 1, -1, -1))
        self._taken: list[list[int]] = [[] for _ in range(slots)]

    def layer(self, layer: int, batch: int) -> LayerCache:
        keys, values = self._caches[layer]
        return LayerCache(keys, values, self._table[:batch])

    def places(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._table[slots, positions // self.page_size], positions % self.page_size

    def write(self, layer: int, places: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> None:
        for cache, new in zip(self._caches[layer], (key, value), strict=True):
            cache[places] = new

    def has_room(self, tokens: int) -> bool:
        return tokens <= self.capacity and self._pages(tokens) <= len(self._free)

    def reserve(self, slot: int, tokens: int) -> None:
        self._taken[slot] = pages = [self._free.pop() for _ in range(self._pages(tokens))]
        self._table[slot, : len(pages)] = on_device(
            torch.tensor(pages, dtype=torch.int32, device="cpu"), self._table.device
        )

    def move(self, source: int, target: int, tokens: int) -> None:
        self._table[target] = self._table[source]
        self._taken[target], self._taken[source] = self._taken[source], []

    def release(self, slot: int) -> None:
        self._free.extend(reversed(self._taken[slot]))
        self._taken[slot] = []

    def clear(self) -> None:
        for slot in range(len(self._taken)):
            self.release(slot)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)


def _empty_caches(shape: CacheShape, size: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    def empty() -> Tensor:
        return torch.empty(size, dtype=shape.dtype, device=shape.device)

    return [(empty(), empty()) for _ in range(shape.layers)]
