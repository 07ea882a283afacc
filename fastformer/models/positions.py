"""Position information inside attention: rotary tables, ALiBi's slopes, T5's relative biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastformer.models.configuration import FastformerConfig
from fastformer.nn import RotaryEmbedding
from fastformer.ops.attention.relative_position import alibi_slopes, relative_position_bias, t5_buckets
from fastformer.ops.rotary import rotary_frequencies

# Types whose frequencies depend on the length of the current sequence; a table cannot hold them.
_VARYING_ROPE_TYPES = ("dynamic", "longrope")


def rotary_embedding(config: FastformerConfig) -> RotaryEmbedding:
    """Make the rotary table that ``config.rope_parameters`` describes.

    Raises:
        ValueError: the type is unknown, or its frequencies change with the sequence.
    """
    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    rotary_dim = int(config.size_per_head * parameters.get("partial_rotary_factor", 1.0))
    if kind == "default":
        frequencies, magnitude = rotary_frequencies(rotary_dim, parameters.get("rope_theta", 10000.0)), 1.0
    elif kind in _VARYING_ROPE_TYPES or kind not in ROPE_INIT_FUNCTIONS:
        known = sorted({"default", *ROPE_INIT_FUNCTIONS} - set(_VARYING_ROPE_TYPES))
        raise ValueError(f"rope_parameters' rope_type must be one of {', '.join(known)}; got {kind!r}")
    else:
        with torch.device("cpu"):
            frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return RotaryEmbedding(
        rotary_dim, config.max_position_embeddings, frequencies=frequencies, magnitude=float(magnitude)
    )


class AlibiSlopes(nn.Module):
    """ALiBi's slope of each head, (heads,) float32; not part of the state_dict."""

    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.empty(heads, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the slopes again, after new memory has been allocated for them."""
        self.slopes.copy_(alibi_slopes(self.slopes.shape[0]))

    def forward(self) -> Tensor:
        return self.slopes.float()


class RelativeBias(nn.Module):
    """T5's bias by relative position, one table for all blocks of a stack (Raffel et al. 2020)."""

    def __init__(self, config: FastformerConfig, bidirectional: bool) -> None:
        super().__init__()
        self.max_distance = config.relative_attention_max_distance
        self.buckets = t5_buckets(config.relative_attention_num_buckets, self.max_distance, bidirectional)
        self.table = nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)

    def forward(self) -> Tensor:
        """Return the bias (heads, 2 * max_distance + 1), as `fastformer.attention` takes it."""
        return relative_position_bias(self.table.weight, self.buckets, self.max_distance)
