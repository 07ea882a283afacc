"""Make the random tensors of a call. A user of the registry may replace how they are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastformer.ops.attention.block_mask import BlockMask
from fastformer.ops.rotary import rotary_frequencies, rotary_table


@dataclass(frozen=True)
class Make:
    """Makes random tensors. PyTorch's generator draws them in float64 on the CPU: they are the same in every dtype.

    Attributes:
        dtype: the dtype of tensors without a fixed dtype.
        device: the device of all tensors.
    """

    dtype: torch.dtype
    device: torch.device

    @property
    def wide(self) -> torch.dtype:
        """The dtype of statistics: float64 if `dtype` is float64, else float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float64, device="cpu") * scale + shift
        return drawn.to(self.device, dtype or self.dtype)

    def heads(self, batch: int, heads: int, tokens: int, head_dim: int, scale: float = 1.0) -> Tensor:
        """A tensor (batch, heads, tokens, head_dim) in the layout of a projection's result, tokens before heads."""
        return self.normal(batch, tokens, heads, head_dim, scale=scale).transpose(1, 2)

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Random integers from 0 to `below` - 1."""
        return torch.randint(below, shape, dtype=dtype, device="cpu").to(self.device)

    def booleans(self, *shape: int) -> Tensor:
        """Random booleans, true with a probability of one half."""
        return self.integers(2, *shape).bool()

    def block_mask(self, queries: int, keys: int) -> BlockMask:
        """Causal attention within documents of 100 tokens."""

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q // 100 == k // 100) & (q >= k)

        return BlockMask.from_function(seen, None, None, queries, keys, device=self.device)

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def rotary_table(self, positions: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, in float32."""
        return rotary_table(rotary_frequencies(rotary_dim), positions, device=self.device)
