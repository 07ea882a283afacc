"""The operators `attention` and `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ScoreMod
from fastformer.ops.attention.block_mask import BlockMask
from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator
from fastformer.registry.score_mod import DECAY


def _inputs(
    make: Make,
    batch: int = 1,
    heads: int = 2,
    queries: int = 70,
    keys: int = 70,
    head_dim: int = 16,
    *,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    features: Collection[str] = ("causal",),
    scale: float = 1.0,
    value_scale: float = 1.0,
) -> Call:
    """Query, key and value, and the arguments of `features`: keys of the result of `_features`, or "packed"."""
    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim
    packed = "packed" in features

    def tokens(heads: int, tokens: int, head_dim: int, scale: float) -> Tensor:
        if packed:
            return make.normal(batch * tokens, heads, head_dim, scale=scale)
        return make.heads(batch, heads, tokens, head_dim, scale=scale)

    tensors = {
        "query": tokens(heads, queries, head_dim, scale),
        "key": tokens(kv_heads, keys, head_dim, 1.0),
        "value": tokens(kv_heads, keys, value_dim, value_scale),
    }
    options: dict[str, Any] = {}
    if packed:
        boundaries = torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device="cpu")
        tensors["cu_seqlens_q"], options["max_seqlen_q"] = make.constant(boundaries), queries
    known = _features(make, batch, heads, queries, keys)
    for feature in features:
        if feature != "packed":
            name, value = known[feature]()
            (tensors if isinstance(value, Tensor) else options)[name] = value
    return Call(tensors, options)


def _features(make: Make, batch: int, heads: int, queries: int, keys: int) -> dict[str, Callable[[], tuple[str, Any]]]:
    """A function for each feature that returns the name and the value of its argument."""
    return {
        "causal": lambda: ("causal", True),
        "window": lambda: ("window", (256, 256)),
        "softcap": lambda: ("softcap", 50.0),
        "dropout": lambda: ("dropout_p", 0.1),
        "sinks": lambda: ("sinks", make.normal(heads, dtype=make.wide)),
        "alibi": lambda: ("alibi_slopes", make.normal(heads, dtype=make.wide)),
        "relative": lambda: ("relative_bias", make.normal(heads, 2 * keys - 1)),
        "score_mod": lambda: ("score_mod", DECAY),
        "bias": lambda: ("bias", make.normal(1, heads, queries, keys)),
        "mask": lambda: ("mask", make.booleans(batch, 1, queries, keys)),
        "block_mask": lambda: ("mask", make.block_mask(queries, keys)),
        "key_lengths": lambda: (
            "key_lengths",
            make.constant(torch.full((batch,), keys, dtype=torch.int32, device="cpu")),
        ),
    }


def allowed_pairs(
    queries: int, keys: int, mask: Tensor | BlockMask | None, causal: bool, device: torch.device
) -> Tensor | None:
    """A mask of the keys that each query may attend to; None if it may attend to all."""
    mask = mask.to_dense() if isinstance(mask, BlockMask) else mask
    if not causal:
        return mask
    earlier = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return earlier if mask is None else mask & earlier


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | BlockMask | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
) -> Tensor:
    """Compute attention by the formula. The output of a query that may attend to no key is zero."""
    group = query.shape[1] // key.shape[1]
    key, value = (each if group == 1 else each.repeat_interleave(group, 1) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if score_mod is not None:
        indices = (torch.arange(n, device=query.device) for n in scores.shape)
        assert score_mod.reference is not None
        scores = score_mod.reference(scores, *torch.meshgrid(*indices, indexing="ij")).to(scores.dtype)
    scores = scores if bias is None else scores + bias
    allowed = allowed_pairs(query.shape[2], key.shape[2], mask, causal, query.device)
    if allowed is None:
        return scores.softmax(-1) @ value
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0) @ value


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | None = None, *, causal: bool = False
) -> Tensor:
    allowed = allowed_pairs(query.shape[2], key.shape[2], mask, causal, query.device)
    return F.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=query.shape[1] != key.shape[1])


def _sdpa_inputs(make: Make, tokens: int = 70, *, is_causal: bool = True) -> Call:
    return Call(_inputs(make, queries=tokens, keys=tokens, features=()).tensors, {"is_causal": is_causal})


def _plain_sdpa(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    return plain_attention(query, key, value, causal=is_causal)


ATTENTION = Operator("attention", _inputs, plain_attention, fused_attention)
SCALED_DOT_PRODUCT_ATTENTION = Operator(
    "scaled_dot_product_attention", _sdpa_inputs, _plain_sdpa, F.scaled_dot_product_attention
)
