"""Scaled-dot-product attention, dense and packed, with the masks, biases and options that Transformers use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastformer_kernels.attention.arguments import (
    UNBOUNDED,
    AttentionArguments,
    AttentionGradients,
    Learned,
    empty_gradient,
    empty_lse,
    empty_output,
)
from fastformer_kernels.attention.score_mod import ScoreMod, score_mod_of

from fastformer.backends import use_triton
from fastformer.ops.attention.block_mask import FROM_FLEX, BlockMask
from fastformer.ops.attention.masked_nan import attention_ignoring_masked_nan
from fastformer.ops.attention.packed_mask import with_packed_mask
from fastformer.ops.attention.torch_backend import attention_backward_torch, attention_formula, attention_forward_torch
from fastformer.ops.autocast import autocast_device_type, to_autocast_dtype
from fastformer.ops.checks import (
    FLOATING_DTYPES,
    broadcasts,
    check_boundaries,
    check_device,
    check_floating,
    check_int32,
    check_lengths,
    check_like,
    check_shape,
    check_softcap,
    check_whole,
    class_name,
)
from fastformer.ops.dropout import check_dropout_p, draw_seed
from fastformer.ops.operator import operator, schema_of_fields, vjp

MAX_HEAD_DIM = 512
# The number of positions in a sequence is smaller than this.
FARTHEST = 1 << 30


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | BlockMask | None = None,
    bias: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    causal: bool = False,
    prefix_lengths: torch.Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    chunk: int | None = None,
    alignment: str = "bottom_right",
    scale: float | torch.Tensor | None = None,
    query_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    key_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    key_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    ignore_masked_nan: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention: ``softmax(softcap(scale * query @ key^T) + bias) @ value``. All arguments can be combined.

    Two layouts. *Dense*: query (batch, heads, queries, head_dim), key (batch, kv_heads, keys, head_dim), value (batch,
    kv_heads, keys, value_head_dim). *Packed*, when `cu_seqlens_q` is given: (total_tokens, heads, head_dim) and so on,
    sequences one after the other without padding. Any strides. heads must be a multiple of kv_heads: each key/value
    head serves ``heads / kv_heads`` neighbouring query heads.

    Who may attend to whom (all conditions hold together; positions count within a sequence):
        mask: boolean, True = may attend, or floating, added to the scores; broadcasts to (batch, heads, queries, keys).
            A large boolean one that all heads share is packed to bits, once for all layers and passes, if kernels run:
            a change of its elements must count in `mask._version`, unlike those by `mask.data` or a collective.
            Or a `fastformer.BlockMask`, without elements where it is all or nothing. It takes no other condition beside
            it: limits by position or by length are part of its function. Dense only.
        causal: no key after the query's own position.
        prefix_lengths: (batch,) int32; the number of first keys of each sequence to which neither `causal` nor the
            window's right limit applies (prefix language models).
        window: (left, right), the number of keys before and after its own position that a query sees; None = no limit.
        chunk: a query sees only its own chunk of this many positions, counted from the first key (Llama 4).
        alignment: the own position of a query when queries and keys differ in number: "bottom_right" (the last query
            is at the last key, as in a cache) or "top_left" (the first query is at the first key, as in PyTorch).
        key_lengths: (batch,) int32, the number of keys of each dense sequence that are not padding.
        Documents packed into one row are sequences: give their boundaries in `cu_seqlens_q`, and none sees another.

    How the scores are computed, in this order:
        query_norm, key_norm: applied to query and key first, for instance ``fastformer.nn.RMSNorm(head_dim)``.
        scale: multiplies ``query @ key^T``; default ``1 / sqrt(head_dim)``. A (heads,) float32 tensor gives each head
            its own scale, and is differentiable.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        score_mod: a `fastformer.ScoreMod`, a function of the score and its indices.
        bias: floating, broadcasts like `mask`; its gradient is summed over the broadcast dimensions.
        relative_bias: (heads, 2 * max_distance + 1) floating; the bias for each key position - query position, from
            -max_distance to max_distance. Larger distances get the bias of the nearest end. `relative_position_bias`
            makes it from a table and a bucket function (T5); a (heads, queries, keys) bias is never formed.
        alibi_slopes: (heads,) or (batch, heads) float32; adds ``-slope * |query position - key position|``
            (Press et al. 2022). Differentiable.
        sinks: (heads,) learned logits that enter each head's softmax normalisation and have no value (gpt-oss).

    Args:
        dropout_p: probability of dropping an attention weight; the kept ones are scaled by ``1 / (1 - dropout_p)``. The
            pattern depends on PyTorch's generator and on positions only, not on backend or tile sizes.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, first token of each packed sequence and the total at the end;
            cu_seqlens_k defaults to cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: length of the longest packed sequence (reading it from the GPU would stall it).
        return_lse: also return the log-sum-exp of the scores, float32, (batch, heads, queries) or packed (heads,
            total_tokens); differentiable.
        ignore_masked_nan: masked keys and values have no effect even if they are infinite or NaN. This is always so on
            a CPU. On a GPU, without this option, masked NaN *values* reach every row, and masked NaN keys do so in the
            backward, since zero times NaN is NaN. The option costs two more attention calls.

    Returns:
        The output, in query's layout with value's head_dim, in query's dtype; with `return_lse` also the log-sum-exp. A
        query that may attend to nothing gives zeros (log-sum-exp -inf, or its sink) and zero gradients.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted.

    Source: FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).

    >>> q = torch.randn(2, 8, 100, 64); k = torch.randn(2, 2, 100, 64); v = torch.randn(2, 2, 100, 64)
    >>> fastformer.attention(q, k, v, causal=True, window=(31, None), softcap=50.0).shape
    torch.Size([2, 8, 100, 64])
    """
    query = query if query_norm is None else query_norm(query)
    key = key if key_norm is None else key_norm(key)
    # Passed by position: passing twenty arguments by name takes five microseconds.
    query, key, value, arguments = checked_arguments(
        query,
        key,
        value,
        mask,
        bias,
        relative_bias,
        alibi_slopes,
        causal,
        prefix_lengths,
        window,
        chunk,
        alignment,
        scale,
        softcap,
        sinks,
        dropout_p,
        key_lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        score_mod,
    )
    arguments = with_packed_mask(query, arguments)
    if ignore_masked_nan and use_triton(query):
        output, lse = attention_ignoring_masked_nan(_attention, query, key, value, arguments)
    else:
        output, lse = _attention(query, key, value, *arguments)
    return (output, lse) if return_lse else output


def checked_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | BlockMask | None,
    bias: torch.Tensor | None,
    relative_bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    causal: bool,
    prefix_lengths: torch.Tensor | None,
    window: tuple[int | None, int | None] | None,
    chunk: int | None,
    alignment: str,
    scale: float | torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout_p: float,
    key_lengths: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    score_mod: ScoreMod | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionArguments]:
    """Check a call of `attention` and bring it into canonical form.

    Returns query, key and value in autocast's dtype, and all other arguments.
    """
    if torch.is_autocast_enabled(autocast_device_type(query)):
        query, key, value = to_autocast_dtype(query), to_autocast_dtype(key), to_autocast_dtype(value)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    batch, queries, keys = _check_tensors(query, key, value, packed, cu_seqlens_q, cu_seqlens_k)
    if packed:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        queries, keys = _check_max_seqlen(max_seqlen_q, max_seqlen_k, same=cu_seqlens_k is cu_seqlens_q)
        if key_lengths is not None:
            raise ValueError("key_lengths is for dense tensors; the lengths of packed sequences come from cu_seqlens_k")
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError("max_seqlen_q and max_seqlen_k are for packed tensors; give cu_seqlens_q with them")
    heads = query.shape[1]
    tiles = _NO_TILES
    if isinstance(mask, BlockMask):
        limits = (causal, window, chunk, prefix_lengths, key_lengths, cu_seqlens_q)
        tiles, mask = _check_block_mask(mask, (batch, heads, queries, keys), query, limits), None
    if mask is not None or bias is not None:
        mask, bias = mask_and_bias(mask, bias, (batch, heads, queries, keys), query)
    left, right = _check_window(window, causal)
    if chunk is not None:
        check_whole("chunk", chunk, 1, "no limit")
    if alignment not in ("bottom_right", "top_left"):
        raise ValueError(f"alignment must be 'bottom_right' or 'top_left'; got {alignment!r}")
    check_dropout_p(dropout_p)
    check_softcap(softcap)
    if key_lengths is not None:
        check_int32("key_lengths", key_lengths, (batch,), "query", query)
    if prefix_lengths is not None:
        check_int32("prefix_lengths", prefix_lengths, (batch,), "query", query)
        if right == UNBOUNDED:
            raise ValueError("prefix_lengths needs causal=True or a window with a right limit, which it lifts")
    head_scales, factor = _check_scale(scale, heads, query)
    arguments = AttentionArguments(
        mask,
        bias,
        _check_relative_bias(relative_bias, heads, query),
        _check_slopes(alibi_slopes, batch, heads, query),
        head_scales,
        _check_sinks(sinks, heads, query),
        key_lengths,
        prefix_lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        *tiles,
        queries,
        keys,
        factor,
        left,
        right,
        chunk if chunk is not None and chunk < FARTHEST else 0,
        alignment == "bottom_right",
        softcap or 0.0,
        None if score_mod is None else _key_of(score_mod),
        dropout_p,
        draw_seed(query.device) if dropout_p else None,
    )
    return query, key, value, arguments


def _check_tensors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: bool,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> tuple[int, int, int]:
    """Check the three tensors against each other; return the numbers of sequences, queries and keys."""
    # Each attribute is read only once: a read takes a tenth of a microsecond.
    dtype, device = query.dtype, query.device
    if dtype not in FLOATING_DTYPES:
        check_floating("query", query)
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    for name, tensor, given in (("query", query, shape), ("key", key, key_shape), ("value", value, value_shape)):
        if tensor.dtype != dtype or tensor.device != device:
            check_like(name, tensor, "query", query)
        if len(given) != (3 if packed else 4):
            layout = "packed (total_tokens, heads, head_dim)" if packed else "dense (batch, heads, sequence, head_dim)"
            raise ValueError(f"{name} must be {layout}; got shape {tuple(given)}")
        if not 1 <= given[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}'s head_dim must be from 1 to {MAX_HEAD_DIM}; got {given[-1]}")
    if key_shape[:-1] != value_shape[:-1]:
        raise ValueError(
            f"key and value must agree in all but head_dim; got {tuple(key_shape)} and {tuple(value_shape)}"
        )
    if shape[-1] != key_shape[-1]:
        raise ValueError(f"query and key must have the same head_dim; got {shape[-1]} and {key_shape[-1]}")
    heads, kv_heads = shape[1], key_shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query's heads must be a multiple of key's; got {heads} and {kv_heads}")
    if not packed:
        if shape[0] != key_shape[0]:
            raise ValueError(f"query and key must have the same batch size; got {shape[0]} and {key_shape[0]}")
        return shape[0], shape[2], key_shape[2]
    if cu_seqlens_q is None:
        raise ValueError("cu_seqlens_k was given without cu_seqlens_q")
    batch = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q.dim() == 1 else -1
    for name, boundaries in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if boundaries is not None:
            check_int32(name, boundaries, (batch + 1,), "query", query)
    if cu_seqlens_k is None and shape[0] != key_shape[0]:
        raise ValueError(
            f"key has {key_shape[0]} tokens where query has {shape[0]}: cross-attention needs cu_seqlens_k"
        )
    return batch, shape[0], key_shape[0]


def _check_max_seqlen(max_seqlen_q: int | None, max_seqlen_k: int | None, same: bool) -> tuple[int, int]:
    max_seqlen_k = max_seqlen_q if same and max_seqlen_k is None else max_seqlen_k
    if max_seqlen_q is None or max_seqlen_k is None:
        missing = "max_seqlen_q" if max_seqlen_q is None else "max_seqlen_k"
        raise ValueError(f"{missing} is needed with cu_seqlens: the length of the longest packed sequence")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not 0 <= longest < FARTHEST:
            raise ValueError(f"{name} must be from 0 to {FARTHEST - 1}; got {longest}")
    return max_seqlen_q, max_seqlen_k


def _check_window(window: tuple[int | None, int | None] | None, causal: bool) -> tuple[int, int]:
    if window is None:
        return UNBOUNDED, 0 if causal else UNBOUNDED
    if not isinstance(window, Sequence) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right), or None for no limit; got {window!r}")
    left, right = window
    for name, extent in (("left", left), ("right", right)):
        if extent is not None:
            check_whole(f"window's {name} extent", extent, 0, "no limit")
    if causal:
        right = 0
    return _extent(left), _extent(right)


def _extent(extent: int | None) -> int:
    # Limit the extent: a larger one would overflow a kernel's 32-bit positions.
    return UNBOUNDED if extent is None or extent >= FARTHEST else extent


def mask_and_bias(
    mask: torch.Tensor | None, bias: torch.Tensor | None, shape: tuple[int, int, int, int], query: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the boolean mask and the additive bias, both 4-D; an additive mask is added to the bias."""
    mask = None if mask is None else _check_broadcast("mask", mask, shape, query)
    bias = None if bias is None else _check_broadcast("bias", bias, shape, query)
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias must be floating; got {bias.dtype}. Give a boolean tensor as mask")
    if mask is None or mask.dtype == torch.bool:
        return mask, bias
    if not mask.is_floating_point():
        raise TypeError(f"mask must be boolean (True = may attend) or floating (added to the scores); got {mask.dtype}")
    return None, mask if bias is None else mask + bias


_Tiles = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
_ACCEPTED = {"mask": f"a tensor or a fastformer.BlockMask{FROM_FLEX}", "bias": "a tensor"}
# Without a block mask: the arguments that it fills.
_NO_TILES: _Tiles = (None, None, None, None)
_LIMITS = ("causal", "window", "chunk", "prefix_lengths", "key_lengths", "cu_seqlens_q")


def _check_block_mask(
    mask: BlockMask, shape: tuple[int, int, int, int], query: torch.Tensor, limits: tuple[Any, ...]
) -> _Tiles:
    """Return the lists and bits of the mask by query and, if there may be a backward, by key."""
    check_device("mask", mask.by_query.lists, "query", query)
    if not broadcasts(mask.shape[:2], shape[:2]) or tuple(mask.shape[2:]) != tuple(shape[2:]):
        raise ValueError(
            f"a BlockMask must have the sizes (batch or 1, heads or 1, queries, keys) of {shape}; got {mask.shape}"
        )
    for name, given in zip(_LIMITS, limits, strict=True):
        if given is not None and given is not False:
            raise ValueError(f"{name} cannot be combined with a BlockMask; make it part of the mask's function")
    key_lists, key_bits = mask.by_key if torch.is_grad_enabled() else (None, None)
    return mask.by_query.lists, mask.by_query.bits, key_lists, key_bits


def _check_broadcast(
    name: str, tensor: torch.Tensor, shape: tuple[int, int, int, int], query: torch.Tensor
) -> torch.Tensor:
    """Return `tensor` as 4-D, after checking that it broadcasts to (batch, heads, queries, keys)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be {_ACCEPTED[name]}; got {class_name(tensor)}")
    check_device(name, tensor, "query", query)
    given = tuple(tensor.shape)
    if not broadcasts(given, shape):
        raise ValueError(f"{name} must broadcast to (batch, heads, queries, keys) = {shape}; got shape {given}")
    return tensor.reshape((1,) * (4 - len(given)) + given)


def _key_of(score_mod: ScoreMod) -> str:
    if not isinstance(score_mod, ScoreMod):
        raise TypeError(f"score_mod must be a fastformer.ScoreMod; got {type(score_mod).__name__}")
    return score_mod.key


def _check_slopes(slopes: torch.Tensor | None, batch: int, heads: int, query: torch.Tensor) -> torch.Tensor | None:
    if slopes is None:
        return None
    if slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be float32; got {slopes.dtype}")
    check_device("alibi_slopes", slopes, "query", query)
    if tuple(slopes.shape) != (heads,) and tuple(slopes.shape) != (batch, heads):
        raise ValueError(f"alibi_slopes must have shape {(heads,)} or {(batch, heads)}; got {tuple(slopes.shape)}")
    return slopes.reshape(-1, heads).contiguous()


def _check_sinks(sinks: torch.Tensor | None, heads: int, query: torch.Tensor) -> torch.Tensor | None:
    if sinks is None:
        return None
    check_floating("sinks", sinks)
    check_device("sinks", sinks, "query", query)
    check_shape("sinks", sinks, (heads,))
    return sinks.float().contiguous()


def _check_scale(
    scale: float | torch.Tensor | None, heads: int, query: torch.Tensor
) -> tuple[torch.Tensor | None, float]:
    """Return the scale of each head (None if all heads share one) and the common scale."""
    if not isinstance(scale, torch.Tensor):
        return None, 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if scale.dtype != torch.float32:
        raise TypeError(f"scale must be a number or float32; got {scale.dtype}")
    check_device("scale", scale, "query", query)
    check_shape("scale", scale, (heads,))
    return scale.contiguous(), 1.0


def _check_relative_bias(bias: torch.Tensor | None, heads: int, query: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    check_floating("relative_bias", bias)
    check_device("relative_bias", bias, "query", query)
    if bias.dim() != 2 or bias.shape[0] != heads or bias.shape[1] % 2 == 0:
        raise ValueError(
            f"relative_bias must have shape (heads, 2 * max_distance + 1) with {heads} heads; got {tuple(bias.shape)}"
        )
    return bias.contiguous()


# The arguments after query, key and value of every attention operator.
ARGUMENTS_SCHEMA = schema_of_fields(AttentionArguments)


@operator(
    "fastformer::attention",
    schema=f"(Tensor query, Tensor key, Tensor value, {ARGUMENTS_SCHEMA}) -> (Tensor, Tensor)",
)
def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    call = AttentionArguments._make(arguments)
    check_lengths_of(query, key, call)
    if use_triton(query):
        if call.score_mod is not None and score_mod_of(call.score_mod).forward is None:
            raise ValueError("score_mod needs its forward and backward on a GPU, and with the backend triton")
        from fastformer_kernels.attention.forward import attention_forward

        return attention_forward(query, key, value, call)
    return attention_forward_torch(query, key, value, call)


def check_lengths_of(query: torch.Tensor, key: torch.Tensor, call: AttentionArguments) -> None:
    """Raise ValueError if lengths given in the call do not fit its tensors.

    On a GPU, reading the lengths would stall it. There the kernels touch nothing outside the tensors, and
    `fastformer.debug` asserts the lengths.
    """
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        check_boundaries("cu_seqlens_q", call.cu_seqlens_q, query.shape[0], call.max_seqlen_q)
        if call.cu_seqlens_k is not call.cu_seqlens_q or key.shape[0] != query.shape[0]:
            check_boundaries("cu_seqlens_k", call.cu_seqlens_k, key.shape[0], call.max_seqlen_k)
    if call.key_lengths is not None:
        check_lengths("key_lengths", call.key_lengths, "the number of keys", call.max_seqlen_k)
    if call.prefix_lengths is not None:
        check_lengths("prefix_lengths", call.prefix_lengths, "the number of keys", call.max_seqlen_k)


@operator(
    "fastformer::attention_backward",
    schema=(
        "(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
        f"bool[] needed, {ARGUMENTS_SCHEMA}) -> ({', '.join(['Tensor'] * len(AttentionGradients._fields))})"
    ),
)
def _attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    needed: Sequence[bool],
    *arguments: Any,
) -> AttentionGradients:
    """Gradients of query, key, value and the learned arguments; None for each gradient that is not needed."""
    if use_triton(query):
        from fastformer_kernels.attention.backward import attention_backward as backward
    else:
        backward = attention_backward_torch
    inputs = (grad_output, grad_lse, query, key, value, output, lse)
    return backward(*inputs, AttentionArguments._make(arguments), Learned._make(needed))


@_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_output(query, value), empty_lse(query)


@_attention_backward.register_fake
def _(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    needed: Sequence[bool],
    *arguments: Any,
) -> tuple[torch.Tensor | None, ...]:
    learned = AttentionArguments._make(arguments).learned
    return (
        *map(empty_gradient, (query, key, value)),
        *(
            None if tensor is None or not wanted else tensor.new_empty(tensor.shape)
            for tensor, wanted in zip(learned, needed, strict=True)
        ),
    )


@_attention.register_formula
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    call = AttentionArguments._make(arguments)
    check_lengths_of(query, key, call)
    return attention_formula(query, key, value, call)


@_attention_backward.register_formula
def _(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    needed: Sequence[bool],
    *arguments: Any,
) -> tuple[torch.Tensor | None, ...]:
    call = AttentionArguments._make(arguments)
    learned = [tensor if wanted else None for tensor, wanted in zip(call.learned, needed, strict=True)]

    def forward(query: Any, key: Any, value: Any, *learned: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_formula(query, key, value, call.with_learned(learned))

    return tuple(vjp(forward, [query, key, value, *learned], [grad_output, grad_lse]))


# The number of AttentionArguments' fields that are tensors. The seed, after the numbers, is one more tensor.
_TENSORS = AttentionArguments._fields.index("max_seqlen_q")
_AFTER_LEARNED = 4 + len(Learned._fields)
_NO_GRADIENTS = (None,) * (3 + len(AttentionArguments._fields))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    count = 3 + _TENSORS
    ctx.save_for_backward(*output, inputs[-1], *inputs[:count])
    ctx.numbers = inputs[count:-1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    output, lse, seed, query, key, value, *tensors = ctx.saved_tensors
    if grad_output is None and grad_lse is None:
        return _NO_GRADIENTS
    # After query, key, value and mask come the learned arguments.
    needed = list(ctx.needs_input_grad[4:_AFTER_LEARNED])
    grad_query, grad_key, grad_value, *learned = _attention_backward(
        torch.zeros_like(output) if grad_output is None else grad_output,
        grad_lse,
        query,
        key,
        value,
        output,
        lse,
        needed,
        *tensors,
        *ctx.numbers,
        seed,
    )
    if True not in needed:
        return grad_query, grad_key, grad_value, *_NO_GRADIENTS[3:]
    learned = [grad if wanted else None for grad, wanted in zip(learned, needed, strict=True)]
    return grad_query, grad_key, grad_value, None, *learned, *_NO_GRADIENTS[_AFTER_LEARNED:]


_attention.register_autograd(_backward, setup_context=_setup_context)
