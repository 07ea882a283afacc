"""What a model is given, dense as Hugging Face's or packed, brought into the one form it runs on: packed."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from fastformer.nn import DenseLayout, Packing, packed_positions


class TokenBatch(NamedTuple):
    """A packed batch that remembers where it came from.

    Attributes:
        input_ids, position_ids: (total_tokens,) int64.
        token_type_ids: (total_tokens,) int64, or None for all zeros.
        packing: where the sequences are.
        layout: the padded batch that `input_ids` was packed from; None if it came packed.
    """

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor | None
    position_ids: torch.Tensor
    packing: Packing
    layout: DenseLayout | None

    def pack(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """A tensor in the shape of the caller's input_ids, named `name` in errors, as (total_tokens,)."""
        if self.layout is None:
            _check_shape(name, tokens, self.input_ids)
            return tokens
        if tuple(tokens.shape) != (self.layout.batch, self.layout.sequence):
            raise ValueError(
                f"{name} must have input_ids' shape, {(self.layout.batch, self.layout.sequence)}; got "
                f"{tuple(tokens.shape)}"
            )
        return self.layout.pack(tokens)

    def restore(self, packed: torch.Tensor) -> torch.Tensor:
        """(total_tokens, ...) in the caller's layout: (batch, sequence, ...) with zeros at padding, or packed."""
        return packed if self.layout is None else self.layout.unpack(packed)


def token_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    max_position_embeddings: int,
) -> TokenBatch:
    """Check a model's inputs and pack them; see `FastformerModel.forward` for shapes and meaning.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32; got {input_ids.dtype}")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids must hold at least one token; got shape {tuple(input_ids.shape)}")
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen is for packed input; give cu_seqlens with it")
        batch = _dense(input_ids, attention_mask, token_type_ids, position_ids)
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask is for dense input; packed input says its lengths in cu_seqlens")
        batch = _packed(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen)
    if position_ids is None and batch.packing.max_seqlen > max_position_embeddings:
        raise ValueError(
            f"the longest sequence has {batch.packing.max_seqlen} tokens, more than the model's "
            f"max_position_embeddings, {max_position_embeddings}"
        )
    return batch


def _dense(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> TokenBatch:
    if input_ids.dim() != 2:
        raise ValueError(
            "input_ids must be (batch, sequence), or (total_tokens,) together with cu_seqlens; got shape "
            f"{tuple(input_ids.shape)}"
        )
    batch, sequence = input_ids.shape
    layout, packing = DenseLayout.from_mask(batch, sequence, attention_mask, input_ids.device)
    if layout.indices is not None and layout.indices.shape[0] == 0:
        raise ValueError("attention_mask marks every token as padding")
    if token_type_ids is not None:
        _check_shape("token_type_ids", token_type_ids, input_ids)
        token_type_ids = layout.pack(token_type_ids)
    if position_ids is None:
        position_ids = torch.arange(sequence, device=input_ids.device)
    elif tuple(position_ids.shape) not in ((batch, sequence), (1, sequence)):
        raise ValueError(
            f"position_ids must have shape {(batch, sequence)} or {(1, sequence)}; got {tuple(position_ids.shape)}"
        )
    positions = layout.pack(position_ids.expand(batch, sequence))
    return TokenBatch(layout.pack(input_ids), token_type_ids, positions, packing, layout)


def _packed(
    input_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
) -> TokenBatch:
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids must be (total_tokens,) when cu_seqlens is given; got {tuple(input_ids.shape)}")
    if max_seqlen is None:
        raise ValueError("max_seqlen is needed with cu_seqlens: the length of the longest packed sequence")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens must be (batch + 1,) int32 with a batch of 1 or more; got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_boundaries(cu_seqlens, max_seqlen, input_ids.shape[0])
    if token_type_ids is not None:
        _check_shape("token_type_ids", token_type_ids, input_ids)
    if position_ids is None:
        position_ids = packed_positions(cu_seqlens, input_ids.shape[0])
    _check_shape("position_ids", position_ids, input_ids)
    return TokenBatch(input_ids, token_type_ids, position_ids, Packing(cu_seqlens, max_seqlen), None)


def _check_boundaries(cu_seqlens: torch.Tensor, max_seqlen: int, total_tokens: int) -> None:
    """What is free to check on a CPU, and would stall a GPU."""
    boundaries = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(boundaries)]
    if boundaries[0] != 0 or boundaries[-1] != total_tokens or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {total_tokens}; got {boundaries[0]} to "
            f"{boundaries[-1]}{', falling on the way' if min(lengths) < 0 else ''}"
        )
    if max(lengths) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but a sequence has {max(lengths)} tokens")


def _check_shape(name: str, tensor: torch.Tensor, input_ids: torch.Tensor) -> None:
    if tensor.shape != input_ids.shape:
        raise ValueError(f"{name} must have input_ids' shape, {tuple(input_ids.shape)}; got {tuple(tensor.shape)}")
