"""The Transformer's block: self-attention, cross-attention in an encoder-decoder's decoder, feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastformer.models.attention import CrossAttention, SelfAttention
from fastformer.models.configuration import HIDDEN_ACTS, FastformerConfig
from fastformer.models.context import AttentionContext, AttentionPattern
from fastformer.nn import FeedForward, LayerNorm, RMSNorm

Sublayer = Callable[[torch.Tensor], torch.Tensor]
NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}


class Block(GradientCheckpointingLayer):
    """One layer, normalised after each residual (Vaswani et al. 2017) or before each sublayer (Xiong et al. 2020)."""

    def __init__(self, config: FastformerConfig, layer: int, cross_attention: bool = False) -> None:
        super().__init__()
        norm = partial(NORMS[config.norm], config.hidden_size, eps=config.layer_norm_eps)
        self.pre_norm = config.norm_placement == "pre"
        self.dropout_p = config.hidden_dropout_prob
        self.attention = SelfAttention(config, layer)
        self.attention_norm = norm()
        self.cross_attention = CrossAttention(config, layer) if cross_attention else None
        self.cross_attention_norm = norm() if cross_attention else None
        self.feed_forward = FeedForward(
            config.hidden_size,
            config.intermediate_size,
            HIDDEN_ACTS[config.hidden_act],
            gated=config.gated,
            bias=config.feed_forward_bias,
            hidden_dropout=config.activation_dropout,
            # In a post-norm block, dropout and the residual are fused into the next norm.
            dropout=config.hidden_dropout_prob if self.pre_norm else 0.0,
        )
        self.feed_forward_norm = norm()

    def forward(
        self,
        hidden: torch.Tensor,
        context: AttentionContext,
        pattern: AttentionPattern,
        cross_pattern: AttentionPattern | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map `hidden` (tokens, hidden_size) to the same shape, or only to the outputs of tokens `positions` (n,)."""
        sublayers: list[Sublayer] = [
            partial(self.attention, context=context, pattern=pattern, positions=positions),
        ]
        norms: list[nn.Module] = [self.attention_norm]
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            sublayers.append(partial(self.cross_attention, context=context, pattern=cross_pattern))
            norms.append(self.cross_attention_norm)
        norms.append(self.feed_forward_norm)
        dropout_p = self.dropout_p if self.training else 0.0
        if self.pre_norm:
            normed = norms[0](hidden)
            hidden = _chosen(hidden, positions)
            for sublayer, norm in zip(sublayers, norms[1:], strict=True):
                normed, hidden = norm(sublayer(normed), residual=hidden, dropout_p=dropout_p)
            return self.feed_forward(normed, residual=hidden)
        sublayers.append(self.feed_forward)
        residual = _chosen(hidden, positions)
        for sublayer, norm in zip(sublayers, norms, strict=True):
            hidden = residual = norm(sublayer(hidden), residual=residual, dropout_p=dropout_p, return_sum=False)
        return hidden


def _chosen(hidden: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    return hidden if positions is None else hidden.index_select(0, positions)
