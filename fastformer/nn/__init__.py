"""Modules on Fastformer's operators: drop-in twins of torch.nn's, with its constructors, state_dicts and forwards."""

from fastformer.nn.attention import MultiheadAttention
from fastformer.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropy, LinearCrossEntropyLoss
from fastformer.nn.feed_forward import FeedForward
from fastformer.nn.normalization import LayerNorm, RMSNorm
from fastformer.nn.packing import DenseLayout, Packing, packed_positions
from fastformer.nn.softmax import Softmax
from fastformer.nn.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "CrossEntropyLoss",
    "DenseLayout",
    "FeedForward",
    "LayerNorm",
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "Packing",
    "RMSNorm",
    "Softmax",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "packed_positions",
]
