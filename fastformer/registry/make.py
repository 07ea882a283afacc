"""Makes the random tensors of a call, which those who use the registry may want otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastformer.ops.rotary import rotary_frequencies, rotary_table


@dataclass(frozen=True)
class Make:
    """Makes tensors from numbers that PyTorch's generator draws in float64 on the CPU: the same ones for every dtype.

    Attributes:
        dtype: of what is not said to have another.
        device: where the tensors are.
    """

    dtype: torch.dtype
    device: torch.device

    @property
    def wide(self) -> torch.dtype:
        """The dtype of statistics: float32, or float64 where that is the dtype."""
        return torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float64, device="cpu") * scale + shift
        return drawn.to(self.device, dtype or self.dtype)

    def heads(self, batch: int, heads: int, tokens: int, head_dim: int, scale: float = 1.0) -> Tensor:
        """(batch, heads, tokens, head_dim), as a projection leaves it: the heads of a token stand side by side."""
        return self.normal(batch, tokens, heads, head_dim, scale=scale).transpose(1, 2)

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """From 0 to below - 1."""
        return torch.randint(below, shape, dtype=dtype, device="cpu").to(self.device)

    def booleans(self, *shape: int) -> Tensor:
        """True with a probability of one half."""
        return self.integers(2, *shape).bool()

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def rotary_table(self, positions: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, float32."""
        return rotary_table(rotary_frequencies(rotary_dim), positions, device=self.device)
