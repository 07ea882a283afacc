"""The operator that computes rows of the attention matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastformer.registry.attention import allowed_pairs
from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator


def _inputs(
    make: Make,
    batch: int = 1,
    heads: int = 2,
    tokens: int = 70,
    head_dim: int = 16,
    *,
    rows: Sequence[int] = (0, 5, 69),
) -> Call:
    """Query, key, and the log-sum-exp of each query's scores in causal attention."""
    query, key = (make.normal(batch, heads, tokens, head_dim) for _ in range(2))
    lse = _scores(query.to(make.wide), key.to(make.wide), causal=True).logsumexp(-1)
    return Call({"query": query, "key": key, "lse": lse}, {"causal": True, "rows": rows})


def _scores(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    allowed = allowed_pairs(query.shape[2], key.shape[2], None, causal, query.device)
    return scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))


def _plain(query: Tensor, key: Tensor, lse: Tensor, *, causal: bool, rows: Sequence[int]) -> Tensor:
    weights = torch.exp(_scores(query, key, causal) - lse[..., None])
    return weights[:, :, list(rows)].to(query.dtype)


ATTENTION_WEIGHTS = Operator(
    "attention_weights", _inputs, _plain, constants=frozenset({"query", "key", "lse", "bias", "alibi_slopes"})
)
