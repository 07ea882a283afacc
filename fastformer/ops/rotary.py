"""Rotary position embedding of queries and keys, dense and packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.debugging import debugging
from fastformer.ops.checks import FLOATING_DTYPES, check_device, check_floating, check_indices, check_like, check_shape
from fastformer.ops.operator import in_dtype, operator


def rotary_frequencies(rotary_dim: int, base: float = 10000.0, scaling: float = 1.0) -> Tensor:
    """Return the angle of each pair of features per position: ``base ** (-2 i / dim) / scaling``.

    Args:
        rotary_dim: the number of rotated features, even.
        base: theta in Su et al. 2021; 10,000 there, 500,000 in Llama 3.
        scaling: positions are divided by it (position interpolation, Chen et al. 2023).

    Returns:
        (rotary_dim / 2,) float64 in radians.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be an even number from 2; got {rotary_dim}")
    if not base > 0.0:
        raise ValueError(f"base must be positive; got {base}")
    if not scaling > 0.0:
        raise ValueError(f"scaling must be positive; got {scaling}")
    return base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim) / scaling


def rotary_table(
    frequencies: Tensor, positions: int, magnitude: float = 1.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of every position.

    Args:
        frequencies: (rotary_dim / 2,), radians from one position to the next: from `rotary_frequencies`, or any
            other, such as the `inv_freq` of Hugging Face's Llama 3, YaRN or LongRoPE scalings.
        positions: the number of positions, from 0 on.
        magnitude: a factor for both (YaRN's attention scaling).
        device: of the result (default: PyTorch's default device).

    Returns:
        cos and sin, each (positions, rotary_dim / 2) float32, from angles in float64.
    """
    angles = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * frequencies.detach().cpu().double()
    cos, sin = (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()
    device = torch.get_default_device() if device is None else device
    return cos.to(device), sin.to(device)


@overload
def rotary(
    query: Tensor,
    key: None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, None]: ...
@overload
def rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]: ...
def rotary(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding: rotate pairs of features by angles that grow with the position (Su et al. 2021).

    Args:
        query: (batch, heads, sequence, head_dim), or packed (total_tokens, heads, head_dim) with `cu_seqlens`; float32,
            float16 or bfloat16, any strides.
        key: like `query`, except for the number of heads; or None.
        cos, sin: (positions, rotary_dim / 2) float32, as `rotary_table` makes them. With rotary_dim < head_dim the
            features from rotary_dim on are unchanged. They are constants without a gradient.
        position_ids: int64 or int32, (batch, sequence), (1, sequence) or packed (total_tokens,): each token's row of
            the table. By default its index within its sequence.
        offsets: (batch,) int64 or int32, added to each sequence's default positions: the number of keys in a cache.
        cu_seqlens: (batch + 1,) int32, first token of each packed sequence and the total at the end.
        interleaved: pairs are features (2 i, 2 i + 1), as in the paper and GPT-J; otherwise
            (i, i + rotary_dim / 2), as in Llama and GPT-NeoX.
        inplace: overwrite `query` and `key` and return them. Autograd's rules for in-place operations hold.
            Use the returned tensors: torch.compile before PyTorch 2.13 does not take gradients through the argument.

    Returns:
        The rotated query and key (None without a key), in their own shapes and dtypes, computed in float32.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted.
        IndexError: a position is outside the table, on a CPU. Such a token becomes NaN on a GPU, which is not waited
            for, and under `torch.compile`.

    >>> cos, sin = fastformer.rotary_table(fastformer.rotary_frequencies(64), positions=128)
    >>> q, k = torch.randn(2, 8, 128, 64), torch.randn(2, 2, 128, 64)
    >>> q, k = fastformer.rotary(q, k, cos, sin)
    """
    packed = cu_seqlens is not None
    if query.dtype not in FLOATING_DTYPES or query.dim() != (3 if packed else 4):
        _refuse_query(query, packed)
    if key is not None:
        _check_key(key, query)
    _check_table(cos, sin, query)
    if position_ids is not None or offsets is not None or cu_seqlens is not None:
        position_ids, offsets, cu_seqlens = _checked_positions(position_ids, offsets, cu_seqlens, query)
    table = (cos.contiguous(), sin.contiguous(), position_ids, offsets, cu_seqlens, interleaved)
    if not inplace:
        rotated, rotated_key = _rotary(query, key, *table, False)
        return rotated, None if key is None else rotated_key
    if torch.is_grad_enabled() and (query.requires_grad or (key is not None and key.requires_grad)):
        # One at a time, since autograd lets a function with several outputs change no views, such as a projection's.
        # The returned tensor is the argument, except under torch.compile before PyTorch 2.13.
        query = _InplaceRotary.apply(query, *table)
        key = None if key is None else _InplaceRotary.apply(key, *table)
    else:
        _rotary_inplace(query, key, *table)
    return query, key


def _refuse_query(query: Tensor, packed: bool) -> NoReturn:
    check_floating("query", query)
    layout = "packed (total_tokens, heads, head_dim)" if packed else "dense (batch, heads, sequence, head_dim)"
    raise ValueError(f"query must be {layout}; got shape {tuple(query.shape)}")


def _check_key(key: Tensor, query: Tensor) -> None:
    if key.dtype != query.dtype or key.device != query.device:
        check_like("key", key, "query", query)
    given, wanted = key.shape, query.shape
    if len(given) != len(wanted) or given[0] != wanted[0] or given[2:] != wanted[2:]:
        raise ValueError(f"key must have query's shape except for the heads, {tuple(wanted)}; got {tuple(given)}")


def _check_table(cos: Tensor, sin: Tensor, query: Tensor) -> None:
    shape, device = cos.shape, query.device
    fits = (
        cos.dtype == torch.float32
        and sin.dtype == torch.float32
        and len(shape) == 2
        and sin.shape == shape
        and shape[0] > 0
        and 1 <= shape[1] <= query.shape[-1] // 2
        and not (cos.requires_grad or sin.requires_grad)
        and cos.device == device
        and sin.device == device
    )
    if not fits:
        _refuse_table(cos, sin, query)


def _refuse_table(cos: Tensor, sin: Tensor, query: Tensor) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{name} must be float32; got {table.dtype}")
        if table.dim() != 2 or table.shape[0] == 0 or not 1 <= table.shape[1] <= query.shape[-1] // 2:
            raise ValueError(
                f"{name} must have shape (positions, rotary_dim / 2), not empty, with rotary_dim up to head_dim, "
                f"{query.shape[-1]}; got {tuple(table.shape)}"
            )
        if table.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it is a constant table of angles")
        check_device(name, table, "query", query)
    check_shape("sin", sin, tuple(cos.shape))


def _checked_positions(
    position_ids: Tensor | None, offsets: Tensor | None, cu_seqlens: Tensor | None, query: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check the three tensors and return them contiguous."""
    batch = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens is not None:
        _check_integers("cu_seqlens", cu_seqlens, [(batch + 1,)], query)
        cu_seqlens = cu_seqlens.contiguous()
    if position_ids is not None:
        packed = cu_seqlens is not None
        shapes = [(query.shape[0],)] if packed else [(query.shape[0], query.shape[2]), (1, query.shape[2])]
        _check_integers("position_ids", position_ids, shapes, query)
        if offsets is not None:
            raise ValueError("position_ids and offsets were both given; offsets are added only to default positions")
        position_ids = position_ids.contiguous()
    if offsets is not None:
        _check_integers("offsets", offsets, [(batch,)], query)
        offsets = offsets.contiguous()
    return position_ids, offsets, cu_seqlens


def _check_integers(name: str, tensor: Tensor, shapes: Sequence[tuple[int, ...]], query: Tensor) -> None:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32; got {tensor.dtype}")
    if all(tuple(tensor.shape) != shape for shape in shapes):
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; got {tuple(tensor.shape)}")
    check_device(name, tensor, "query", query)


@operator("fastformer::rotary")
def _rotary(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the rotated query and key."""
    rotated = torch.empty_like(query)
    rotated_key = None if key is None else torch.empty_like(key)
    outputs = (rotated,) if rotated_key is None else (rotated, rotated_key)
    _rotate(query, key, outputs, cos, sin, position_ids, offsets, cu_seqlens, interleaved, inverse)
    return rotated, rotated_key


@_rotary.register_fake
def _(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(query), None if key is None else torch.empty_like(key)


@_rotary.register_formula
def _(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor | None]:
    cos, sin = _rows_of_table(query, cos, sin, position_ids, offsets, cu_seqlens)
    sin = -sin if inverse else sin
    pairs = cos.shape[-1]
    dim, sizes = (-1, (pairs, 2)) if interleaved else (-2, (2, pairs))

    def turned(x: Tensor) -> Tensor:
        turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        a, b = in_dtype(turning, torch.float32).unflatten(-1, sizes).unbind(dim)
        both = in_dtype(torch.stack([a * cos - b * sin, b * cos + a * sin], dim).flatten(-2), x.dtype)
        return torch.cat([both, rest], dim=-1) if rest.shape[-1] else both

    return turned(query), None if key is None else turned(key)


@operator("fastformer::rotary_", mutates_args=("query", "key"))
def _rotary_inplace(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
) -> None:
    outputs = (query,) if key is None else (query, key)
    _rotate(query, key, outputs, cos, sin, position_ids, offsets, cu_seqlens, interleaved, False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, position_ids, offsets, cu_seqlens, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, position_ids, offsets, cu_seqlens)


def _backward(ctx: Any, grad_query: Tensor, grad_key: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_key = grad_key if ctx.needs_input_grad[1] else None
    grad_query, key_gradient = _rotary(grad_query, grad_key, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return grad_query, None if grad_key is None else key_gradient, None, None, None, None, None, None, None


_rotary.register_autograd(_backward, setup_context=_setup_context)
_rotary.register_decomposition()


class _InplaceRotary(torch.autograd.Function):
    """A rotation in place with a derivative: PyTorch accepts registered derivatives only for functional operators."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *table: Any) -> Tensor:
        ctx.interleaved = table[-1]
        ctx.save_for_backward(*table[:-1])
        ctx.mark_dirty(input)
        _rotary_inplace(input, None, *table)
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, _ = _rotary(grad, None, *ctx.saved_tensors, ctx.interleaved, True)
        return grad, *(None,) * 6


def _rotate(
    query: Tensor,
    key: Tensor | None,
    outputs: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    if not query.numel() and (key is None or not key.numel()):
        return
    if use_triton(query):
        if query.is_cpu or debugging():
            check_indices("positions", _positions(query, position_ids, offsets, cu_seqlens), cos.shape[0])
        from fastformer_kernels.rotary import rotate

        rotate(
            query,
            key,
            outputs,
            cos,
            sin,
            position_ids,
            offsets,
            cu_seqlens,
            interleaved,
            inverse,
            outputs[0] is query,
        )
        return
    cos, sin = _rows_of_table(query, cos, sin, position_ids, offsets, cu_seqlens)
    _rotate_torch(query, outputs[0], cos, sin, interleaved, inverse)
    if key is not None:
        _rotate_torch(key, outputs[1], cos, sin, interleaved, inverse)


def _rows_of_table(
    query: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Each token's cosines and sines, broadcasting to (batch, heads, sequence, pairs) or (tokens, heads, pairs)."""
    if position_ids is None and offsets is None and cu_seqlens is None:
        sequence = query.shape[2]
        if sequence > cos.shape[0]:
            raise IndexError(f"positions must be from 0 to {cos.shape[0] - 1}; got 0 to {sequence - 1}")
        return cos.narrow(0, 0, sequence), sin.narrow(0, 0, sequence)
    positions = _positions(query, position_ids, offsets, cu_seqlens)
    check_indices("positions", positions, cos.shape[0])
    if positions.is_cpu and not torch.compiler.is_compiling():
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    # They cannot be read: those outside the table give NaN.
    rows = positions.clamp(0, cos.shape[0] - 1)
    outside = (rows != positions)[..., None]
    cos, sin = cos[rows].masked_fill(outside, math.nan), sin[rows].masked_fill(outside, math.nan)
    return cos.unsqueeze(1), sin.unsqueeze(1)


def _positions(query: Tensor, position_ids: Tensor | None, offsets: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The position of each token: (batch or 1, sequence), or packed (total_tokens,)."""
    if position_ids is not None:
        return position_ids
    if cu_seqlens is None:
        positions = torch.arange(query.shape[2], device=query.device)[None, :]
        return positions if offsets is None else positions + offsets[:, None]
    positions = torch.arange(query.shape[0], device=query.device)
    sequence = torch.searchsorted(cu_seqlens, positions.to(cu_seqlens.dtype), right=True) - 1
    positions = positions - cu_seqlens[sequence]
    return positions if offsets is None else positions + offsets[sequence]


def _rotate_torch(input: Tensor, output: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    turning = 2 * cos.shape[-1]
    inplace = output is input
    if turning < input.shape[-1]:
        if not inplace:
            output[..., turning:] = input[..., turning:]
        input, output = input[..., :turning], output[..., :turning]
    wide = input.to(torch.float32, copy=inplace)
    turned = output if output.dtype == torch.float32 else torch.empty_like(wide)
    # The two features of a pair are neighbours, or half of the rotated features apart.
    pairs = cos.shape[-1]
    dim, sizes = (-1, (pairs, 2)) if interleaved else (-2, (2, pairs))
    wide, turned_pairs = wide.view(*input.shape[:-1], *sizes), turned.view(*input.shape[:-1], *sizes)
    torch.mul(wide, cos.unsqueeze(dim), out=turned_pairs)
    a, b = wide.unbind(dim)
    turned_a, turned_b = turned_pairs.unbind(dim)
    sign = -1.0 if inverse else 1.0
    turned_a.addcmul_(b, sin, value=-sign)
    turned_b.addcmul_(a, sin, value=sign)
    if turned is not output:
        output.copy_(turned)
