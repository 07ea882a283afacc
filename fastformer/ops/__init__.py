"""Operators: one file each, with the public function, its checks, registration, backward and PyTorch implementation."""

from fastformer.ops.attention import attention, scaled_dot_product_attention
from fastformer.ops.embedding import transformer_embedding
from fastformer.ops.feed_forward import feed_forward
from fastformer.ops.linear_cross_entropy import linear_cross_entropy
from fastformer.ops.normalization import layer_norm, rms_norm
from fastformer.ops.rotary import rotary, rotary_frequencies, rotary_table
from fastformer.ops.softmax import log_softmax, softmax

__all__ = [
    "attention",
    "feed_forward",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "rotary",
    "rotary_frequencies",
    "rotary_table",
    "scaled_dot_product_attention",
    "softmax",
    "transformer_embedding",
]
