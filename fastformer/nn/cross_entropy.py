"""Modules for cross-entropy: of logits, and of a linear projection that is part of the module."""

from __future__ import annotations

import torch
from torch import nn

from fastformer.nn.plain import is_plain_linear
from fastformer.nn.torch_linear_cross_entropy import TorchLinearCrossEntropyLoss
from fastformer.ops.cross_entropy import cross_entropy
from fastformer.ops.linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on Fastformer's operator: same constructor, state_dict and forward.

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
        """Return the loss of logits `input` (N, classes, ...) and classes `target` (N, ...)."""
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


class LinearCrossEntropyLoss(TorchLinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss` that never holds all logits: same constructor, state_dict and forward.

    The projection is `linear`, an `nn.Linear`, so that its weight can be tied to an embedding's. If another module
    replaces it (LoRA, quantisation), that module is called and its logits are held at once. PyTorch's own operator
    handles class probabilities, `out_features` and `options`; a PyTorch without it refuses them with an error.

    Args:
        in_features: size of the last dimension of the input.
        num_classes: number of classes.
        out_features, options, bias, device, dtype, reduction, weight, ignore_index, label_smoothing: as in PyTorch.
        z_loss, softcap, memory_budget: as in `fastformer.linear_cross_entropy`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: nn.LinearCrossEntropyOptions | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        self.z_loss = z_loss
        self.softcap = softcap
        self.memory_budget = memory_budget

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the float32 loss of `input` (..., in_features) and classes `target` (...)."""
        if self.out_features or self.options is not None or target.is_floating_point():
            if self.z_loss or self.softcap is not None or self.memory_budget is not None:
                raise ValueError(
                    "z_loss, softcap and memory_budget need a target of classes, no out_features and no options"
                )
            return super().forward(input, target)
        ignore_index = -100 if self.ignore_index is None else self.ignore_index
        if not is_plain_linear(self.linear):
            loss = cross_entropy(
                self.linear(input).flatten(0, -2).float(),
                target.flatten(),
                self.weight,
                ignore_index=ignore_index,
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
            ignore_index,
            self.reduction,
            class_weight=self.weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            memory_budget=self.memory_budget,
        )


# The name that matches the operator's.
LinearCrossEntropy = LinearCrossEntropyLoss
