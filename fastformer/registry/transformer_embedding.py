"""The embedding block: the normalized sum of the embeddings of words, positions and token types."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator


def _inputs(
    make: Make,
    batch: int = 2,
    tokens: int = 24,
    hidden: int = 96,
    words: int = 50,
    *,
    positions: int | None = None,
    own_positions: bool = False,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    parameters: torch.dtype | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Call:
    """The tables, the norm's weight and bias, and the ids of words and token types.

    `parameters` is the dtype of the norm's weight and bias. With `own_positions`, there are ids of positions too.
    """
    rows = {"word_weight": words, "position_weight": positions or tokens, "token_type_weight": 2}
    tensors = {name: make.normal(count, hidden, scale=scale, shift=shift) for name, count in rows.items()}
    tensors |= {name: make.normal(hidden, dtype=parameters) for name in ("norm_weight", "norm_bias")}
    tensors["input_ids"] = make.integers(words, batch, tokens)
    tensors["token_type_ids"] = make.integers(2, batch, tokens)
    if own_positions:
        tensors["position_ids"] = make.integers(positions or tokens, batch, tokens)
    options: dict[str, Any] = {} if padding_idx is None else {"padding_idx": padding_idx}
    return Call(tensors, options | ({"dropout_p": dropout_p} if dropout_p else {}))


def _plain(
    input_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    token_type_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    token_type_ids: Tensor,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """Compute the block by the formula, for sequences that begin at position 0."""
    position = torch.arange(input_ids.shape[-1], device=input_ids.device)
    total = F.embedding(input_ids, word_weight, padding_idx) + F.embedding(position, position_weight)
    total = total + F.embedding(token_type_ids, token_type_weight)
    return F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, 1e-12)


TRANSFORMER_EMBEDDING = Operator("transformer_embedding", _inputs, _plain)
