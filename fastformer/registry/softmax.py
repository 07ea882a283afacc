"""Softmax and its logarithm."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator


def _inputs(
    make: Make,
    rows: int = 33,
    columns: int = 70,
    *,
    masked: bool = False,
    causal: bool = False,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Call:
    """Scores (rows, columns). With `masked`, also a mask that all rows share."""
    tensors = {"input": make.normal(rows, columns, scale=scale, shift=shift)}
    if masked:
        tensors["mask"] = make.booleans(1, columns)
    return Call(tensors, {"causal": True} if causal else {})


def _plain(
    input: Tensor,
    mask: Tensor | None = None,
    *,
    dim: int = -1,
    scale: float = 1.0,
    causal: bool = False,
    log: bool = False,
) -> Tensor:
    """Compute softmax or its logarithm by the formula. All weights of a row without allowed columns are zero."""
    function = torch.log_softmax if log else torch.softmax
    if mask is None and not causal:
        return function(input if scale == 1.0 else input * scale, dim)
    allowed = torch.ones_like(input, dtype=torch.bool)
    allowed = allowed.tril(input.shape[-1] - input.shape[-2]) if causal else allowed
    allowed = allowed if mask is None else allowed & mask
    scores = (input * scale).masked_fill(~allowed, float("-inf"))
    return function(scores, dim).nan_to_num(float("-inf") if log else 0.0, neginf=float("-inf"))


SOFTMAX = Operator("softmax", _inputs, _plain)
LOG_SOFTMAX = Operator("log_softmax", _inputs, partial(_plain, log=True))
