"""A dense boolean mask packed to bits, once for all heads, layers and passes that use it.

Kernels would read such a mask once for each head, forward and backward, one byte an element. Packed, it is a block mask
(`fastformer.BlockMask`): one bit an element, nothing for tiles that are wholly seen, and no work for those that are
wholly hidden. Packing reads the mask once and does not wait for the device, since there is room for the bits of every
tile.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.attention.block_mask import TileLists, listed_tiles

# Fewer elements are read so quickly that the thirty small launches of packing would not pay.
_FEWEST_ELEMENTS = 1 << 22
# The packed masks that are kept at a time; training needs two for each mask.
_MOST_KEPT = 32

_as_given = False


@contextmanager
def masks_as_given() -> Iterator[None]:
    """Pack no mask within the block, so that both ways can be timed."""
    global _as_given
    previous, _as_given = _as_given, True
    try:
        yield
    finally:
        _as_given = previous


def with_packed_mask(query: Tensor, arguments: AttentionArguments) -> AttentionArguments:
    """The same call, with its mask packed if that pays.

    It pays for kernels if the mask has many elements and all heads share it. The limits by position and by length
    become a part of the packed mask. Of these arguments only `key_lengths` stays, since positions may depend on it.

    A packed mask is kept as long as the mask, or the tensor of which it is a view, lives and PyTorch counts no change
    of it. It is packed in each call while a CUDA graph is recorded, and if a graph of torch.compile's returned it:
    replays may find other elements. What torch.compile or another tracer sees stays dense, since generated code may
    write to memory without counting, and so do inference tensors, whose changes are not counted.
    """
    if arguments.mask is None or not _pays(query, arguments):
        return arguments
    by_query = _packed(arguments, by_key=False)
    by_key = _packed(arguments, by_key=True) if torch.is_grad_enabled() else (None, None)
    return arguments._replace(
        mask=None,
        prefix_lengths=None,
        query_lists=by_query[0],
        query_bits=by_query[1],
        key_lists=by_key[0],
        key_bits=by_key[1],
        left=UNBOUNDED,
        right=UNBOUNDED,
        chunk=0,
    )


def _pays(query: Tensor, arguments: AttentionArguments) -> bool:
    mask = arguments.mask
    assert mask is not None
    return (
        not torch.compiler.is_compiling()
        and not _as_given
        and _elements(mask) >= _FEWEST_ELEMENTS
        and query.shape[1] > 1
        and (mask.shape[1] == 1 or mask.stride(1) == 0)
        and not arguments.packed
        and type(mask) is Tensor
        and not mask.is_inference()
        # Tensors on meta stand for those of a GPU while kernels are compiled ahead of time, in a mode of their own.
        and (mask.is_meta or not _is_traced())
        and use_triton(query)
    )


def _elements(mask: Tensor) -> int:
    """The number of elements of one head; 0 if all queries or all keys have the same."""
    if any(size == 1 or stride == 0 for size, stride in zip(mask.shape[2:], mask.stride()[2:], strict=True)):
        return 0
    return (1 if mask.stride(0) == 0 else mask.shape[0]) * mask.shape[2] * mask.shape[3]


def _is_traced() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


class _Kept(NamedTuple):
    """A packed mask.

    Attributes:
        versions: those of the tensors that it was made of.
        owners: those tensors, or the ones of which they are views. They are not kept alive.
        tiles: the packed mask.
    """

    versions: tuple[int, ...]
    owners: tuple[weakref.ref[Tensor], ...]
    tiles: TileLists


# The mask used last is at the end.
_kept: dict[tuple[Any, ...], _Kept] = {}
# A mask may die, which removes what is kept of it, while this thread changes the table.
_changing = threading.RLock()


def _packed(arguments: AttentionArguments, *, by_key: bool) -> TileLists:
    """The call's packed mask by query or by key, kept from an earlier call or new."""
    sources = [t for t in (arguments.mask, arguments.key_lengths, arguments.prefix_lengths) if t is not None]
    owners = [source if source._base is None else source._base for source in sources]
    if _is_recorded(sources[0]) or any(map(_changes_uncounted, owners)):
        return _pack(arguments, by_key)
    a = arguments
    limits = (a.key_lengths is None, a.left, a.right, a.chunk, a.bottom_right, a.max_seqlen_q, a.max_seqlen_k)
    key = (by_key, _stream_of(sources[0]), limits, *map(_place, sources))
    versions = tuple(source._version for source in sources)
    with _changing:
        kept = _kept.pop(key, None)
        if kept is not None and kept.versions == versions and _are(kept.owners, owners):
            _kept[key] = kept
            return kept.tiles
    # A mask that validation packs in inference mode serves training too.
    with torch.inference_mode(False), torch.no_grad():
        tiles = _pack(arguments, by_key)
    with _changing:
        _kept[key] = _Kept(versions, tuple(weakref.ref(owner, partial(_forget, key)) for owner in owners), tiles)
        while len(_kept) > _MOST_KEPT:
            _kept.pop(next(iter(_kept)), None)
    return tiles


def _are(references: tuple[weakref.ref[Tensor], ...], tensors: list[Tensor]) -> bool:
    """Whether each reference is to the tensor in its place. Others of the same memory count changes for themselves."""
    return all(reference() is tensor for reference, tensor in zip(references, tensors, strict=True))


def _forget(key: tuple[Any, ...], dead: weakref.ref[Tensor]) -> None:
    """Free what is kept under `key`, if it was made of a tensor that is not alive any more."""
    with _changing:
        if key in _kept and any(owner is dead for owner in _kept[key].owners):
            del _kept[key]


def _changes_uncounted(tensor: Tensor) -> bool:
    """Whether the tensor may change without a new version: by inference mode, or by the replay of a compiled graph."""
    return tensor.is_inference() or torch._C._is_cached_tensor(tensor)  # type: ignore[attr-defined]


def _is_recorded(tensor: Tensor) -> bool:
    """Whether a CUDA graph is recorded of what is done to tensors on the tensor's device."""
    return tensor.get_device() >= 0 and torch.cuda.is_current_stream_capturing()


def _stream_of(tensor: Tensor) -> int:
    """The stream in whose order the tensor is used. Another one may not have finished what this one waits for."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.get_device() >= 0 else 0


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from other views of the same memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _pack(arguments: AttentionArguments, by_key: bool) -> TileLists:
    from fastformer_kernels.attention.mask_tiles import mask_tiles

    mask = arguments.mask
    assert mask is not None
    alike = mask.stride(0) == 0 and arguments.key_lengths is None and arguments.prefix_lengths is None
    lengths = [t for t in (arguments.key_lengths, arguments.prefix_lengths) if t is not None]
    batch = 1 if alike else max([mask.shape[0], *(t.shape[0] for t in lengths)])
    return listed_tiles(*mask_tiles(arguments, batch, by_key=by_key))
