"""The judge: naive float64 implementations, no cleverness. Everything is compared with these."""

from __future__ import annotations

import torch


def softmax(input: torch.Tensor, dim: int) -> torch.Tensor:
    x = input.double()
    finite_maximum = x.amax(dim, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
    numerator = torch.exp(x - finite_maximum)
    total = numerator.sum(dim, keepdim=True)
    return torch.where(total == 0, 0.0, numerator / total)
