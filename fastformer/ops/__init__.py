"""Operators: one file for each, with the public function, its checks, registration, backward and PyTorch code."""

from fastformer_kernels.attention.score_mod import ScoreMod

from fastformer.ops.attention.attention import attention
from fastformer.ops.attention.block_mask import BlockMask
from fastformer.ops.attention.cache import append_to_cache
from fastformer.ops.attention.decode import decode_attention
from fastformer.ops.attention.merge import merge_attention
from fastformer.ops.attention.relative_position import alibi_slopes, relative_position_bias, t5_buckets
from fastformer.ops.attention.scaled_dot_product_attention import scaled_dot_product_attention
from fastformer.ops.attention.weights import attention_weights
from fastformer.ops.cross_entropy import cross_entropy
from fastformer.ops.embedding import transformer_embedding
from fastformer.ops.feed_forward import feed_forward
from fastformer.ops.linear_cross_entropy import linear_cross_entropy
from fastformer.ops.normalization import layer_norm, rms_norm
from fastformer.ops.rotary import rotary, rotary_frequencies, rotary_table
from fastformer.ops.softmax import log_softmax, softmax

__all__ = [
    "BlockMask",
    "ScoreMod",
    "alibi_slopes",
    "append_to_cache",
    "attention",
    "attention_weights",
    "cross_entropy",
    "decode_attention",
    "feed_forward",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "merge_attention",
    "relative_position_bias",
    "rms_norm",
    "rotary",
    "rotary_frequencies",
    "rotary_table",
    "scaled_dot_product_attention",
    "softmax",
    "t5_buckets",
    "transformer_embedding",
]
