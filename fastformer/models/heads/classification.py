"""Classification of sequences, of tokens and of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from fastformer.data.packing import IGNORE_INDEX
from fastformer.models.configuration import FastformerConfig
from fastformer.models.modeling import (
    FastformerModel,
    FastformerPreTrainedModel,
    ModelOptions,
    restored,
    restored_weights,
)


class Classifier(nn.Module):
    """Dropout and the projection to the labels."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__()
        probability = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        assert config.num_labels is not None
        self.dropout = nn.Dropout(probability)
        self.projection = nn.Linear(config.hidden_size, config.num_labels, bias=config.classifier_bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (..., hidden_size) to logits (..., num_labels)."""
        return self.projection(self.dropout(hidden))


class FastformerForSequenceClassification(FastformerPreTrainedModel):
    """Classification or regression of whole sequences, from the pooler's output."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        self.model = FastformerModel(config, add_pooling_layer=True)
        self.classifier = Classifier(config)
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
        **options: Unpack[ModelOptions],
    ) -> SequenceClassifierOutput:
        """Return loss and logits (batch, num_labels); inputs are dense or packed as in `FastformerModel.forward`.

        Args:
            labels: (batch,) int64 classes; or (batch,) or (batch, num_labels) floating targets of a regression; or
                (batch, num_labels) floating 0 or 1 for several labels at once. `config.problem_type` decides which; if
                it is None, the labels' dtype and the number of labels do, as in Hugging Face's models.
        """
        tokens, _, outputs = self._encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            **options,
            pooled_alone=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=restored(tokens, outputs.hidden_states),
            attentions=restored_weights(tokens.layout, tokens.layout, outputs.attentions),
        )


class FastformerForTokenClassification(FastformerPreTrainedModel):
    """Classification of each token: named entities, parts of speech."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        self.model = FastformerModel(config, add_pooling_layer=False)
        self.classifier = Classifier(config)
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
        **options: Unpack[ModelOptions],
    ) -> TokenClassifierOutput:
        """Return loss and logits of every token; inputs are dense or packed as in `FastformerModel.forward`.

        Args:
            labels: like input_ids, int64 classes, -100 for tokens without a label. Labels at padding are ignored.
        """
        tokens, hidden, outputs = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options
        )
        logits, loss = self.classifier(hidden), None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), tokens.pack("labels", labels), ignore_index=IGNORE_INDEX)
        return TokenClassifierOutput(
            loss=loss,
            logits=tokens.restore(logits),
            hidden_states=restored(tokens, outputs.hidden_states),
            attentions=restored_weights(tokens.layout, tokens.layout, outputs.attentions),
        )


class FastformerForImageClassification(FastformerPreTrainedModel):
    """Classification of images by a Vision Transformer."""

    main_input_name = "pixel_values"

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        if not config.image_size:
            raise ValueError("image_size, patch_size and num_channels must be set for images; got None")
        self.model = FastformerModel(config, add_pooling_layer=True)
        self.classifier = Classifier(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput:
        """Return loss and logits (batch, num_labels).

        Args:
            pixel_values: (batch, channels, height, width).
            labels: as in `FastformerForSequenceClassification.forward`.
        """
        outputs = self.model(
            pixel_values=pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits, loss = self.classifier(outputs.pooler_output), None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
