"""The Transformer encoder as a Hugging Face model. Inside, tokens are packed from embedding to loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from fastformer.models.block import Block
from fastformer.models.configuration import FastformerConfig
from fastformer.models.inputs import token_batch
from fastformer.nn import Packing, TransformerEmbedding


class Pooler(nn.Module):
    """Each sequence's first token through a dense layer and tanh."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
        """`hidden` (total_tokens, hidden_size) to (batch, hidden_size); an empty sequence counts as zeros."""
        starts, ends = packing.cu_seqlens[:-1], packing.cu_seqlens[1:]
        first = hidden.index_select(0, starts.clamp(max=hidden.shape[0] - 1))
        first = first.masked_fill((starts == ends).unsqueeze(1), 0.0)
        return torch.tanh(self.dense(first))


class FastformerPreTrainedModel(PreTrainedModel):
    """What all Fastformer models share: configuration, initial weights, loading and saving.

    Attention always runs Fastformer's operator; Hugging Face's name for a model's own attention is "eager", and
    another `attn_implementation` is refused.
    """

    config: FastformerConfig
    config_class = FastformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerEmbedding", "Block"]  # noqa: RUF012
    _input_embed_layer = "word"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Hugging Face's models.

        Raises:
            OSError: a weights file is damaged or cut short; the message names it.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            source = _damaged_file(pretrained_model_name_or_path) or pretrained_model_name_or_path
            raise OSError(f"the weights in {source} are damaged or cut short: {error}") from error

    def _returns_hidden_states(self, output_hidden_states: bool | None, output_attentions: bool | None) -> bool:
        """Which of Hugging Face's optional outputs were asked for, by argument or configuration."""
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions is not supported: attention weights are never formed")
        if output_hidden_states not in (None, True, False):
            raise ValueError(f"output_hidden_states must be True, False or None; got {output_hidden_states!r}")
        return bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)


class FastformerModel(FastformerPreTrainedModel):
    """The encoder: embeddings, blocks and, unless `add_pooling_layer` is False, the pooler."""

    def __init__(self, config: FastformerConfig, add_pooling_layer: bool = True) -> None:
        config.validate_architecture()
        super().__init__(config)
        self.embeddings = TransformerEmbedding(
            config.vocab_size,
            config.hidden_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
            eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode a batch, given in one of two layouts.

        *Packed*, with `cu_seqlens`: sequences one after the other. Nothing waits for a GPU. *Dense*, without: packed
        on the way in and unpacked on the way out, so that padding is never computed; with an attention_mask the number
        of real tokens is read on the host, one synchronisation with a GPU.

        Args:
            input_ids: (total_tokens,) or (batch, sequence), int64 or int32.
            attention_mask: (batch, sequence), dense only: non-zero for a token, zero for padding, anywhere; None for
                no padding.
            token_type_ids: like input_ids; None for zeros.
            position_ids: like input_ids, dense also (1, sequence). None for the position within the packed sequence,
                or the column of the dense batch, as in Hugging Face's BERT.
            cu_seqlens: (batch + 1,) int32, the first token of each packed sequence and the total at the end.
            max_seqlen: the length of the longest packed sequence.
            output_hidden_states: also return the embeddings and each block's output.
            output_attentions: refused, since attention weights are never formed.

        Returns:
            last_hidden_state (total_tokens, hidden_size), or (batch, sequence, hidden_size) with zeros at padding;
            pooler_output (batch, hidden_size), from each sequence's first token; hidden_states, if asked for, in the
            layout of the first.

        Raises:
            TypeError, ValueError, IndexError: naming the argument, what was given and what is accepted.
        """
        returns_hidden_states = self._returns_hidden_states(output_hidden_states, output_attentions)
        tokens = token_batch(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            cu_seqlens,
            max_seqlen,
            self.config.max_position_embeddings,
        )
        hidden = self.embeddings(tokens.input_ids, tokens.token_type_ids, tokens.position_ids)
        hidden_states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, tokens.packing)
            if returns_hidden_states:
                hidden_states.append(hidden)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens.restore(hidden),
            pooler_output=None if self.pooler is None else self.pooler(hidden, tokens.packing),
            hidden_states=tuple(map(tokens.restore, hidden_states)) if returns_hidden_states else None,
        )


def _damaged_file(folder: Any) -> Path | None:
    """The first safetensors file in `folder` that cannot be opened."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
    return None
