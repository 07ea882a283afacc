"""A module for rotary position embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastformer.ops.rotary import rotary, rotary_frequencies, rotary_table


class RotaryEmbedding(torch.nn.Module):
    """Rotary position embedding of queries and keys (Su et al. 2021), with its table of cosines and sines.

    Args:
        rotary_dim: the number of rotated features, even and at most head_dim; the others are unchanged.
        max_positions: the number of rows of the table.
        base: theta in the paper.
        scaling: positions are divided by it (position interpolation, Chen et al. 2023).
        interleaved: pairs are neighbouring features, as in the paper; otherwise one from each half, as in Llama.
        frequencies: (rotary_dim / 2,), for any other scaling; used instead of those from `base` and `scaling`.
        magnitude: a factor for cosine and sine (YaRN's attention scaling).
        device: the device of the table.

    The table, `cos` and `sin`, stays float32 if the module is converted. It is not part of the state_dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        rotary_dim: int,
        max_positions: int,
        base: float = 10000.0,
        scaling: float = 1.0,
        interleaved: bool = False,
        frequencies: Tensor | None = None,
        magnitude: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if frequencies is None:
            frequencies = rotary_frequencies(rotary_dim, base, scaling)
        elif tuple(frequencies.shape) != (rotary_dim // 2,):
            raise ValueError(f"frequencies must have shape ({rotary_dim // 2},); got {tuple(frequencies.shape)}")
        self.rotary_dim = rotary_dim
        self.max_positions = max_positions
        self.interleaved = interleaved
        self.frequencies = tuple(frequencies.tolist())
        self.magnitude = magnitude
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._fill_table(device)

    def reset_parameters(self) -> None:
        """Fill the table again, after new memory has been allocated for it."""
        self._fill_table(self.cos.device)

    def _fill_table(self, device: torch.device | str | None) -> None:
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device="cpu")
        self.cos, self.sin = rotary_table(frequencies, self.max_positions, self.magnitude, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the table to another device; another dtype is ignored, since the angles would lose precision."""
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        position_ids: Tensor | None = None,
        offsets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Rotate `query` and `key`; arguments and result are as in `fastformer.rotary`.

        They are (batch, heads, sequence, head_dim), or (total_tokens, heads, head_dim) with `cu_seqlens`.
        """
        return rotary(
            query,
            key,
            self.cos,
            self.sin,
            position_ids=position_ids,
            offsets=offsets,
            cu_seqlens=cu_seqlens,
            interleaved=self.interleaved,
            inplace=inplace,
        )

    def extra_repr(self) -> str:
        return f"rotary_dim={self.rotary_dim}, max_positions={self.max_positions}, interleaved={self.interleaved}"
