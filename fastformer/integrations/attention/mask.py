"""The attention masks of transformers models, stored as lengths and structure instead of (queries, keys) elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from fastformer.ops.attention.block_mask import MASK_TILE, BlockMask
from fastformer.ops.packing import packed_sequences

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskStructure:
    """The arguments of `fastformer.attention` that replace a dense mask.

    Attributes:
        causal, window, chunk, alignment, key_lengths: as `fastformer.attention` takes them.
        key_mask: (batch, 1, 1, keys) boolean, the keys that are not padding; None if lengths define them.
        spans: for each row, the first key that is not padding and the first padding key after it. Only if a CPU can
            read them, and if there is no padding between them.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as `fastformer.attention` takes them, over the tokens of
            all rows one after the other, if rows hold several sequences.
        block_mask: the whole condition, if it has none of the other forms.
    """

    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    chunk: int | None = None
    alignment: str = "bottom_right"
    key_lengths: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    block_mask: BlockMask | None = None

    @property
    def ignores_positions(self) -> bool:
        limited = self.causal or self.window != (None, None) or self.chunk is not None
        return not limited and self.block_mask is None

    @property
    def is_packed(self) -> bool:
        """Whether boundaries divide the tokens into sequences."""
        return self.cu_seqlens_q is not None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for a call of `fastformer.attention`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "spans"}
        key_mask, block_mask = values.pop("key_mask"), values.pop("block_mask")
        # The operator takes no limit beside a block mask, not even one that excludes nothing.
        return {"mask": key_mask, **values} if block_mask is None else {"mask": block_mask}

    def elements(self, batch: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """Make the equivalent dense mask, (batch, 1, queries, keys) boolean, True = may attend."""
        if self.block_mask is not None:
            return self.block_mask.to_dense()
        key = torch.arange(keys, device=device)
        lengths = torch.full((1,), keys, device=device) if self.key_lengths is None else self.key_lengths
        query = torch.arange(queries, device=device).expand(1, -1)
        if self.alignment == "bottom_right":
            query = query + (lengths - queries)[:, None]
        distance = key - query[..., None]
        allowed = (key < lengths[:, None])[:, None].expand(batch, queries, keys)
        left, right = self.window
        right = 0 if self.causal else right
        if right is not None:
            allowed = allowed & (distance <= right)
        if left is not None:
            allowed = allowed & (distance >= -left)
        if self.chunk is not None:
            allowed = allowed & (key // self.chunk == query[..., None] // self.chunk)
        if self.cu_seqlens_q is not None:
            document = packed_sequences(self.cu_seqlens_q, batch * queries).view(batch, queries)
            allowed = allowed & (document[:, :, None] == document[:, None, :])
        allowed = allowed[:, None]
        # The mask must own its elements, since a model may write to them.
        return allowed.contiguous() if self.key_mask is None else allowed & self.key_mask


class AttentionMask(torch.Tensor):
    """A boolean (batch, 1, queries, keys) mask, True = may attend, whose elements are computed when they are needed.

    For a model it is a tensor: operations that slice, expand or combine it get the elements that transformers itself
    would have computed. The elements depend only on the structure, which shares no memory with the caller. So changes
    to a cache or to a padding mask have no effect. To floating scores it adds 0 where a query may attend and the lowest
    number elsewhere, like the mask of the eager implementation. Arithmetic that would use True as the number 1 raises a
    ValueError.

    Attributes:
        structure: defines the whole mask without the elements; None if only the elements do.
        dense: the elements, computed once.
    """

    structure: MaskStructure | None
    _elements: torch.Tensor | None
    _source: AttentionMask | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        structure: MaskStructure | None = None,
        elements: torch.Tensor | None = None,
        source: AttentionMask | None = None,
    ) -> AttentionMask:
        """Make a mask of a structure, or of elements, which may be a view of the elements of `source`."""
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.structure, mask._elements, mask._source = structure, elements, source
        return mask

    @property
    def dense(self) -> torch.Tensor:
        if self._elements is None:
            assert self.structure is not None
            batch, _, queries, keys = self.shape
            self._elements = self.structure.elements(batch, queries, keys, self.device)
        return self._elements

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the mask as numbers to add to scores of `dtype`."""
        return torch.zeros_like(self.dense, dtype=dtype).masked_fill_(~self.dense, torch.finfo(dtype).min)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AttentionMask(shape={tuple(self.shape)}, structure={self.structure})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        operation, dtype = func.overloadpacket, _floating_dtype(args, kwargs)
        target = kwargs.get("out", args[0]) if func._schema.is_mutable else None
        written = target if isinstance(target, AttentionMask) else None
        if operation in _ADDED and dtype is not None and written is None:
            args, kwargs = tree_map_only(AttentionMask, lambda mask: mask.additive(dtype), (args, kwargs))
            return func(*args, **kwargs)
        among_numbers = dtype is not None and not (operation in _CHOOSES or "scaled_dot_product" in str(operation))
        if among_numbers or (operation in _CALCULATES and any(type(argument) in (int, float) for argument in args)):
            # Python's operators would take a TypeError for "not implemented".
            raise ValueError(
                f"{operation} would use an attention mask as numbers 0 and 1, but it is boolean, True = may attend; "
                f'use attn_implementation="eager" with a model that calculates with it'
            )
        source = next(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, AttentionMask))
        args, kwargs = tree_map_only(AttentionMask, lambda mask: mask.dense, (args, kwargs))
        result = func(*args, **kwargs)
        if written is not None:
            written._forget_structure()
            return written
        if operation in _GIVES_MASKS:
            return tree_map_only(torch.Tensor, lambda tensor: _mask_of(tensor, source), result)
        return result

    def _forget_structure(self) -> None:
        """Drop the structure, since the elements have been written to, directly or through a view."""
        mask: AttentionMask | None = self
        while mask is not None:
            mask.structure = None
            mask = mask._source


def _operations(names: str) -> set[Any]:
    return {getattr(aten, name) for name in names.split()}


# Operations of a boolean mask with numbers: the mask is added to them or stored among them, it selects among them, or
# it would have to become a number itself.
_ADDED = _operations("add add_ cat copy_ _to_copy")
_CHOOSES = _operations("where masked_fill masked_fill_ masked_select index index_put index_put_ bitwise_and bitwise_or")
_CALCULATES = _operations("add sub rsub mul div eq ne lt le gt ge")
# Operations whose result is a mask again.
_GIVES_MASKS = _operations(
    "slice select expand view _unsafe_view unsqueeze squeeze alias permute transpose clone detach index index_select "
    "cat repeat split split_with_sizes unbind _to_copy masked_fill bitwise_and bitwise_or bitwise_not logical_and "
    "logical_or"
)


def _floating_dtype(args: Any, kwargs: Any) -> torch.dtype | None:
    """Return the floating dtype with which a mask is combined or to which it is cast, if any."""
    leaves = tree_flatten((args, kwargs))[0]
    dtypes = [leaf if isinstance(leaf, torch.dtype) else getattr(leaf, "dtype", torch.bool) for leaf in leaves]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def _mask_of(tensor: torch.Tensor, source: AttentionMask) -> torch.Tensor:
    """Make a mask of the result of an operation on `source`, of whose elements it may be a view."""
    if tensor.dtype != torch.bool:
        return tensor
    return AttentionMask(tuple(tensor.shape), tensor.device, elements=tensor, source=source)


def elements_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the elements of a 4-D mask. 2-D masks are refused: transformers' padding masks would broadcast wrongly."""
    if mask is not None and mask.dim() != 4:
        raise ValueError(f"attention_mask must be (batch, heads, queries, keys); got shape {tuple(mask.shape)}")
    return mask.dense if isinstance(mask, AttentionMask) else mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **skips: Any,
) -> torch.Tensor:
    """Make the mask for ``attn_implementation="fastformer"``; arguments are as of transformers' `sdpa_mask`.

    Returns an `AttentionMask`, or its elements while a graph is traced, which reading lengths would break. A function
    that has parts other than transformers' own becomes a `BlockMask` if there are enough queries and keys for tiles.
    `skips` are transformers' hints on when to omit the mask; a mask without elements does not need them.
    """
    # A static cache is there to be compiled. Its mask for one query is one row; a structure would not be smaller.
    compilable = isinstance(q_offset, torch.Tensor) and q_length == 1
    traced = compilable or is_tracing(attention_mask)
    structure = None
    if not traced:
        structure = _structure(
            batch_size, q_length, kv_length, int(q_offset), kv_offset, mask_function, attention_mask, device
        )
    shape, device = (batch_size, 1, q_length, kv_length), torch.device(device)

    def elements(batch: slice, heads: slice, queries: slice) -> torch.Tensor:
        """Compute the elements of some rows of the batch and some queries."""
        made = masking_utils.sdpa_mask(
            batch.stop - batch.start,
            queries.stop - queries.start,
            kv_length,
            q_offset + queries.start,
            kv_offset,
            _from_row(mask_function, batch.start),
            attention_mask if attention_mask is None else attention_mask[batch],
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert made is not None
        return made

    # Compute this now: a static cache later adds to `q_offset` in place.
    if structure is None and not traced and min(q_length, kv_length) >= MASK_TILE:
        structure = MaskStructure(block_mask=BlockMask.from_pieces(shape, device, elements))
    if structure is not None:
        return AttentionMask(shape, device, structure)
    everything = elements(slice(0, batch_size), slice(0, 1), slice(0, q_length))
    return everything if traced else AttentionMask(shape, device, elements=everything)


def _from_row(mask_function: Callable, first: int) -> Callable:
    """The mask function of a part of the batch, which begins at row `first`."""

    def of_part(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask_function(batch + first, head, query, key)

    return mask_function if first == 0 else of_part


def _structure(
    batch: int,
    queries: int,
    keys: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable,
    padding: torch.Tensor | None,
    device: torch.device | str,
) -> MaskStructure | None:
    """Return the structure of the mask function and the padding, or None if only the elements define it."""
    pattern = _pattern(mask_function)
    if pattern is None:
        return None
    left_padding, sequence_ids = pattern.left_padding, pattern.sequence_ids
    left, right = (None if extent is None or extent >= keys - 1 else extent for extent in pattern.structure.window)
    structure = replace(pattern.structure, window=(left, right))
    # The operator counts chunks from the first key.
    if structure.chunk is not None and (kv_offset % structure.chunk or left_padding is None or left_padding.any()):
        return None
    if sequence_ids is not None:
        if padding is not None or structure.chunk is not None or queries != keys:
            return None
        return _with_documents(structure, sequence_ids.expand(batch, -1))
    first, written = q_offset - kv_offset, q_offset - kv_offset + queries
    if first == 0:
        structure = replace(structure, alignment="top_left")
    elif not (structure.ignores_positions or written == keys):
        # A static cache whose last keys have not been written yet.
        if not (structure.causal and 0 < written < keys):
            return None
        lengths = torch.full((batch,), written, dtype=torch.int32, device=device)
        structure = replace(structure, key_lengths=lengths)
    if padding is None:
        return structure
    if padding.dim() != 2:
        return None
    missing = keys + kv_offset - padding.shape[-1]
    valid = torch.nn.functional.pad(padding, (0, max(missing, 0)))[:, kv_offset : kv_offset + keys]
    return _with_padding(structure, valid, written)


def _with_padding(structure: MaskStructure, valid: torch.Tensor, written: int) -> MaskStructure:
    """Limit `structure` to the keys that `valid`, (batch, keys) boolean, allows; one synchronisation with the GPU."""
    lengths = valid.sum(-1, dtype=torch.int32)
    everything, at_end, of_written = torch.stack(
        [valid.all(), (valid[:, 1:] <= valid[:, :-1]).all(), (lengths == written).all()]
    ).tolist()
    if everything:
        return structure
    if valid.device.type == "cpu" and structure.key_lengths is None:
        structure = replace(structure, spans=_spans(valid, lengths))
    # With bottom-right alignment, key lengths also move the queries.
    if at_end and (structure.ignores_positions or structure.alignment == "top_left" or of_written):
        return replace(structure, key_lengths=lengths)
    return replace(structure, key_mask=valid[:, None, None, :])


def _spans(valid: torch.Tensor, lengths: torch.Tensor) -> tuple[tuple[int, int], ...] | None:
    """The range where each row of `valid` (batch, keys) is True, if contiguous; `lengths` counts the True elements."""
    pieces = (valid[:, 1:] & ~valid[:, :-1]).sum(-1) + valid[:, 0]
    if (pieces > 1).any():
        return None
    starts = valid.int().argmax(-1).tolist()
    return tuple((start, start + length) for start, length in zip(starts, lengths.tolist(), strict=True))


def _with_documents(structure: MaskStructure, sequence_ids: torch.Tensor) -> MaskStructure:
    """Limit `structure` to each run of equal ids in the rows of `sequence_ids`, (batch, sequence)."""
    first = torch.ones_like(sequence_ids, dtype=torch.bool)
    first[:, 1:] = sequence_ids.diff() != 0
    starts = first.flatten().nonzero().flatten()
    boundaries = torch.nn.functional.pad(starts, (0, 1), value=sequence_ids.numel()).int()
    longest = int(boundaries.diff().max())
    return replace(
        structure, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries, max_seqlen_q=longest, max_seqlen_k=longest
    )


@dataclass(frozen=True)
class _Pattern:
    """The meaning of a mask function made of transformers' own parts.

    Attributes:
        structure: the limits by position.
        left_padding: (batch,), the padding before the first chunk, if it has chunks.
        sequence_ids: (batch, sequence), equal for the tokens of one document, if rows are packed.
    """

    structure: MaskStructure
    left_padding: torch.Tensor | None = None
    sequence_ids: torch.Tensor | None = None


def _code(name: str, *arguments: Any, encloses: str) -> CodeType | None:
    """Return the code of the mask functions that a factory of transformers makes; None if it is not the known one."""
    factory = getattr(masking_utils, name, None)
    code = None if factory is None else factory(*arguments).__code__
    return code if code is not None and encloses in code.co_freevars else None


_AND = _code("and_masks", encloses="mask_functions")
_LEFT_WINDOW = _code("sliding_window_overlay", 1, encloses="sliding_window")
_WINDOW = _code("sliding_window_bidirectional_overlay", 1, encloses="sliding_window")
_CHUNK = _code("chunked_overlay", 1, None, encloses="chunk_size")
_PACKED = _code("packed_sequence_mask_function", None, encloses="packed_sequence_mask")
# Missing in the oldest releases, where positions count within the row.
_WITHIN = _code("remap_positions_for_packed_sequence", None, None, encloses="mask_function")


def _pattern(mask_function: Callable) -> _Pattern | None:
    """Read a mask function's pattern from the closures of transformers' factories; None if it has other parts."""
    structure, left_padding, sequence_ids, within = MaskStructure(), None, None, False
    for part in _parts(mask_function):
        code, enclosed = _read(part)
        if code is None:
            return None
        if part is masking_utils.causal_mask_function:
            structure = replace(structure, causal=True)
        elif code is _LEFT_WINDOW and structure.window == (None, None):
            structure = replace(structure, window=(enclosed["sliding_window"] - 1, None))
        elif code is _WINDOW and structure.window == (None, None):
            structure = replace(structure, window=(enclosed["sliding_window"],) * 2)
        elif code is _CHUNK and structure.chunk is None:
            structure, left_padding = replace(structure, chunk=enclosed["chunk_size"]), enclosed["left_padding"]
        elif code is _PACKED and sequence_ids is None:
            sequence_ids = enclosed["packed_sequence_mask"]
        elif code is _WITHIN:
            within = True
        elif part is not masking_utils.bidirectional_mask_function:
            return None
    # Only between tokens of the same document does the difference of positions equal that of places in the row.
    return None if within and sequence_ids is None else _Pattern(structure, left_padding, sequence_ids)


def _parts(mask_function: Callable) -> Iterator[Callable]:
    """Yield the functions whose conjunction is the mask function."""
    code, enclosed = _read(mask_function)
    if code is not None and code is _AND:
        for part in enclosed["mask_functions"]:
            yield from _parts(part)
        return
    yield mask_function
    if code is not None and code is _WITHIN:
        yield from _parts(enclosed["mask_function"])


def _read(function: Callable) -> tuple[CodeType | None, dict[str, Any]]:
    """Return a function's code and the variables that it encloses; None for other callables."""
    if not isinstance(function, FunctionType):
        return None, {}
    code, cells = function.__code__, function.__closure__ or ()
    return code, {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
