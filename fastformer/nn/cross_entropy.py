"""Cross-entropy as modules: of logits, and of a linear projection that is part of the module."""

from __future__ import annotations

import torch
from torch import nn

from fastformer.nn.feed_forward import is_plain_linear
from fastformer.ops.cross_entropy import cross_entropy
from fastformer.ops.linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` of class indices on Fastformer's operator: same constructor, state_dict and forward.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in PyTorch.
        z_loss, softcap, inplace: as in `fastformer.cross_entropy`.
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.inplace = inplace

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of logits `input` (N, classes, ...) and classes `target` (N, ...)."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            inplace=self.inplace,
        )


class LinearCrossEntropyLoss(nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` of class indices, which never holds all logits: same parameters and state_dict.

    The projection is `linear`, an `nn.Linear`, so that its weight can be tied to an embedding's. Where it has been
    replaced by another module (LoRA, quantisation) that is called, and its logits are held at once.

    Args:
        in_features: size of the last dimension of the input.
        num_classes: number of classes.
        bias: whether the projection has one.
        device, dtype: of the parameters.
        reduction, ignore_index, label_smoothing: as in `fastformer.linear_cross_entropy`; `ignore_index` None is -100.
        weight: (num_classes,), how much each class counts; a buffer.
        z_loss, softcap, memory_budget: as in `fastformer.linear_cross_entropy`.
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.memory_budget = memory_budget

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of `input` (..., in_features) and classes `target` (...), in float32."""
        if not is_plain_linear(self.linear):
            loss = cross_entropy(
                self.linear(input).flatten(0, -2).float(),
                target.flatten(),
                self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
                softcap=self.softcap,
            )
            return loss.view(target.shape) if self.reduction == "none" else loss
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            self.linear.bias,
            self.ignore_index,
            self.reduction,
            class_weight=self.weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            memory_budget=self.memory_budget,
        )


# The operator's own name for it.
LinearCrossEntropy = LinearCrossEntropyLoss
