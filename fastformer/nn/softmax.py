"""Softmax and log-softmax as modules."""

from __future__ import annotations

import torch

from fastformer.ops.softmax import log_softmax, softmax


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on Fastformer's operator: same forward; a row of ``-inf`` gives zeros, not NaN.

    Unlike torch.nn's, `dim` must be given: the dimension PyTorch guesses without it is deprecated.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` of any shape; returns its softmax along `dim`."""
        assert self.dim is not None
        return softmax(input, self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax` on Fastformer's operator: same forward; a row of ``-inf`` gives ``-inf``, not NaN.

    Unlike torch.nn's, `dim` must be given: the dimension PyTorch guesses without it is deprecated.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` of any shape; returns its log-softmax along `dim`."""
        assert self.dim is not None
        return log_softmax(input, self.dim)
