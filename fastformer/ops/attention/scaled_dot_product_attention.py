"""PyTorch's `scaled_dot_product_attention`, with the same arguments and shapes, computed by our attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from torch.autograd import forward_ad

from fastformer.ops.attention.attention import MAX_HEAD_DIM, attention, mask_and_bias
from fastformer.ops.attention.flash import has_finite_scores, is_finite
from fastformer.ops.attention.torch_backend import attention_formula
from fastformer.ops.checks import broadcasts
from fastformer.ops.dropout import draw_seed


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention`: same arguments, same meaning.

    PyTorch itself computes heads wider than 512 and float64.

    Args:
        query: (..., heads, queries, head_dim); key and value: (..., kv_heads, keys, head_dim). Leading dimensions
            broadcast, and so do heads unless `enable_gqa`; a tensor of two dimensions has one head.
        attn_mask: boolean (True = may attend) or floating (added), broadcastable to (..., heads, queries, keys).
        dropout_p: applied whenever it is not zero.
        is_causal: lower-triangular from the top left; not together with `attn_mask`.
        scale: default ``1 / sqrt(head_dim)``.
        enable_gqa: each head of key serves neighbouring query heads, and so does each head of value.

    Returns:
        (..., heads, queries, value_head_dim). The one difference: a fully masked row gives zeros where PyTorch's
        implementations give zeros or NaN.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal=True")
    if isinstance(scale, torch.Tensor):
        scale = float(scale)
    widths = query.shape[-1:] + value.shape[-1:]
    if query.shape[-3:-2] == (0,):
        # Older versions of PyTorch divide by the number of heads; division by zero ends the process.
        return query @ key.transpose(-2, -1) @ value
    if 0 in widths:
        arguments = (attn_mask, dropout_p, is_causal)
        return F.scaled_dot_product_attention(query, key, value, *arguments, scale=scale, enable_gqa=enable_gqa)
    own = query.dtype != torch.float64 and max(widths, default=0) <= MAX_HEAD_DIM
    attend = _attend_top_left if own else _attend_by_pytorch
    options = (is_causal, scale, dropout_p)
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    one_batch = len(shape) == len(key_shape) == len(value_shape) == 4 and shape[0] == key_shape[0] == value_shape[0]
    if one_batch and key_shape[1] == value_shape[1] and (enable_gqa or shape[1] == key_shape[1]):
        return attend(query, key, value, attn_mask, *options)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, (..., sequence, head_dim); got {tensor.dim()}")
    q, k, v = (tensor if tensor.dim() > 2 else tensor[None] for tensor in (query, key, value))
    if enable_gqa:
        k, v = _with_equal_heads(k, v, q.shape[-3])
    else:
        heads = _broadcast_heads(q, k, v)
        q, k, v = (tensor.expand(*tensor.shape[:-3], heads, -1, -1) for tensor in (q, k, v))
    leading = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (_as_batch(tensor, leading) for tensor in (q, k, v))
    output = attend(q, k, v, _mask_as_batch(attn_mask, leading), *options)
    has_heads = max(query.dim(), key.dim(), value.dim()) > 2
    return output.reshape(*leading, *output.shape[1:] if has_heads else output.shape[2:])


def _attend_top_left(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    options: dict[str, Any] = {"causal": causal, "alignment": "top_left", "scale": scale, "dropout_p": dropout_p}
    output = attention(query, key, value, mask=mask, **options)
    assert isinstance(output, torch.Tensor)
    return output


def _attend_by_pytorch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    """Compute a call that the operator does not support: by PyTorch, or by a formula where PyTorch is wrong."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    mask, bias = mask_and_bias(mask, None, (query.shape[0], heads, queries, keys), query)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if _pytorch_is_right(query, key, value, bias, scale):
        grouped, added = key.shape[1] != heads, mask if bias is None else bias
        return F.scaled_dot_product_attention(
            query, key, value, added, dropout_p, causal, scale=scale, enable_gqa=grouped
        )
    call = AttentionArguments(
        mask,
        bias,
        *(None,) * 12,
        max_seqlen_q=queries,
        max_seqlen_k=keys,
        scale=scale,
        left=UNBOUNDED,
        right=0 if causal else UNBOUNDED,
        chunk=0,
        bottom_right=False,
        softcap=0.0,
        score_mod=None,
        dropout_p=dropout_p,
        seed=draw_seed(query.device) if dropout_p else None,
    )
    return attention_formula(query, key, value, call)[0]


def _pytorch_is_right(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> bool:
    """Whether PyTorch's own attention gives the same result as ours.

    On a CPU it turns NaN into zeros, spreads masked NaN, gives NaN for negative scales, and has no forward mode.
    """
    if not query.is_cpu or torch.compiler.is_compiling():
        return True
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    added = [] if bias is None else [bias]
    return scale > 0.0 and has_finite_scores(query, key, scale) and all(map(is_finite, (value, *added)))


def _with_equal_heads(key: torch.Tensor, value: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat heads until key and value have equally many; each head serves neighbours among `heads` query heads."""
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[-3] == 0 or heads % tensor.shape[-3]:
            raise ValueError(f"query's heads must be a multiple of {name}'s; got {heads} and {tensor.shape[-3]}")
    if key.shape[-3] == value.shape[-3]:
        return key, value
    each = math.lcm(key.shape[-3], value.shape[-3])
    return key.repeat_interleave(each // key.shape[-3], -3), value.repeat_interleave(each // value.shape[-3], -3)


def _broadcast_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """The common number of heads, where a tensor with one head broadcasts to the others."""
    numbers = {tensor.shape[-3] for tensor in (query, key, value)} - {1}
    if len(numbers) > 1:
        raise ValueError(
            f"query has {query.shape[-3]} heads, key {key.shape[-3]} and value {value.shape[-3]}; equal numbers are "
            "needed, or 1, unless enable_gqa=True"
        )
    return next(iter(numbers), 1)


def _as_batch(tensor: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """View (..., heads, sequence, head_dim) as 4-D, expanding the leading dimensions."""
    tensor = tensor.expand(*leading, *tensor.shape[-3:])
    return tensor.flatten(0, -4) if leading else tensor[None]


def _mask_as_batch(mask: torch.Tensor | None, leading: torch.Size) -> torch.Tensor | None:
    """Shape the mask, which broadcasts to (..., heads, queries, keys), as `attention` takes it."""
    if mask is None or (mask.dim() <= 4 and len(leading) <= 1):
        return mask
    mask = mask.reshape((1,) * (3 - mask.dim()) + mask.shape)
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(mask.shape[-3:])
    if not broadcasts(tuple(mask.shape[:-3]), tuple(leading)):
        raise ValueError(f"attn_mask's leading dimensions must broadcast to {tuple(leading)}; got {tuple(mask.shape)}")
    return mask.expand(*leading, *mask.shape[-3:]).flatten(0, -4)
