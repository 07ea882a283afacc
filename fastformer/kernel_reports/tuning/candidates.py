"""The launch configurations of an operation that are measured and compared with the shipped one."""

from __future__ import annotations

from typing import Any

from fastformer_kernels.attention.candidates import (
    backward_candidates,
    decode_candidates,
    deterministic_candidates,
    forward_candidates,
    query_gradient_candidates,
)
from fastformer_kernels.attention.plan import AttentionPlan
from fastformer_kernels.launch import Architecture
from fastformer_kernels.matmul import product_candidates
from fastformer_kernels.plans import FeedForwardPlan
from fastformer_kernels.rows import row_candidates

_ATTENTION = {
    "attention_forward": forward_candidates,
    "attention_backward": backward_candidates,
    "attention_deterministic": deterministic_candidates,
    "attention_query_gradient": query_gradient_candidates,
}
_ROWS = (
    "norm_forward",
    "norm_backward",
    "softmax_forward",
    "softmax_backward",
    "cross_entropy_forward",
    "cross_entropy_backward",
)


def candidates(operation: str, default: Any, architecture: Architecture, head_dim: int, element_size: int) -> list[Any]:
    """Return the configurations of `operation` other than `default`.

    Args:
        operation: the operation, such as "attention_forward".
        default: the shipped configuration.
        architecture: the GPU's architecture.
        head_dim: the size of attention's heads; other operations ignore it.
        element_size: bytes of an element of the tensors.
    """
    if operation in _ATTENTION:
        return _ATTENTION[operation](default, architecture, head_dim, element_size)
    if operation == "decode":
        return decode_candidates(default)
    if operation in _ROWS:
        return row_candidates(default)
    if isinstance(default, AttentionPlan):
        return [AttentionPlan(fastformer=False), AttentionPlan(fastformer=False, cudnn=True)]
    if isinstance(default, FeedForwardPlan):
        return [FeedForwardPlan(not default.fused)]
    return product_candidates(default, element_size, architecture.shared_memory)
