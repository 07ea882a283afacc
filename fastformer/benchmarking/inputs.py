"""Random tensors for those who are compared: the same ones for each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastformer import registry


@dataclass(frozen=True)
class Make(registry.Make):
    """Makes tensors, the same ones each time it makes them in the same order; on the device meta nothing but shapes.

    They are drawn on their device in their dtype: large ones take no more than themselves.

    Attributes:
        random: where numbers come from; None on meta.
    """

    random: torch.Generator | None

    def normal(
        self,
        *shape: int,
        grad: bool = True,
        scale: float = 1.0,
        shift: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        drawn = torch.randn(shape, generator=self.random, device=self.device, dtype=dtype or self.dtype)
        return drawn.mul_(scale).add_(shift).requires_grad_(grad)

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(below, shape, generator=self.random, device=self.device, dtype=dtype)


def maker(dtype: torch.dtype, device: torch.device) -> Make:
    """What makes tensors from the beginning of the same random numbers."""
    random = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    return Make(dtype, device, random)
