"""The attention layers of a block: projections around the operator, for any source of keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastformer.models.configuration import FastformerConfig
from fastformer.models.context import AttentionContext, AttentionPattern
from fastformer.nn import RMSNorm
from fastformer.nn.plain import is_plain_linear


class SelfAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values, in this order."""

    def __init__(self, config: FastformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.size_per_head
        self.heads = (config.num_attention_heads, config.kv_heads, config.kv_heads)
        features = config.num_attention_heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=config.attention_bias)
        self.output = nn.Linear(features, config.hidden_size, bias=config.attention_output_bias)
        self.query_norm = RMSNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden: torch.Tensor,
        context: AttentionContext,
        pattern: AttentionPattern,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map `hidden` (tokens, hidden_size) to the same shape, or only to the outputs of tokens `positions` (n,)."""
        query, key, value = self._projections(hidden, positions)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        attended = context.self_attention(self.layer, query, key, value, pattern, self.training)
        return self.output(attended.flatten(1))

    def _projections(self, hidden: torch.Tensor, positions: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return queries (if given, only at `positions`), keys and values, each (tokens, heads, head_dim)."""
        if positions is None or not is_plain_linear(self.qkv):
            query, key, value = self.qkv(hidden).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)
            return query if positions is None else query.index_select(0, positions), key, value
        features = [self.heads[0] * self.head_dim, 2 * self.heads[1] * self.head_dim]
        query_weight, source_weight = self.qkv.weight.split(features)
        query_bias, source_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.split(features)
        query = F.linear(hidden.index_select(0, positions), query_weight, query_bias)
        key, value = F.linear(hidden, source_weight, source_bias).unflatten(-1, (2, -1, self.head_dim)).unbind(1)
        return query.unflatten(-1, (-1, self.head_dim)), key, value


class CrossAttention(nn.Module):
    """Attention from a decoder's tokens to the encoder's output."""

    def __init__(self, config: FastformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.size_per_head
        features = config.num_attention_heads * self.head_dim
        self.query = nn.Linear(config.hidden_size, features, bias=config.attention_bias)
        self.key_value = nn.Linear(config.hidden_size, 2 * config.kv_heads * self.head_dim, bias=config.attention_bias)
        self.output = nn.Linear(features, config.hidden_size, bias=config.attention_output_bias)

    def forward(self, hidden: torch.Tensor, context: AttentionContext, pattern: AttentionPattern) -> torch.Tensor:
        """Map `hidden` (tokens, hidden_size) to the same shape."""
        query = self.query(hidden).unflatten(-1, (-1, self.head_dim))
        attended = context.cross_attention(self.layer, query, self._source, pattern, self.training)
        return self.output(attended.flatten(1))

    def _source(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project the encoder's output (tokens, hidden_size) to keys and values, each (tokens, kv_heads, head_dim)."""
        key, value = self.key_value(encoded).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        return key, value
