"""Conversion of a model's inputs, dense as Hugging Face's or packed, to packed tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from fastformer.models.configuration import FastformerConfig
from fastformer.nn import DenseLayout, Packing, packed_positions


class TokenBatch(NamedTuple):
    """A packed batch that remembers the layout of its source.

    Attributes:
        input_ids: (total_tokens,) integers; None if embeddings were given.
        inputs_embeds: (total_tokens, hidden_size); None if ids were given.
        position_ids: (total_tokens,) int64.
        token_type_ids: (total_tokens,) int64, or None for all zeros.
        packing: the boundaries of the sequences.
        layout: the padded batch that the tokens were packed from; None if they came packed.
    """

    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None
    token_type_ids: torch.Tensor | None
    position_ids: torch.Tensor
    packing: Packing
    layout: DenseLayout | None

    def pack(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Pack a tensor of the caller's batch, one value for each token, as (total_tokens,); errors call it `name`."""
        if self.layout is None:
            _check_shape(name, tokens, self.position_ids.shape)
            return tokens
        _check_shape(name, tokens, torch.Size([self.layout.batch, self.layout.sequence]))
        return self.layout.pack(tokens)

    def restore(self, packed: torch.Tensor) -> torch.Tensor:
        """Restore the caller's layout: packed (total_tokens, ...), or (batch, sequence, ...) with zeros at padding."""
        return packed if self.layout is None else self.layout.unpack(packed)


def token_batch(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    config: FastformerConfig,
) -> TokenBatch:
    """Check a model's inputs and pack them; see `FastformerModel.forward` for shapes and meaning.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted.
    """
    name, tokens, shape = _given_tokens(input_ids, inputs_embeds)
    if token_type_ids is not None and not config.type_vocab_size:
        raise ValueError("token_type_ids were given, but the model has no types (type_vocab_size=0)")
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen is for packed input; give cu_seqlens with it")
        batch = _dense(name, tokens, shape, attention_mask, token_type_ids, position_ids, config.pad_positions)
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask is for dense input; packed input gives its lengths in cu_seqlens")
        batch = _packed(name, tokens, shape, token_type_ids, position_ids, cu_seqlens, max_seqlen)
    if position_ids is None:
        check_position_limit(batch.packing.max_seqlen, config)
    return batch


def check_position_limit(longest: int, config: FastformerConfig) -> None:
    """Raise ValueError if sequences of `longest` tokens have positions that the model does not support."""
    if config.position_limit is not None and longest > config.position_limit:
        raise ValueError(
            f"the longest sequence has {longest} tokens, more than the model's max_position_embeddings, "
            f"{config.position_limit}"
        )


def _given_tokens(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> tuple[str, torch.Tensor, torch.Size]:
    """Return the name of the given input, the input, and its shape (of embeddings without hidden_size)."""
    if inputs_embeds is not None and input_ids is None:
        name, tokens, shape = "inputs_embeds", inputs_embeds, inputs_embeds.shape[:-1]
    elif input_ids is not None and inputs_embeds is None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be int64 or int32; got {input_ids.dtype}")
        name, tokens, shape = "input_ids", input_ids, input_ids.shape
    else:
        both = "both" if input_ids is not None else "neither"
        raise ValueError(f"input_ids or inputs_embeds must be given; got {both}")
    if tokens.numel() == 0:
        raise ValueError(f"{name} must hold at least one token; got shape {tuple(tokens.shape)}")
    return name, tokens, shape


def _dense(
    name: str,
    tokens: torch.Tensor,
    shape: torch.Size,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    pad_positions: bool,
) -> TokenBatch:
    if len(shape) != 2:
        raise ValueError(
            f"{name} must be (batch, sequence), or (total_tokens,) together with cu_seqlens; got shape {tuple(shape)}"
        )
    batch, sequence = shape
    layout, packing = DenseLayout.from_mask(batch, sequence, attention_mask, tokens.device)
    if layout.indices is not None and layout.indices.shape[0] == 0:
        raise ValueError("attention_mask marks every token as padding")
    if token_type_ids is not None:
        _check_shape("token_type_ids", token_type_ids, shape)
        token_type_ids = layout.pack(token_type_ids)
    packed = layout.pack(tokens)
    if position_ids is None and not pad_positions:
        positions = packed_positions(packing.cu_seqlens, packed.shape[0])
    else:
        if position_ids is None:
            position_ids = torch.arange(sequence, device=tokens.device)
        elif tuple(position_ids.shape) not in ((batch, sequence), (1, sequence)):
            raise ValueError(
                f"position_ids must have shape {(batch, sequence)} or {(1, sequence)}; got {tuple(position_ids.shape)}"
            )
        positions = layout.pack(position_ids.expand(batch, sequence))
    ids, embeds = (packed, None) if name == "input_ids" else (None, packed)
    return TokenBatch(ids, embeds, token_type_ids, positions, packing, layout)


def _packed(
    name: str,
    tokens: torch.Tensor,
    shape: torch.Size,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
) -> TokenBatch:
    if len(shape) != 1:
        raise ValueError(f"{name} must be (total_tokens,) when cu_seqlens is given; got {tuple(shape)}")
    packing = check_packing("", cu_seqlens, max_seqlen, shape[0])
    if token_type_ids is not None:
        _check_shape("token_type_ids", token_type_ids, shape)
    if position_ids is None:
        position_ids = packed_positions(cu_seqlens, shape[0])
    _check_shape("position_ids", position_ids, shape)
    ids, embeds = (tokens, None) if name == "input_ids" else (None, tokens)
    return TokenBatch(ids, embeds, token_type_ids, position_ids, packing, None)


def check_packing(prefix: str, cu_seqlens: torch.Tensor, max_seqlen: int | None, total_tokens: int) -> Packing:
    """Return the packing of `total_tokens`; errors put `prefix` before the arguments' names."""
    if max_seqlen is None:
        raise ValueError(f"{prefix}max_seqlen is needed with {prefix}cu_seqlens: the length of the longest sequence")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{prefix}cu_seqlens must be (batch + 1,) int32 with a batch of 1 or more; got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_boundaries(prefix, cu_seqlens, max_seqlen, total_tokens)
    return Packing(cu_seqlens, max_seqlen)


def _check_boundaries(prefix: str, cu_seqlens: torch.Tensor, max_seqlen: int, total_tokens: int) -> None:
    """Check the boundaries' values on a CPU, where this is free; on a GPU it would stall."""
    boundaries = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(boundaries)]
    if boundaries[0] != 0 or boundaries[-1] != total_tokens or min(lengths) < 0:
        raise ValueError(
            f"{prefix}cu_seqlens must rise from 0 to the number of tokens, {total_tokens}; got {boundaries[0]} to "
            f"{boundaries[-1]}{', falling on the way' if min(lengths) < 0 else ''}"
        )
    if max(lengths) > max_seqlen:
        raise ValueError(f"{prefix}max_seqlen is {max_seqlen}, but a sequence has {max(lengths)} tokens")


def _check_shape(name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the tokens' shape, {tuple(shape)}; got {tuple(tensor.shape)}")
