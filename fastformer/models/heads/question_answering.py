"""Extractive question answering: the places in the tokens where the answer starts and ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from fastformer.models.configuration import FastformerConfig
from fastformer.models.inputs import TokenBatch
from fastformer.models.modeling import (
    FastformerModel,
    FastformerPreTrainedModel,
    ModelOptions,
    restored,
    restored_weights,
)
from fastformer.nn import DenseLayout
from fastformer.ops.packing import packed_positions, packed_sequences


class FastformerForQuestionAnswering(FastformerPreTrainedModel):
    """Prediction of an answer's start and end among question and context tokens (Devlin et al. 2019, section 4.2)."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        self.model = FastformerModel(config, add_pooling_layer=False)
        self.span = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **options: Unpack[ModelOptions],
    ) -> QuestionAnsweringModelOutput:
        """Return loss and logits; inputs are dense or packed as in `FastformerModel.forward`.

        Args:
            start_positions, end_positions: (batch,) int64, the answer's first and last token: its column in a dense
                batch, or its index within its packed sequence. A position outside the sequence's columns is ignored.

        Returns:
            start_logits and end_logits, (batch, sequence) with the lowest number of their dtype at padding, or
            (total_tokens,); the loss is the mean of both cross-entropies.
        """
        tokens, hidden, outputs = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options
        )
        start, end = self.span(hidden).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = [_span_loss(tokens, logits, at) for logits, at in ((start, start_positions), (end, end_positions))]
            loss = torch.stack(losses).mean()
        elif start_positions is not None or end_positions is not None:
            raise ValueError("start_positions and end_positions go together; got one of them")
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start if tokens.layout is None else _columns(tokens.layout, start),
            end_logits=end if tokens.layout is None else _columns(tokens.layout, end),
            hidden_states=restored(tokens, outputs.hidden_states),
            attentions=restored_weights(tokens.layout, tokens.layout, outputs.attentions),
        )


def _columns(layout: DenseLayout, logits: torch.Tensor) -> torch.Tensor:
    """Unpack (total_tokens,) to (batch, sequence), with the lowest number at padding, so that it is never chosen."""
    if layout.indices is None:
        return layout.unpack(logits)
    padded = logits.new_full((layout.batch * layout.sequence,), torch.finfo(logits.dtype).min)
    return padded.index_copy(0, layout.indices, logits).view(layout.batch, layout.sequence)


def _span_loss(tokens: TokenBatch, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    layout = tokens.layout
    if layout is None:
        cu_seqlens, longest = tokens.packing
        columns = packed_positions(cu_seqlens, len(logits))
        layout = DenseLayout(
            len(cu_seqlens) - 1, longest, packed_sequences(cu_seqlens, len(logits)) * longest + columns
        )
    columns = _columns(layout, logits.float())
    outside = (positions < 0) | (positions >= layout.sequence)
    return F.cross_entropy(columns, positions.masked_fill(outside, -1), ignore_index=-1)
