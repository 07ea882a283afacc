"""Pooling of each packed sequence into one vector."""

from __future__ import annotations

import torch
from torch import nn

from fastformer.models.configuration import FastformerConfig
from fastformer.nn import Packing
from fastformer.ops.packing import packed_sequences

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def pooled_tokens(packing: Packing, pooling: str) -> torch.Tensor | None:
    """The positions of the tokens that `pool` uses, (batch,) int64; None for all. Arbitrary for an empty sequence."""
    if pooling == "mean":
        return None
    starts, ends = packing.cu_seqlens[:-1], packing.cu_seqlens[1:]
    chosen = starts if pooling == "first" else ends - 1
    return torch.minimum(chosen, packing.cu_seqlens[-1] - 1).clamp(min=0).long()


def pool(hidden: torch.Tensor, packing: Packing, pooling: str) -> torch.Tensor:
    """Pool `hidden` (total_tokens, hidden_size) to (batch, hidden_size): the first token, the last, or the mean.

    An empty sequence gives zeros.
    """
    starts, ends = packing.cu_seqlens[:-1], packing.cu_seqlens[1:]
    chosen = pooled_tokens(packing, pooling)
    if chosen is None:
        sequence = packed_sequences(packing.cu_seqlens, len(hidden))
        total = hidden.new_zeros(len(starts), hidden.shape[1], dtype=torch.float32)
        total = total.index_add(0, sequence, hidden.float())
        return (total / (ends - starts).clamp(min=1).unsqueeze(1)).to(hidden.dtype)
    rows = hidden.index_select(0, chosen)
    return rows.masked_fill((starts == ends).unsqueeze(1), 0.0)


class Pooler(nn.Module):
    """The pooled token of a sequence, through a dense layer and an activation unless `pooler_act` is "none"."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.activation = _ACTIVATIONS.get(config.pooler_act)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if self.activation else None

    def forward(self, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Map `hidden` (total_tokens, hidden_size) to (batch, hidden_size)."""
        pooled = pool(hidden, packing, self.pooling)
        return pooled if self.dense is None or self.activation is None else self.activation(self.dense(pooled))
