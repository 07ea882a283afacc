"""The Transformer's block on packed tokens: attention and feed-forward network, each with residual and norm."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastformer.models.configuration import HIDDEN_ACTS, FastformerConfig
from fastformer.nn import FeedForward, LayerNorm, Packing
from fastformer.ops.attention import attention


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values, in this order."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
        """`hidden` (total_tokens, hidden_size); returns the same shape."""
        query, key, value = self.qkv(hidden).view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        attended = attention(
            query,
            key,
            value,
            cu_seqlens_q=packing.cu_seqlens,
            max_seqlen_q=packing.max_seqlen,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        assert isinstance(attended, torch.Tensor)
        return self.output(attended.flatten(1))


class Block(GradientCheckpointingLayer):
    """One layer of the encoder, normalised after each residual (Vaswani et al. 2017, BERT)."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, HIDDEN_ACTS[config.hidden_act])
        self.feed_forward_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
        """`hidden` (total_tokens, hidden_size); returns the same shape."""
        hidden, _ = self.attention_norm(self.dropout(self.attention(hidden, packing)), residual=hidden)
        hidden, _ = self.feed_forward_norm(self.dropout(self.feed_forward(hidden)), residual=hidden)
        return hidden
