"""Modules for softmax and log-softmax."""

from __future__ import annotations

import torch

from fastformer.ops.softmax import log_softmax, softmax


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on Fastformer's operator: same forward; a row of ``-inf`` gives zeros, not NaN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the softmax of `input`, of any shape, along `dim`; PyTorch's rule chooses a dim not given."""
        return super().forward(input) if self.dim is None else softmax(input, self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax` on Fastformer's operator: same forward; a row of ``-inf`` gives ``-inf``, not NaN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the log-softmax of `input`, of any shape, along `dim`; PyTorch's rule chooses a dim not given."""
        return super().forward(input) if self.dim is None else log_softmax(input, self.dim)
