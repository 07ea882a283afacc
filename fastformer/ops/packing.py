"""Packed sequences: the tokens of all sequences one after the other, without padding."""

from __future__ import annotations

import torch


def packed_positions(cu_seqlens: torch.Tensor, total_tokens: int) -> torch.Tensor:
    """Return each packed token's position within its sequence, (total_tokens,) int64, without a synchronisation.

    `cu_seqlens` is (batch + 1,) int32: the first token of each sequence and the total at the end.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    first = torch.repeat_interleave(starts, lengths, output_size=total_tokens)
    return torch.arange(total_tokens, device=cu_seqlens.device) - first


def packed_sequences(cu_seqlens: torch.Tensor, total_tokens: int) -> torch.Tensor:
    """Return the number of the sequence of each packed token, (total_tokens,) int64, without a synchronisation.

    `cu_seqlens` as in `packed_positions`; tokens from the total on get the number after the last sequence's.
    """
    tokens = torch.arange(total_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True)
