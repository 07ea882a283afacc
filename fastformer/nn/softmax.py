"""Softmax and log-softmax as modules."""

from __future__ import annotations

import torch

from fastformer.ops.softmax import log_softmax, softmax


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on Fastformer's operator: same forward; a row of ``-inf`` gives zeros, not NaN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` of any shape; returns its softmax along `dim`; PyTorch guesses one that was not given."""
        return super().forward(input) if self.dim is None else softmax(input, self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax` on Fastformer's operator: same forward; a row of ``-inf`` gives ``-inf``, not NaN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` of any shape; returns its log-softmax along `dim`; PyTorch guesses one that was not given."""
        return super().forward(input) if self.dim is None else log_softmax(input, self.dim)
