"""The choice between our attention and PyTorch's for calls that both can compute: as `fastformer tune` measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastformer_kernels.attention.launch import HEAD_DIM_CLASSES, LENGTH_CLASSES
from fastformer_kernels.configurations import chosen, size_class

OPERATION = "attention_plan"


@dataclass(frozen=True)
class AttentionPlan:
    """Whose attention runs: ours if `fastformer`, else PyTorch's scaled_dot_product_attention.

    Attributes:
        fastformer: whether ours runs.
        cudnn: whether PyTorch's runs by cuDNN where it can, instead of by the backend that PyTorch would choose.
    """

    fastformer: bool
    cudnn: bool = False


SHIPPED = AttentionPlan(fastformer=True)


def attention_plan(query: torch.Tensor, key: torch.Tensor, *, causal: bool, trained: bool) -> AttentionPlan:
    """The attention that was measured to be the fastest for such calls; ours where nothing was measured.

    torch.compile takes it as a constant.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim).
        causal: whether a query sees only the keys up to its own position; else it sees all.
        trained: whether there will be a backward.
    """
    words = (
        f"{8 * query.dtype.itemsize}-bit",
        f"head_dim{size_class(query.shape[-1], HEAD_DIM_CLASSES)}",
        "causal" if causal else "full",
        "trained" if trained else "inferred",
        "grouped" if query.shape[1] != key.shape[1] else "ungrouped",
        f"keys{size_class(key.shape[2], LENGTH_CLASSES)}",
    )
    return _measured(query.device, words)


@torch.compiler.assume_constant_result
def _measured(device: torch.device, words: tuple[str, ...]) -> AttentionPlan:
    return chosen(OPERATION, torch.empty(0, device=device), SHIPPED, lambda: words)
