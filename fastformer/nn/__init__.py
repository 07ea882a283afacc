"""Modules on Fastformer's operators: drop-in twins of torch.nn's, with its constructors, state_dicts and forwards."""

from fastformer.nn.attention import MultiheadAttention
from fastformer.nn.embedding import TransformerEmbedding
from fastformer.nn.feed_forward import FeedForward
from fastformer.nn.normalization import LayerNorm, RMSNorm
from fastformer.nn.packing import DenseLayout, Packing
from fastformer.nn.rotary import RotaryEmbedding
from fastformer.nn.softmax import LogSoftmax, Softmax
from fastformer.nn.transformer import TransformerEncoder, TransformerEncoderLayer
from fastformer.ops.packing import packed_positions

__all__ = [
    "DenseLayout",
    "FeedForward",
    "LayerNorm",
    "LogSoftmax",
    "MultiheadAttention",
    "Packing",
    "RMSNorm",
    "RotaryEmbedding",
    "Softmax",
    "TransformerEmbedding",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "packed_positions",
]
