"""Packed sequences: tokens of all sequences one after the other, without padding."""

from __future__ import annotations

import torch


def packed_positions(cu_seqlens: torch.Tensor, total_tokens: int) -> torch.Tensor:
    """Each packed token's position within its sequence, (total_tokens,) int64, without a synchronisation.

    `cu_seqlens` is (batch + 1,) int32: the first token of each sequence and the total at the end.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    first = torch.repeat_interleave(starts, lengths, output_size=total_tokens)
    return torch.arange(total_tokens, device=cu_seqlens.device) - first


def packed_sequences(cu_seqlens: torch.Tensor, total_tokens: int) -> torch.Tensor:
    """The number of the sequence that each packed token belongs to, (total_tokens,) int64, without a synchronisation.

    `cu_seqlens` as in `packed_positions`; tokens from the total on belong to the number after the last.
    """
    tokens = torch.arange(total_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True)
