"""The operator that merges the results of attention to parts of the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator


def _inputs(
    make: Make,
    parts: int = 4,
    rows: int = 32,
    head_dim: int = 32,
    *,
    masked: bool = False,
    scale: float = 1.0,
    output_scale: float = 1.0,
) -> Call:
    """Outputs (parts, rows, head_dim) and log-sum-exps (parts, rows). With `masked`, half of the parts have no key."""
    lses = make.normal(parts, rows, scale=scale, dtype=make.wide)
    if masked:
        without_key = torch.arange(parts, device="cpu")[:, None] % 2 == torch.arange(rows, device="cpu") % 2
        lses = lses.masked_fill(make.constant(without_key), float("-inf"))
    return Call({"outputs": make.normal(parts, rows, head_dim, scale=output_scale), "lses": lses}, {})


def _plain(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    lses = lses if lses.dtype == torch.float64 else lses.float()
    return (lses.softmax(0)[..., None] * outputs).sum(0).to(outputs.dtype), lses.logsumexp(0)


MERGE_ATTENTION = Operator(
    "merge_attention",
    _inputs,
    _plain,
    backward_kernel=False,  # its products are small: PyTorch makes them
)
