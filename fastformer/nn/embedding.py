"""The input block of a Transformer as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastformer.nn.normalization import LayerNorm
from fastformer.nn.plain import dropout_p, is_own, is_plain
from fastformer.ops.embedding import transformer_embedding
from fastformer.ops.packing import packed_positions
from fastformer.ops.rotary import rotary_frequencies, rotary_table


class SinusoidalEmbedding(nn.Module):
    """Fixed position embeddings of sines and cosines (Vaswani et al. 2017); the first half of the features are sines.

    Args:
        max_positions: the longest sequence.
        hidden_size: the number of features of an embedding, even.
        device, dtype: of the table, which is not part of the state_dict.
    """

    weight: Tensor

    def __init__(
        self,
        max_positions: int,
        hidden_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % 2:
            raise ValueError(f"hidden_size must be an even number; got {hidden_size}")
        self.register_buffer("weight", torch.empty(max_positions, hidden_size, device=device, dtype=dtype), False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the table again, after new memory has been allocated for it."""
        positions, hidden_size = self.weight.shape
        cos, sin = rotary_table(rotary_frequencies(hidden_size), positions, device=self.weight.device)
        self.weight.copy_(torch.cat([sin, cos], dim=1))

    def forward(self, position_ids: Tensor) -> Tensor:
        """Look up `position_ids` and return (*position_ids.shape, hidden_size)."""
        return torch.nn.functional.embedding(position_ids, self.weight)


class TransformerEmbedding(nn.Module):
    """The input block of a Transformer, fused: ``dropout(LayerNorm(scale * word + position + token_type))``.

    Args:
        vocab_size: the number of words; 0 for no such table: `inputs_embeds` are given instead.
        hidden_size: the number of features of an embedding.
        max_positions: the longest sequence; 0 for no position embedding.
        token_types: the number of token types, BERT's segments; 0 for no such table.
        padding_idx: the index of a word whose embedding gets no gradient.
        eps: LayerNorm's epsilon.
        dropout: probability of dropping an element of the output, in training.
        device, dtype: of the parameters.
        norm: whether there is a LayerNorm: BERT and BART have one, GPT-2, Llama and T5 do not.
        scale: multiplies word embeddings; sqrt(hidden_size) in Vaswani et al. 2017.
        sinusoidal: use a `SinusoidalEmbedding` for positions instead of a learned table.

    `word`, `position` and `token_type` are `nn.Embedding`, `norm` is a `LayerNorm`. One that is replaced by another
    module, or has a hook, is called as a module, so that its effect is never lost.
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
        *,
        norm: bool = True,
        scale: float = 1.0,
        sinusoidal: bool = False,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        positions = SinusoidalEmbedding if sinusoidal else nn.Embedding
        self.scale = scale
        self.word = nn.Embedding(vocab_size, hidden_size, padding_idx=padding_idx, **factory) if vocab_size else None
        self.position = positions(max_positions, hidden_size, **factory) if max_positions else None
        self.token_type = nn.Embedding(token_types, hidden_size, **factory) if token_types else None
        self.norm = LayerNorm(hidden_size, eps=eps, **factory) if norm else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Embed `input_ids`, (batch, sequence) or packed (total_tokens,).

        `inputs_embeds`, (*input_ids.shape, hidden_size), replace the scaled word embeddings. The other arguments are as
        in `fastformer.transformer_embedding`. Returns (*input_ids.shape, hidden_size).
        """
        # Each attribute is read once, since a module has to search its submodules.
        word, position, token_type = self.word, self.position, self.token_type
        norm, dropout = self.norm, self.dropout
        p = dropout_p(dropout)
        ends_plain = p is not None and is_plain(norm, LayerNorm)
        if (
            ends_plain
            and inputs_embeds is None
            and self.scale == 1.0
            and (word is None or is_plain_embedding(word))
            and (position is None or is_plain_embedding(position))
            and (token_type is None or is_plain_embedding(token_type))
        ):
            assert input_ids is not None and word is not None and norm is not None and p is not None
            return transformer_embedding(
                input_ids,
                word.weight,
                None if position is None else position.weight,
                None if token_type is None else token_type.weight,
                norm.weight,
                norm.bias,
                position_ids=position_ids if position is not None else None,
                token_type_ids=token_type_ids,
                cu_seqlens=cu_seqlens,
                padding_idx=word.padding_idx,
                eps=norm.eps,
                dropout_p=p,
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        words = inputs_embeds if input_ids is None else self.words(input_ids)
        assert words is not None
        total = self._sum(words, token_type_ids, position_ids, cu_seqlens)
        if not ends_plain:
            return self.dropout(total if self.norm is None else self.norm(total))
        assert self.norm is not None and p is not None
        # Each token is a separate word, so that the dropout pattern equals that of the fused call.
        flat = total.flatten(0, -2)
        each = torch.arange(flat.shape[0], device=flat.device)
        return transformer_embedding(
            each, flat, None, None, self.norm.weight, self.norm.bias, eps=self.norm.eps, dropout_p=p
        ).view(total.shape)

    def words(self, input_ids: Tensor) -> Tensor:
        """Return the scaled word embeddings, (*input_ids.shape, hidden_size), which `inputs_embeds` may replace."""
        if self.word is None:
            raise ValueError("this embedding has no words (vocab_size=0); give inputs_embeds")
        words = self.word(input_ids)
        return words if self.scale == 1.0 else words * self.scale

    def _sum(
        self,
        words: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        if self.position is not None:
            if position_ids is None and cu_seqlens is not None:
                position_ids = packed_positions(cu_seqlens, words.shape[0])
            elif position_ids is None:
                position_ids = torch.arange(words.shape[-2], device=words.device)
            words = words + self.position(position_ids)
        if self.token_type is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(words.shape[:-1], dtype=torch.int64, device=words.device)
            words = words + self.token_type(token_type_ids)
        return words


def is_plain_embedding(table: nn.Module) -> bool:
    """Whether `table` computes exactly what the operator computes from its weight."""
    if not is_own(table):
        return False
    if type(table) is SinusoidalEmbedding:
        return True
    if type(table) is not nn.Embedding:
        return False
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse
