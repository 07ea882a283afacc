"""Fastformer: fused Triton kernels for the Transformer, as drop-in PyTorch modules.

>>> import torch, fastformer
>>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
>>> fastformer.attention(q, k, v, causal=True).shape
torch.Size([2, 8, 128, 64])
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastformer.integrations.attention.registration import register as _register_with_transformers
from fastformer.version import __version__ as __version__

if TYPE_CHECKING:
    from fastformer.backends import backend
    from fastformer.debugging import debug
    from fastformer.integrations.acceleration import accelerate, restore
    from fastformer.ops import (
        BlockMask,
        ScoreMod,
        alibi_slopes,
        append_to_cache,
        attention,
        attention_weights,
        cross_entropy,
        decode_attention,
        feed_forward,
        layer_norm,
        linear_cross_entropy,
        log_softmax,
        merge_attention,
        relative_position_bias,
        rms_norm,
        rotary,
        rotary_frequencies,
        rotary_table,
        scaled_dot_product_attention,
        softmax,
        t5_buckets,
        transformer_embedding,
    )

__all__ = [
    "BlockMask",
    "ScoreMod",
    "accelerate",
    "alibi_slopes",
    "append_to_cache",
    "attention",
    "attention_weights",
    "backend",
    "cross_entropy",
    "debug",
    "decode_attention",
    "feed_forward",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "merge_attention",
    "relative_position_bias",
    "restore",
    "rms_norm",
    "rotary",
    "rotary_frequencies",
    "rotary_table",
    "scaled_dot_product_attention",
    "softmax",
    "t5_buckets",
    "transformer_embedding",
]


_HOMES = {
    "accelerate": "fastformer.integrations.acceleration",
    "backend": "fastformer.backends",
    "debug": "fastformer.debugging",
    "restore": "fastformer.integrations.acceleration",
}
"""The modules of the public names that are not operators."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `fastformer --help` does not import torch."""
    if name not in __all__:
        raise AttributeError(f"module 'fastformer' has no attribute {name!r}")
    module = importlib.import_module(_HOMES.get(name, "fastformer.ops"))
    return globals().setdefault(name, getattr(module, name))


_register_with_transformers()
