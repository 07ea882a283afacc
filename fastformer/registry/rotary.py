"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator


def _inputs(
    make: Make,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    tokens: int = 8,
    head_dim: int = 32,
    *,
    rotary_dim: int | None = None,
    first_position: int = 0,
    interleaved: bool = False,
    scale: float = 1.0,
) -> Call:
    """Query and key of positions from `first_position` on, and tables that are long enough for them."""
    tensors = {
        "query": make.heads(batch, heads, tokens, head_dim, scale=scale),
        "key": make.heads(batch, kv_heads, tokens, head_dim, scale=scale),
    }
    tensors["cos"], tensors["sin"] = make.rotary_table(first_position + tokens, rotary_dim or head_dim)
    if first_position:
        tensors["position_ids"] = make.constant(
            torch.arange(first_position, first_position + tokens, device="cpu")[None]
        )
    return Call(tensors, {"interleaved": interleaved})


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first pairs of features of `x` (..., head_dim) by the angles of `cos` and `sin` (..., pairs)."""
    pairs = cos.shape[-1]
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    axis = -1 if interleaved else -2
    a, b = turning.unflatten(-1, (pairs, 2) if interleaved else (2, pairs)).unbind(axis)
    both = torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2)
    return torch.cat([both.to(x.dtype), rest], -1)


def _plain(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if position_ids is not None:
        cos, sin = (table[position_ids][:, None] for table in (cos, sin))
    return turned(query, cos, sin, interleaved), None if key is None else turned(key, cos, sin, interleaved)


ROTARY = Operator("rotary", _inputs, _plain, constants=frozenset({"cos", "sin"}), compared=2)
