"""Random tensors for the peers of a comparison: each peer gets the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastformer import registry


@dataclass(frozen=True)
class Make(registry.Make):
    """Makes tensors that are the same whenever they are made in the same order. On the device meta they have no data.

    Tensors are drawn on their device in their dtype, so that large ones need no other memory.

    Attributes:
        random: the source of random numbers; None on meta.
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
    """A new `Make`, which always starts with the same random numbers."""
    random = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    return Make(dtype, device, random)
