"""Pad packed batches to few shapes, because a CUDA graph is recorded once for each shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.data.packing import IGNORE_INDEX

# Most batches are about full and get the largest shape, so that a few smaller shapes are enough.
_TOKEN_STEPS, _MASKED_STEPS = 16, 32
_OF_TOKENS = ("input_ids", "token_type_ids", "position_ids")
_OF_SEQUENCES = ("next_sentence_label", "start_positions", "end_positions")


@dataclass(frozen=True)
class FewShapes:
    """Make batches and pad them to few shapes.

    Args:
        make: makes a packed batch from its arguments.
        tokens_per_batch: the most tokens in a batch.
        longest: tokens of the longest sequence that the model accepts; None for any length.
    """

    make: Callable[..., Any]
    tokens_per_batch: int
    longest: int | None = None

    def __call__(self, *given: Any) -> dict[str, Any]:
        """Return the batch that `make` makes, after `padded`."""
        return padded(self.make(*given), self.tokens_per_batch, self.longest)


def padded(batch: dict[str, Any], tokens_per_batch: int, longest: int | None = None) -> dict[str, Any]:
    """Add tokens, sequences and masked positions without labels to a packed batch, so that few shapes occur.

    The added tokens form new sequences after the others, so that no real token attends to them; the last sequences may
    be empty. The sizes become:

    - tokens: a multiple of a sixteenth of `tokens_per_batch`;
    - masked positions: a multiple of a thirty-second of `tokens_per_batch`;
    - sequences: a power of two;
    - `max_seqlen`: a power of two, but at most `longest`.

    Args:
        batch: a batch with labels from `pack`, `pack_pairs` or an objective.
        tokens_per_batch: the most tokens in a batch.
        longest: tokens of the longest sequence that the model accepts; None for any length.

    Returns:
        The padded batch, with ``real_tokens``, the number of tokens before padding.

    Raises:
        ValueError: the batch has an unknown entry, or its labels are not integers, so no value can mean "no label".
    """
    batch = dict(batch)
    sides = [_Side.of(batch, prefix, tokens_per_batch) for prefix in ("", "decoder_") if f"{prefix}cu_seqlens" in batch]
    sequences = _power_of_two(max(side.sequences for side in sides))
    made: dict[str, Any] = {"real_tokens": sum(side.tokens for side in sides)}
    labels, positions = batch.pop("labels", None), batch.pop("masked_positions", None)
    for side in sides:
        made |= side.padded(batch, sequences, longest)
    for name in _OF_SEQUENCES:
        if name in batch:
            made[name] = _extended(batch.pop(name), sequences, IGNORE_INDEX)
    if batch:
        raise ValueError(f"{', '.join(batch)} cannot be padded: no padding value is known for it")
    if labels is not None:
        if labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 to be padded (-100 means no label), got {labels.dtype}")
        of_tokens = len(labels) == sides[-1].tokens
        made["labels"] = _extended(labels, sides[-1].padded_tokens if of_tokens else sequences, IGNORE_INDEX)
    if positions is not None:
        size = _multiple(len(positions), tokens_per_batch // _MASKED_STEPS)
        unlabelled = (made["labels"] == IGNORE_INDEX).nonzero().squeeze(1)
        made["masked_positions"] = torch.cat([positions, unlabelled[: size - len(positions)]]).sort().values
    return made


@dataclass(frozen=True)
class _Side:
    """One packed part of a batch: its only one, or the sources or the targets of its pairs.

    Attributes:
        prefix: prefix of the names of its tensors.
        tokens, padded_tokens: number of tokens before and after padding.
        longest: tokens of the longest sequence.
        sequences: the least number of sequences after padding.
    """

    prefix: str
    tokens: int
    padded_tokens: int
    longest: int
    sequences: int

    @classmethod
    def of(cls, batch: dict[str, Any], prefix: str, tokens_per_batch: int) -> _Side:
        tokens, longest = len(batch[f"{prefix}input_ids"]), batch[f"{prefix}max_seqlen"]
        size = _multiple(tokens, tokens_per_batch // _TOKEN_STEPS)
        added = -(-(size - tokens) // longest)
        return cls(prefix, tokens, size, longest, len(batch[f"{prefix}cu_seqlens"]) - 1 + added)

    def padded(self, batch: dict[str, Any], sequences: int, longest: int | None) -> dict[str, Any]:
        """Remove this side from `batch`, and return it padded to `padded_tokens` and to this number of sequences."""
        names = [name for name in _OF_TOKENS if f"{self.prefix}{name}" in batch]
        made: dict[str, Any] = {
            name: _extended(batch.pop(f"{self.prefix}{name}"), self.padded_tokens, 0) for name in names
        }
        if "position_ids" in made:
            made["position_ids"][self.tokens :] = torch.arange(self.padded_tokens - self.tokens) % self.longest
        cu_seqlens, _ = batch.pop(f"{self.prefix}cu_seqlens"), batch.pop(f"{self.prefix}max_seqlen")
        added = sequences + 1 - len(cu_seqlens)
        ends = self.tokens + self.longest * torch.arange(1, added + 1, dtype=torch.int32)
        made["cu_seqlens"] = torch.cat([cu_seqlens, ends.clamp(max=self.padded_tokens)])
        size = _power_of_two(self.longest)
        made["max_seqlen"] = size if longest is None else max(self.longest, min(size, longest))
        return {f"{self.prefix}{name}": value for name, value in made.items()}


def _extended(values: Tensor, size: int, value: int) -> Tensor:
    return F.pad(values, (0, size - len(values)), value=value)


def _multiple(number: int, step: int) -> int:
    return -(-number // max(1, step)) * max(1, step)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
