"""Masked language modelling, alone or with next-sentence prediction as in BERT's pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, MaskedLMOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from fastformer.data.packing import IGNORE_INDEX
from fastformer.models.configuration import HIDDEN_ACTS, FastformerConfig
from fastformer.models.heads.projection import projection_loss
from fastformer.models.inputs import TokenBatch
from fastformer.models.modeling import (
    FastformerModel,
    FastformerPreTrainedModel,
    Inputs,
    ModelOptions,
    restored,
    restored_weights,
)
from fastformer.models.pooling import pooled_tokens
from fastformer.models.selection import Selection
from fastformer.nn import LayerNorm
from fastformer.nn.feed_forward import ACTIVATIONS


class MaskedLMHead(nn.Module):
    """BERT's masked-LM head: dense, activation, norm, and the projection to the vocabulary."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__()
        self.activation = HIDDEN_ACTS[config.hidden_act]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `hidden` (tokens, hidden_size) to logits (tokens, vocab_size)."""
        return self.decoder(self._transform(hidden))

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the float32 mean cross-entropy of `hidden` (tokens, hidden_size) and `labels` (tokens,).

        The logits of all tokens are never held at once.
        """
        return projection_loss(self.decoder, self._transform(hidden), labels)

    def _transform(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))


class _Masked(NamedTuple):
    """The labelled tokens of a packed batch.

    Attributes:
        positions: (masked_tokens,) int64, indices into the batch's tokens.
        labels: (masked_tokens,) int64.
    """

    positions: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, tokens: TokenBatch, labels: torch.Tensor, positions: torch.Tensor | None) -> _Masked:
        """Select the labelled tokens, from `labels` and `positions` as given to a model's forward."""
        labels = tokens.pack("labels", labels)
        if positions is None:
            positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        try:
            return cls(positions, labels.index_select(0, positions))
        except IndexError as error:
            low, high = positions.min().item(), positions.max().item()
            raise IndexError(f"masked_positions must be from 0 to {len(labels) - 1}; got {low} to {high}") from error


@dataclass
class FastformerForPreTrainingOutput(ModelOutput):
    """The output of `FastformerForPreTraining`.

    Attributes:
        loss: the sum of the losses below that were computed.
        prediction_logits: (total_tokens, vocab_size), or (batch, sequence, vocab_size) with zeros at padding.
        seq_relationship_logits: (batch, 2): it is the next sentence, it is a random one.
        hidden_states, attentions: if requested.
        mlm_loss: mean masked-LM cross-entropy in nats.
        nsp_loss: mean next-sentence cross-entropy in nats.
    """

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    mlm_loss: torch.Tensor | None = None
    nsp_loss: torch.Tensor | None = None


class _MaskedLMModel(FastformerPreTrainedModel):
    """The encoder with a masked-LM head, whose output projection may be the word embedding."""

    _stacks = ("encoder",)
    _tied_weights_keys = {"mlm_head.decoder.weight": "model.embeddings.word.weight"}  # noqa: RUF012

    model: FastformerModel
    mlm_head: MaskedLMHead

    def get_output_embeddings(self) -> nn.Linear:
        return self.mlm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.mlm_head.decoder = new_embeddings

    def _masked_lm(
        self,
        inputs: Inputs,
        labels: torch.Tensor | None,
        masked_positions: torch.Tensor | None,
        return_logits: bool | None,
        options: ModelOptions,
    ) -> tuple[TokenBatch, BaseModelOutputWithPoolingAndCrossAttentions, torch.Tensor | None, torch.Tensor | None]:
        """Return the packed batch of `inputs` (see `_encode`), the encoder's outputs, the head's loss and logits.

        Loss and logits are None if they are not needed. Without logits, the hidden states are only those of the tokens
        that the heads use.
        """
        tokens = self._pack(*inputs, options.get("cu_seqlens"), options.get("max_seqlen"))
        _check_masked_positions(masked_positions, labels, tokens)
        masked = None if labels is None else _Masked.of(tokens, labels, masked_positions)
        wants_logits = labels is None if return_logits is None else return_logits
        selection = None if masked is None or wants_logits else self._selection(tokens, masked)
        outputs = self._run(tokens, selection, options.get("output_hidden_states"), options.get("output_attentions"))
        hidden, loss, logits = outputs.last_hidden_state, None, None
        assert hidden is not None
        if masked is not None:
            rows = masked.positions if selection is None else selection.rows(masked.positions)
            loss = self.mlm_head.loss(hidden.index_select(0, rows), masked.labels)
        if wants_logits:
            logits = tokens.restore(self.mlm_head(hidden))
        return tokens, outputs, loss, logits

    def _selection(self, tokens: TokenBatch, masked: _Masked) -> Selection | None:
        """The tokens that the heads use; None for all."""
        if self.model.pooler is None:
            return Selection.of(tokens.packing, masked.positions)
        pooled = pooled_tokens(tokens.packing, self.config.pooling)
        return None if pooled is None else Selection.of(tokens.packing, masked.positions, pooled)


class FastformerForPreTraining(_MaskedLMModel):
    """BERT's two pretraining objectives: masked language modelling and next-sentence prediction."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        self.model = FastformerModel(config, add_pooling_layer=True)
        self.mlm_head = MaskedLMHead(config)
        self.nsp_head = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        return_logits: bool | None = None,
        **options: Unpack[ModelOptions],
    ) -> FastformerForPreTrainingOutput:
        """Return both heads' logits and losses; inputs are dense or packed as in `FastformerModel.forward`.

        Args:
            labels: like input_ids, int64, -100 where nothing is predicted. Labels at padding are ignored.
            next_sentence_label: (batch,) int64, 0 = is the next sentence, 1 = random.
            masked_positions: (masked_tokens,) int64, only for packed input: the places where labels are not -100.
                Without it a search finds them, which waits for a GPU.
            return_logits: whether to return the masked-LM logits of every token. None: only without labels, because the
                loss needs the vocabulary projection only at labelled tokens. A Hugging Face `Trainer` whose
                `compute_metrics` needs logits puts ``return_logits=True`` into its batches.

        Returns:
            `FastformerForPreTrainingOutput`; `loss` is mlm_loss + nsp_loss, or the one whose labels were given.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        tokens, outputs, mlm_loss, logits = self._masked_lm(inputs, labels, masked_positions, return_logits, options)
        seq_relationship_logits = self.nsp_head(outputs.pooler_output)
        nsp_loss = None
        if next_sentence_label is not None:
            nsp_loss = F.cross_entropy(seq_relationship_logits.float(), next_sentence_label)
        losses = [loss for loss in (mlm_loss, nsp_loss) if loss is not None]
        return FastformerForPreTrainingOutput(
            loss=torch.stack(losses).sum() if losses else None,
            prediction_logits=logits,
            seq_relationship_logits=seq_relationship_logits,
            hidden_states=restored(tokens, outputs.hidden_states),
            attentions=restored_weights(tokens.layout, tokens.layout, outputs.attentions),
            mlm_loss=mlm_loss,
            nsp_loss=nsp_loss,
        )


class FastformerForMaskedLM(_MaskedLMModel):
    """Masked language modelling."""

    # Parts of a pretraining checkpoint that this model does not have.
    _keys_to_ignore_on_load_unexpected = [r"^model\.pooler\.", r"^nsp_head\."]  # noqa: RUF012

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        self.model = FastformerModel(config, add_pooling_layer=False)
        self.mlm_head = MaskedLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        return_logits: bool | None = None,
        **options: Unpack[ModelOptions],
    ) -> MaskedLMOutput:
        """Return loss and logits; arguments are as in `FastformerForPreTraining.forward`."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        tokens, outputs, loss, logits = self._masked_lm(inputs, labels, masked_positions, return_logits, options)
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=restored(tokens, outputs.hidden_states),
            attentions=restored_weights(tokens.layout, tokens.layout, outputs.attentions),
        )


def _check_masked_positions(
    masked_positions: torch.Tensor | None, labels: torch.Tensor | None, tokens: TokenBatch
) -> None:
    if masked_positions is None:
        return
    if labels is None or tokens.layout is not None:
        raise ValueError("masked_positions needs labels and packed input: they are indices into its tokens")
    if masked_positions.dim() != 1 or masked_positions.dtype != torch.int64:
        raise ValueError(
            f"masked_positions must be (masked_tokens,) int64; got {tuple(masked_positions.shape)} "
            f"{masked_positions.dtype}"
        )
