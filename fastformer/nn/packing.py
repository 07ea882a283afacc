"""Packed sequences: tokens one after the other without padding, and conversion from and to a padded batch."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Packing(NamedTuple):
    """The boundaries of the sequences in packed tokens (total_tokens, ...).

    Attributes:
        cu_seqlens: (batch + 1,) int32, the first token of each sequence and the total at the end.
        max_seqlen: at least the length of the longest; an int on the host, so that no code waits for a GPU.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int


class DenseLayout(NamedTuple):
    """The places of the real tokens of a padded batch.

    Attributes:
        batch, sequence: the padded shape.
        indices: (total_tokens,) int64 into the flattened batch, ascending; None if there is no padding.
    """

    batch: int
    sequence: int
    indices: torch.Tensor | None

    @classmethod
    def from_mask(
        cls, batch: int, sequence: int, attention_mask: torch.Tensor | None, device: torch.device
    ) -> tuple[DenseLayout, Packing]:
        """Make the layout of a batch padded on any side, or with gaps.

        Args:
            batch, sequence: the padded shape.
            attention_mask: (batch, sequence), non-zero (or True) for a real token; None if all are. Finding the real
                tokens needs their number on the host: this is the only synchronisation with a GPU.
            device: the device of the tokens.
        """
        if attention_mask is None:
            starts = torch.arange(0, (batch + 1) * sequence, sequence, dtype=torch.int32, device=device)
            return cls(batch, sequence, None), Packing(starts, sequence)
        if tuple(attention_mask.shape) != (batch, sequence):
            raise ValueError(
                f"attention_mask must have shape (batch, sequence) = {(batch, sequence)}; "
                f"got {tuple(attention_mask.shape)}"
            )
        real = attention_mask.to(torch.bool)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        torch.cumsum(real.sum(dim=1), dim=0, out=cu_seqlens[1:])
        return cls(batch, sequence, real.flatten().nonzero().squeeze(1)), Packing(cu_seqlens, sequence)

    def pack(self, dense: torch.Tensor) -> torch.Tensor:
        """Pack (batch, sequence, ...) into (total_tokens, ...)."""
        tokens = dense.flatten(0, 1)
        return tokens if self.indices is None else tokens.index_select(0, self.indices)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Unpack (total_tokens, ...) into (batch, sequence, ...), with zeros at padding."""
        if self.indices is not None:
            padded = packed.new_zeros(self.batch * self.sequence, *packed.shape[1:])
            packed = padded.index_copy(0, self.indices, packed)
        return packed.unflatten(0, (self.batch, self.sequence))

    def spread(self, packed: torch.Tensor, dim: int) -> torch.Tensor:
        """Move columns that count each sequence's real tokens to their padded places, with zeros at padding.

        `packed` is (batch, ...), and `dim` is the dimension of these columns.
        """
        if self.indices is None:
            return packed
        real = torch.zeros(self.batch * self.sequence, dtype=torch.bool, device=packed.device)
        real = real.index_fill(0, self.indices, True).view(self.batch, self.sequence)
        shape = [self.batch if axis == 0 else self.sequence if axis == dim else 1 for axis in range(packed.dim())]
        rank = (real.cumsum(1) - 1).clamp(min=0).view(shape)
        rank = rank.expand([self.sequence if axis == dim else size for axis, size in enumerate(packed.shape)])
        return packed.gather(dim, rank) * real.view(shape)
