"""Modules on Fastformer's operators: drop-in replacements for torch.nn's, with its constructors and state_dicts.

Every other name is torch.nn's own. Use ``from fastformer import nn`` in model code in place of ``from torch import
nn``, and ``import fastformer.nn.functional as F`` in place of ``import torch.nn.functional as F``. Submodules that only
torch.nn has (`nn.init`, `nn.utils`) are attributes here; an import statement cannot name them.
"""

from typing import Any

import torch

from fastformer.nn import functional
from fastformer.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropy, LinearCrossEntropyLoss
from fastformer.nn.embedding import SinusoidalEmbedding, TransformerEmbedding
from fastformer.nn.feed_forward import FeedForward
from fastformer.nn.multihead_attention import MultiheadAttention
from fastformer.nn.normalization import LayerNorm, RMSNorm
from fastformer.nn.packing import DenseLayout, Packing
from fastformer.nn.rotary import RotaryEmbedding
from fastformer.nn.softmax import LogSoftmax, Softmax
from fastformer.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from fastformer.nn.transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer
from fastformer.ops.packing import packed_positions

__all__ = [
    "CrossEntropyLoss",
    "DenseLayout",
    "FeedForward",
    "LayerNorm",
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "Packing",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalEmbedding",
    "Softmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEmbedding",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "functional",
    "packed_positions",
]


def __getattr__(name: str) -> Any:
    """Return torch.nn's own object for a name that is not defined here: `nn.Module`, `nn.Linear`, `nn.init`."""
    try:
        return getattr(torch.nn, name)
    except AttributeError:
        raise AttributeError(f"neither 'fastformer.nn' nor 'torch.nn' has an attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
