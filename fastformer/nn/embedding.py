"""The input block of a Transformer as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastformer.nn.normalization import LayerNorm
from fastformer.ops.embedding import transformer_embedding
from fastformer.ops.packing import packed_positions


class TransformerEmbedding(nn.Module):
    """``dropout(LayerNorm(word + position + token_type))``, the input block of BERT (Devlin et al. 2019), fused.

    Args:
        vocab_size: words.
        hidden_size: features of an embedding.
        max_positions: the longest sequence.
        token_types: kinds of tokens, BERT's segments; 0 for no such table.
        padding_idx: a word whose embedding gets no gradient.
        eps: of LayerNorm.
        dropout: probability of dropping an element of the output, in training.
        device, dtype: of the parameters.

    `word`, `position` and `token_type` are `nn.Embedding`, `norm` a `LayerNorm`; one that has been replaced by another
    module, or has a hook, is called, so that what it adds is never lost.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_positions: int,
        token_types: int = 0,
        padding_idx: int | None = None,
        eps: float = 1e-12,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.word = nn.Embedding(vocab_size, hidden_size, padding_idx=padding_idx, **factory)
        self.position = nn.Embedding(max_positions, hidden_size, **factory)
        self.token_type = nn.Embedding(token_types, hidden_size, **factory) if token_types else None
        self.norm = LayerNorm(hidden_size, eps=eps, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Embed `input_ids`, (batch, sequence) or packed (total_tokens,); the other arguments as in
        `fastformer.transformer_embedding`. Returns (*input_ids.shape, hidden_size)."""
        tables = [self.word, self.position, *([] if self.token_type is None else [self.token_type])]
        dropout_p = self.dropout.p if self.training else 0.0
        norm_is_plain = type(self.norm) is LayerNorm and type(self.dropout) is nn.Dropout and not _hooked(self.norm)
        if norm_is_plain and all(map(is_plain_embedding, tables)):
            return transformer_embedding(
                input_ids,
                self.word.weight,
                self.position.weight,
                None if self.token_type is None else self.token_type.weight,
                self.norm.weight,
                self.norm.bias,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                cu_seqlens=cu_seqlens,
                padding_idx=self.word.padding_idx,
                eps=self.norm.eps,
                dropout_p=dropout_p,
            )
        total = self._sum(input_ids, token_type_ids, position_ids, cu_seqlens)
        if not norm_is_plain:
            return self.dropout(self.norm(total))
        # Each token a word of its own: dropout's pattern is the one of the fused way.
        flat = total.flatten(0, -2)
        each = torch.arange(flat.shape[0], device=flat.device)
        return transformer_embedding(
            each, flat, None, None, self.norm.weight, self.norm.bias, eps=self.norm.eps, dropout_p=dropout_p
        ).view(total.shape)

    def _sum(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        if position_ids is None and cu_seqlens is not None:
            position_ids = packed_positions(cu_seqlens, input_ids.shape[0])
        elif position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)
        total = self.word(input_ids) + self.position(position_ids)
        if self.token_type is not None:
            total = total + self.token_type(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        return total


def is_plain_embedding(table: nn.Module) -> bool:
    """Whether `table` computes exactly what the operator does from its weight."""
    if type(table) is not nn.Embedding or _hooked(table):
        return False
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
