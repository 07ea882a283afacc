"""Fastformer: fused Triton kernels for the Transformer, as drop-in PyTorch modules.

>>> import torch, fastformer
>>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
>>> fastformer.attention(q, k, v, causal=True).shape
torch.Size([2, 8, 128, 64])
"""

from fastformer.backend import backend
from fastformer.ops import (
    attention,
    feed_forward,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    scaled_dot_product_attention,
    softmax,
)

__version__ = "0.1.0"

__all__ = [
    "attention",
    "backend",
    "feed_forward",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]
