"""LayerNorm and RMSNorm of an input, or of the sum of an input and a residual."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator


def _inputs(
    make: Make,
    rows: int = 33,
    columns: int = 70,
    *,
    bias: bool = False,
    residual: bool = False,
    dropout_p: float = 0.0,
    parameters: torch.dtype | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Call:
    """Rows and a weight, with a bias or a residual if asked for. `parameters` is the dtype of weight and bias."""
    tensors = {"input": make.normal(rows, columns, scale=scale, shift=shift)}
    tensors["weight"] = make.normal(columns, dtype=parameters)
    if bias:
        tensors["bias"] = make.normal(columns, dtype=parameters)
    if residual:
        tensors["residual"] = make.normal(rows, columns)
    options: dict[str, Any] = {"normalized_shape": (columns,), "eps": 1e-5}
    return Call(tensors, options | ({"dropout_p": dropout_p} if dropout_p else {}))


def _plain(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    return_sum: bool = True,
    centered: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the norm; with a residual, return also the sum. Dropout draws other random numbers than our function."""
    total = input if dropout_p == 0.0 else F.dropout(input, dropout_p)
    total = total if residual is None else total + residual
    if centered:
        output = F.layer_norm(total, normalized_shape, weight, bias, eps)
    else:
        output = F.rms_norm(total, list(normalized_shape), weight, eps)
    return (output, total) if residual is not None and return_sum else output


LAYER_NORM = Operator("layer_norm", _inputs, _plain)
RMS_NORM = Operator("rms_norm", _inputs, partial(_plain, centered=False))
