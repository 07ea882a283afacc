"""`torch.nn.LinearCrossEntropyLoss`, or a base class that replaces it in older versions of PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

# The options came with the constructor whose arguments our class repeats.
if TYPE_CHECKING or hasattr(nn, "LinearCrossEntropyOptions"):
    from torch.nn import LinearCrossEntropyLoss as TorchLinearCrossEntropyLoss
else:

    class TorchLinearCrossEntropyLoss(nn.modules.loss._WeightedLoss):
        """The constructor and state_dict of PyTorch's class; uses that need its operator are refused with an error."""

        __constants__ = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing")

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
            options: None = None,
        ) -> None:
            if out_features or options is not None:
                raise _missing("out_features" if out_features else "options")
            if weight is not None and weight.shape != (num_classes,):
                raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
            if not 0.0 <= label_smoothing <= 1.0:
                raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
            super().__init__(weight=weight, reduction=reduction)
            self.num_classes = num_classes
            self.out_features = out_features
            self.ignore_index = ignore_index
            self.label_smoothing = label_smoothing
            self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
            self.options = options

        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            raise _missing("a target of class probabilities")

        def extra_repr(self) -> str:
            return (
                f"in_features={self.linear.in_features}, num_classes={self.num_classes},"
                f" bias={self.linear.bias is not None}, reduction={self.reduction},"
                f" ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
            )

    def _missing(what: str) -> NotImplementedError:
        return NotImplementedError(
            f"{what} needs torch.nn.LinearCrossEntropyLoss, which PyTorch {torch.__version__} does not have"
        )
