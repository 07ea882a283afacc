"""A selection of the tokens whose last hidden states a head needs: the last block computes no others."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastformer.nn import Packing


class Selection(NamedTuple):
    """Some tokens of packed sequences.

    Attributes:
        positions: (n,) int64, indices into the packed tokens, ascending; a token may appear twice.
        packing: the boundaries of each sequence's chosen tokens among the n.
    """

    positions: torch.Tensor
    packing: Packing

    @classmethod
    def of(cls, packing: Packing, *positions: torch.Tensor) -> Selection:
        """Select the tokens at several tensors of positions, which have repeats only where sequences are empty.

        Nothing waits for a GPU.
        """
        chosen = torch.cat(positions).sort().values
        boundaries = torch.searchsorted(chosen, packing.cu_seqlens.long(), out_int32=True)
        longest = packing.max_seqlen * len(positions) + len(packing.cu_seqlens) - 1
        return cls(chosen, Packing(boundaries, longest))

    def rows(self, positions: torch.Tensor) -> torch.Tensor:
        """The indices, among the chosen tokens, of the tokens at these positions, which must be chosen ones."""
        return torch.searchsorted(self.positions, positions)
