"""Softmax as a module."""

from __future__ import annotations

import torch

from fastformer.ops.softmax import softmax


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
