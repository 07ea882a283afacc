"""Sentence embeddings: one vector for each sentence, for comparison with others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from fastformer.models.configuration import FastformerConfig
from fastformer.models.modeling import (
    FastformerModel,
    FastformerPreTrainedModel,
    ModelOptions,
    restored,
    restored_weights,
)
from fastformer.models.pooling import pool


@dataclass
class FastformerForEmbeddingOutput(ModelOutput):
    """The output of `FastformerForEmbedding`.

    Attributes:
        embeddings: (batch, hidden_size), of length 1.
        last_hidden_state: (total_tokens, hidden_size), or (batch, sequence, hidden_size) with zeros at padding.
        hidden_states, attentions: if requested.
    """

    embeddings: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class FastformerForEmbedding(FastformerPreTrainedModel):
    """Sentence embeddings: tokens pooled by ``config.pooling``, then normalised (Reimers and Gurevych 2019)."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.pooler\.", r"^(mlm|nsp|lm)_head"]  # noqa: RUF012

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        self.model = FastformerModel(config, add_pooling_layer=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Unpack[ModelOptions],
    ) -> FastformerForEmbeddingOutput:
        """Embed a batch; inputs are dense or packed as in `FastformerModel.forward`."""
        tokens, hidden, outputs = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options
        )
        return FastformerForEmbeddingOutput(
            embeddings=F.normalize(pool(hidden, tokens.packing, self.config.pooling), dim=-1),
            last_hidden_state=tokens.restore(hidden),
            hidden_states=restored(tokens, outputs.hidden_states),
            attentions=restored_weights(tokens.layout, tokens.layout, outputs.attentions),
        )
