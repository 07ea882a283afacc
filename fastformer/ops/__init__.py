"""Operators: one file each, with the public function, its checks, registration, backward and PyTorch implementation."""

from fastformer.ops.attention import attention, scaled_dot_product_attention
from fastformer.ops.cross_entropy import cross_entropy
from fastformer.ops.feed_forward import feed_forward
from fastformer.ops.linear_cross_entropy import linear_cross_entropy
from fastformer.ops.normalization import layer_norm, rms_norm
from fastformer.ops.softmax import softmax

__all__ = [
    "attention",
    "cross_entropy",
    "feed_forward",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]
