"""A mask without its elements: which tiles of keys each tile of queries sees, and bits for the tiles seen in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from fastformer_kernels.attention.arguments import LIST_HEADER, MASK_TILE, MASK_WORDS, WORD_BITS
from torch import Tensor

from fastformer.ops.checks import broadcasts

FROM_FLEX = " (BlockMask.from_flex makes one of FlexAttention's)"
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Piece = Callable[[slice, slice, slice], Tensor]

# The bits of the first two tiles: one that shows no key, and one that shows all. Those of partial tiles follow.
_NOTHING, _EVERYTHING, _PARTIAL = 0, 1, 2
# The most elements that a mask function computes at a time.
_PIECE_ELEMENTS = 1 << 24


class TileLists(NamedTuple):
    """The tiles of columns that each tile of rows sees.

    Attributes:
        lists: (batch or 1, heads or 1, tiles of rows, 3 + tiles of columns) int32, contiguous: the number of tiles of
            columns that the tile of rows sees wholly, of those that it sees in part, and the place in `bits` of the
            first of the latter; then the tiles of columns: those seen wholly, those seen in part, all others.
        bits: (2 + tiles seen in part, 128 rows, 4 words of 32 columns) int32, contiguous.
    """

    lists: Tensor
    bits: Tensor


class BlockMask:
    """A boolean attention mask as lists of tiles of 128 queries and 128 keys, like FlexAttention's BlockMask.

    For each tile of queries it lists the tiles of keys that all its queries see, and those that some of them see. Only
    the latter have elements, one bit each. `fastformer.attention` computes nothing for tiles that are not listed. Heads
    or batch share the lists if they are 1 in `shape`.

    Make one with `from_mask`, `from_function` or `from_flex`, once for all layers and steps that use it: on a GPU this
    waits for the device. The lists for the backward are made in the first call that needs them, and kept.

    Attributes:
        shape: (batch or 1, heads or 1, queries, keys).
        by_query: the tiles of keys that each tile of queries sees.

    Source: FlexAttention (Dong et al. 2024, https://arxiv.org/abs/2412.05496).

    >>> documents = torch.tensor([0] * 300 + [1] * 212)
    >>> same = lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k)
    >>> mask = fastformer.BlockMask.from_function(same, None, None, 512, 512)
    >>> fastformer.attention(*torch.randn(3, 2, 8, 512, 64), mask=mask).shape
    torch.Size([2, 8, 512, 64])
    """

    def __init__(self, shape: tuple[int, int, int, int], by_query: TileLists, by_key: TileLists | None = None) -> None:
        self.shape = shape
        self.by_query = by_query
        self._by_key = by_key

    @classmethod
    def from_mask(cls, mask: Tensor) -> BlockMask:
        """Make the lists of a boolean mask, True = may attend, that broadcasts to (batch, heads, queries, keys).

        Queries and keys have their full numbers; batch and heads may be 1 or missing.
        """
        _check_boolean("mask", mask)
        if not 2 <= mask.dim() <= 4:
            raise ValueError(f"mask must have 2 to 4 dimensions, ending in (queries, keys); got {tuple(mask.shape)}")
        full = mask[(None,) * (4 - mask.dim())]
        batch, heads, queries, keys = full.shape
        return cls.from_pieces((batch, heads, queries, keys), mask.device, lambda b, h, q: full[b, h, q])

    @classmethod
    def from_function(
        cls,
        mask_mod: MaskFunction,
        batch: int | None,
        heads: int | None,
        queries: int,
        keys: int,
        *,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """Make the lists of a function of indices. Its elements are computed some rows of tiles at a time.

        Args:
            mask_mod: takes batch, head, query and key, int64 tensors of four dimensions on `device` that broadcast
                against each other, and returns a boolean tensor that broadcasts with them, True = may attend.
                FlexAttention's functions of single indices do, if they are made of elementwise operations and indexing.
            batch, heads: None if the mask is the same for all; the function then gets 0.
            queries, keys: their numbers. The first of each has index 0.
        """
        device = torch.device(device)
        shape = (1 if batch is None else batch, 1 if heads is None else heads, queries, keys)
        for name, size in zip(("batch", "heads", "queries", "keys"), shape, strict=True):
            if size < 0:
                raise ValueError(f"{name} must not be negative; got {size}")

        def piece(b: slice, h: slice, q: slice) -> Tensor:
            parts = (torch.arange(part.start, part.stop, device=device) for part in (b, h, q, slice(0, keys)))
            indices = [part.view(*(1,) * place, -1, *(1,) * (3 - place)) for place, part in enumerate(parts)]
            seen = mask_mod(*indices)
            _check_boolean("the result of mask_mod", seen)
            piece_shape = torch.broadcast_shapes(*(part.shape for part in indices))
            # A function that reduces something would silently give all pairs the same.
            if seen.dim() != 4 or not broadcasts(tuple(seen.shape), tuple(piece_shape)):
                raise ValueError(
                    "mask_mod must return 4 dimensions that broadcast to its indices (batch, heads, queries, keys), "
                    f"{tuple(piece_shape)}; got {tuple(seen.shape)}"
                )
            return seen.expand(piece_shape)

        return cls.from_pieces(shape, device, piece)

    @classmethod
    def from_pieces(cls, shape: tuple[int, int, int, int], device: torch.device, piece: Piece) -> BlockMask:
        """Make the lists of a mask of `shape`, whose elements `piece` returns for slices of batch, heads and queries.

        The elements, boolean on `device`, have all keys; True = may attend.
        """
        batch, heads, queries, keys = shape
        row_tiles, column_tiles = (-(-size // MASK_TILE) for size in (queries, keys))
        kinds = torch.full((batch, heads, row_tiles, column_tiles), _NOTHING, device=device)
        constant = torch.tensor([0, -1], dtype=torch.int32, device=device)
        bits = [constant[:, None, None].expand(2, MASK_TILE, MASK_WORDS)]
        for b, h, t in _pieces(batch, heads, row_tiles, column_tiles):
            rows = slice(t.start * MASK_TILE, min(t.stop * MASK_TILE, queries))
            tiles = _in_tiles(piece(b, h, rows), t.stop - t.start, column_tiles)
            some, every = tiles.any(-1).any(-1), tiles.all(-1).all(-1)
            kinds[b, h, t] = some.long() * _PARTIAL - every.long() * (_PARTIAL - _EVERYTHING)
            bits.append(_packed(tiles[some & ~every]))
        return cls(shape, TileLists(_listed(kinds), torch.cat(bits)))

    @classmethod
    def from_flex(cls, block_mask: Any) -> BlockMask:
        """Make the lists of a `torch.nn.attention.flex_attention.BlockMask`, with any block size.

        Raises:
            TypeError: it is something else. ValueError: it is a slice of one, whose function has other indices.
        """
        from torch.nn.attention import flex_attention

        if not isinstance(block_mask, flex_attention.BlockMask):
            raise TypeError(f"block_mask must be FlexAttention's BlockMask; got {type(block_mask).__name__}")
        batch, heads = block_mask.kv_num_blocks.shape[:2]
        queries, keys = block_mask.seq_lengths
        rows, columns = block_mask.BLOCK_SIZE
        partial = _blocks(block_mask.kv_num_blocks, block_mask.kv_indices)
        whole = torch.zeros_like(partial)
        if block_mask.full_kv_num_blocks is not None:
            assert block_mask.full_kv_indices is not None
            whole = _blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        if partial.shape[2] != -(-queries // rows):
            raise ValueError(
                f"block_mask must have the lists of all its {queries} queries; got {partial.shape[2]} blocks of {rows}"
            )
        mask_mod = _of_all_indices(block_mask.mask_mod)

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            block = (b, h, q // rows, k // columns)
            return whole[block] | (partial[block] & mask_mod(*(index.flatten() for index in (b, h, q, k))))

        return cls.from_function(seen, batch, heads, queries, keys, device=block_mask.kv_num_blocks.device)

    @property
    def by_key(self) -> TileLists:
        """The tiles of queries that see each tile of keys, for the backward; made once outside of traces.

        Ask for it before a CUDA graph records a call, or the graph makes it in each replay.
        """
        if self._by_key is not None:
            return self._by_key
        by_key = _transposed(self.by_query)
        # Others are of no use after the trace or the transform of torch.func that they belong to.
        if torch.compiler.is_dynamo_compiling() or all(map(_is_ordinary, by_key)):
            self._by_key = by_key
        return by_key

    @property
    def device(self) -> torch.device:
        return self.by_query.lists.device

    @property
    def sparsity(self) -> float:
        """The share of tiles that are not listed, from 0 to 1; waits for the device."""
        lists = self.by_query.lists
        tiles = lists[..., LIST_HEADER:].numel()
        return 1.0 - lists[..., :2].sum().item() / tiles if tiles else 0.0

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        device = torch.device(device)  # a dtype, which a tensor's `to` would take, is an error
        by_query, by_key = (
            None if lists is None else TileLists(*(tensor.to(device) for tensor in lists))
            for lists in (self.by_query, self._by_key)
        )
        assert by_query is not None
        return BlockMask(self.shape, by_query, by_key)

    def to_dense(self) -> Tensor:
        """The mask's elements: boolean, of the mask's shape, True = may attend."""
        batch, _, queries, keys = self.shape
        return shown_in_rows(*self.by_query, slice(0, batch), slice(0, queries), keys)

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity:.1%}, device={str(self.device)!r})"


def shown_in_rows(lists: Tensor, bits: Tensor, batch: slice, rows: slice, columns: int) -> Tensor:
    """The elements of some rows of the mask of `TileLists`: boolean (batch, heads or 1, rows, columns)."""
    first, last = rows.start // MASK_TILE, -(-rows.stop // MASK_TILE)
    batch = slice(0, 1) if lists.shape[0] == 1 else batch
    tiles = _unpacked(bits[_places_of_bits(lists[batch, :, first:last])])
    dense = tiles.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return dense[:, :, rows.start - first * MASK_TILE : rows.stop - first * MASK_TILE, :columns]


def listed_columns(lists: Tensor, batch: slice, rows: slice) -> tuple[int, int]:
    """The range of columns outside which no listed tile lies, for some rows of the mask of `TileLists`."""
    first, last = rows.start // MASK_TILE, -(-rows.stop // MASK_TILE)
    batch = slice(0, 1) if lists.shape[0] == 1 else batch
    seen = _places_of_bits(lists[batch, :, first:last]).flatten(0, 2).amax(0).nonzero().flatten()
    return (int(seen[0]) * MASK_TILE, (int(seen[-1]) + 1) * MASK_TILE) if len(seen) else (0, 0)


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _of_all_indices(mask_mod: MaskFunction) -> MaskFunction:
    """Turn FlexAttention's function of single indices into one of four vectors, with a result of four dimensions."""
    for place in (3, 2, 1, 0):
        mask_mod = torch.vmap(mask_mod, tuple(0 if each == place else None for each in range(4)))
    return mask_mod


def _check_boolean(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a boolean tensor (True = may attend); got {given}")


def _pieces(batch: int, heads: int, row_tiles: int, column_tiles: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut (batch, heads, tiles of rows) into pieces of neighbours, in order, of at most `_PIECE_ELEMENTS` elements."""
    left = max(1, _PIECE_ELEMENTS // max(1, column_tiles * MASK_TILE**2))
    steps = []
    for size in (row_tiles, heads, batch):
        steps.append(max(1, min(size, left)))
        left = left // size if size and left >= size else 1
    of_tiles, of_heads, of_batch = steps
    for b in range(0, batch, of_batch):
        for h in range(0, heads, of_heads):
            for t in range(0, row_tiles, of_tiles):
                ends = ((b, of_batch, batch), (h, of_heads, heads), (t, of_tiles, row_tiles))
                yield tuple(slice(start, min(start + step, size)) for start, step, size in ends)  # type: ignore[misc]


def _in_tiles(dense: Tensor, row_tiles: int, column_tiles: int) -> Tensor:
    """Cut (batch, heads, rows, columns) into (batch, heads, row tiles, column tiles, 128, 128), padded with False."""
    missing = (row_tiles * MASK_TILE - dense.shape[2], column_tiles * MASK_TILE - dense.shape[3])
    padded = torch.nn.functional.pad(dense, (0, missing[1], 0, missing[0]))
    return padded.unflatten(3, (column_tiles, MASK_TILE)).unflatten(2, (row_tiles, MASK_TILE)).transpose(3, 4)


def _packed(tiles: Tensor) -> Tensor:
    """Pack (tiles, 128, 128) booleans into words of 32 columns, (tiles, 128, 4) int32."""
    place = torch.arange(WORD_BITS, dtype=torch.int32, device=tiles.device)
    return (tiles.unflatten(-1, (MASK_WORDS, WORD_BITS)).int() << place).sum(-1, dtype=torch.int32)


def _unpacked(words: Tensor) -> Tensor:
    """Expand (..., 128, 4) words to (..., 128, 128) booleans."""
    place = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> place) & 1).bool().flatten(-2)


def listed_tiles(kinds: Tensor, bits: Tensor) -> TileLists:
    """The lists of a mask of which each tile has bits; no number is read from the device.

    Args:
        kinds: (batch, heads, row tiles, column tiles), each tile _NOTHING, _EVERYTHING or _PARTIAL.
        bits: (batch, heads, row tiles, column tiles, 128, 4) int32.
    """
    columns = kinds.shape[-1]
    first_tile = columns * torch.arange(kinds.shape[:-1].numel(), device=kinds.device).view(kinds.shape[:-1])
    lists = _listed(kinds, _PARTIAL + first_tile)
    # Each row of tiles has places for all its tiles. Those seen in part come first, in the order of the list.
    place = torch.arange(columns, device=kinds.device) + lists[..., :1]
    order = lists[..., LIST_HEADER:].long().gather(-1, place % columns)
    placed = bits.new_empty(_PARTIAL + kinds.numel(), MASK_TILE, MASK_WORDS)
    placed[_NOTHING].zero_()
    placed[_EVERYTHING].fill_(-1)
    torch.index_select(bits.flatten(0, 3), 0, (first_tile[..., None] + order).flatten(), out=placed[_PARTIAL:])
    return TileLists(lists, placed)


def _listed(kinds: Tensor, first: Tensor | None = None) -> Tensor:
    """The lists of (batch, heads, row tiles, column tiles), each tile _NOTHING, _EVERYTHING or _PARTIAL.

    first: the place of each list's first bits, (batch, heads, row tiles); by default there is none for whole tiles.
    """
    whole, partial = kinds == _EVERYTHING, kinds == _PARTIAL
    order = torch.where(whole, 0, torch.where(partial, 1, 2)).argsort(dim=-1, stable=True)
    counts = partial.sum(-1)
    if first is None:
        first = _PARTIAL + counts.flatten().cumsum(0).view(counts.shape) - counts
    return torch.cat([torch.stack([whole.sum(-1), counts, first], -1), order], -1).int()


def _places_of_bits(lists: Tensor) -> Tensor:
    """The place in the bits of each tile, (batch, heads, row tiles, column tiles); the inverse of `_listed`."""
    whole, partial, first = (lists[..., i, None].long() for i in range(LIST_HEADER))
    order = lists[..., LIST_HEADER:].long()
    place = torch.arange(order.shape[-1], device=lists.device)
    of_partial = torch.where(place < whole + partial, first + place - whole, _NOTHING)
    return torch.empty_like(order).scatter_(-1, order, torch.where(place < whole, _EVERYTHING, of_partial))


def _transposed(by_row: TileLists) -> TileLists:
    """The lists of the transposed mask; no number is read from the device."""
    places = _places_of_bits(by_row.lists).transpose(-1, -2)
    partial = places >= _PARTIAL
    flat = places.flatten()
    in_order = torch.where(partial.flatten(), 0, 1).argsort(stable=True)[: by_row.bits.shape[0] - _PARTIAL]
    constant = torch.arange(_PARTIAL, device=flat.device)
    bits = _bits_transposed(by_row.bits[torch.cat([constant, flat[in_order]])])
    return TileLists(_listed(places.clamp(max=_PARTIAL)), bits)


def _bits_transposed(bits: Tensor) -> Tensor:
    """Transpose each tile of `bits`, (tiles, 128, 4) words: 16 squares of 32 x 32 bits, by swapping ever smaller ones.

    Source: Hacker's Delight (Warren 2012), section 7-3.
    """
    squares = bits.unflatten(1, (MASK_WORDS, WORD_BITS)).permute(0, 3, 2, 1)
    size, mask = WORD_BITS // 2, 0x0000FFFF
    while size:
        low, high = squares.unflatten(2, (-1, 2, size)).unbind(3)
        swapped = ((low >> size) ^ high) & mask
        squares = torch.stack([low ^ (swapped << size), high ^ swapped], 3).flatten(2, 4)
        size //= 2
        mask = (mask ^ mask << size) & 0xFFFFFFFF
    return squares.flatten(1, 2).contiguous()


def _blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """FlexAttention's lists as booleans (batch, heads, blocks of rows, blocks of columns)."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    return torch.zeros_like(indices, dtype=torch.bool).scatter_(-1, indices.long(), listed)
