"""Cross-entropy of logits, and of features with a weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator


def _inputs(
    make: Make,
    rows: int = 32,
    classes: int = 500,
    *,
    ignored: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    scale: float = 1.0,
    shift: float = 0.0,
) -> Call:
    """Logits (rows, classes), and a target for each row. With `ignored`, the target of every other row is ignored."""
    logits = make.normal(rows, classes, scale=scale, shift=shift)
    target = make.integers(classes, rows)
    if ignored:
        target[::2] = -100
    options: dict[str, Any] = {} if reduction == "mean" else {"reduction": reduction}
    return Call({"input": logits, "target": target}, options | _smoothing(label_smoothing))


def _smoothing(label_smoothing: float) -> dict[str, Any]:
    return {"label_smoothing": label_smoothing} if label_smoothing else {}


def _plain(input: Tensor, target: Tensor, *, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    loss = F.cross_entropy(_wide(input), target, reduction=reduction, label_smoothing=label_smoothing)
    return loss.to(input.dtype)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _linear_inputs(make: Make, rows: int = 40, classes: int = 50, features: int = 24, *, scale: float = 1.0) -> Call:
    """The features of each row, a weight that keeps their variance, and the targets."""
    tensors = {
        "input": make.normal(rows, features, scale=scale),
        "weight": make.normal(classes, features, scale=features**-0.5),
    }
    return Call(tensors | {"target": make.integers(classes, rows)}, {})


def _linear_plain(input: Tensor, weight: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(_wide(input @ weight.T), target, reduction=reduction)


CROSS_ENTROPY = Operator("cross_entropy", _inputs, _plain, constants=frozenset({"weight"}))
LINEAR_CROSS_ENTROPY = Operator(
    "linear_cross_entropy",
    _linear_inputs,
    _linear_plain,
    backward_kernel=False,  # the forward makes the gradients
)
