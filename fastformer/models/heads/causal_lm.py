"""Causal language modelling, with generation by Hugging Face's `generate`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from fastformer.models.configuration import FastformerConfig
from fastformer.models.heads.projection import next_token_labels, projection_loss
from fastformer.models.modeling import (
    CACHE_FIELD,
    FastformerModel,
    FastformerPreTrainedModel,
    ModelOptions,
    restored,
    restored_weights,
)


class GenerativeModel(FastformerPreTrainedModel, GenerationMixin):
    """The base of causal and sequence-to-sequence models: the projection to the vocabulary, and `generate`."""

    lm_head: nn.Linear

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def create_masks_for_generate(
        self,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> torch.Tensor | None:
        """Hugging Face's hook for static caches: keep the mask as one value for each token; attention does the rest.

        It has the cache's length from the first token on: a growing mask would be compiled and recorded again.
        """
        cache = past_key_values if cache is None else cache
        if attention_mask is None or cache is None:
            return attention_mask
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        longest = max(getattr(layer, "max_cache_len", 0) for layer in own.layers)
        return F.pad(attention_mask, (0, max(0, longest - attention_mask.shape[1])), value=1)

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scale the hidden states for `lm_head`."""
        return hidden if self.config.logit_scale == 1.0 else hidden * self.config.logit_scale


class FastformerForCausalLM(GenerativeModel):
    """A decoder that predicts the next token at each token."""

    _stacks = ("decoder",)
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.word.weight"}  # noqa: RUF012

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        self.model = FastformerModel(config, add_pooling_layer=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
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
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        **options: Unpack[ModelOptions],
    ) -> CausalLMOutputWithPast:
        """Return loss and logits; inputs dense or packed, and caches, are as in `FastformerModel.forward`.

        Args:
            labels: like input_ids, int64, -100 where nothing is predicted; each is predicted from the tokens before it
                in its sequence. Not together with a cache.
            logits_to_keep: the number of last columns of a dense batch whose logits are returned, or these columns; 0
                for all.
            return_logits: whether to return logits. None: only without labels, because the loss never holds all logits.
        """
        cached = cache is not None or past_key_values is not None or bool(use_cache)
        if cached:
            if labels is not None:
                raise ValueError("labels are for training, without a cache; got both")
            outputs = self.model(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
                cache=cache if cache is not None else past_key_values,
                use_cache=use_cache,
                return_dict=True,
                **options,
            )
            hidden, loss = outputs.last_hidden_state, None
            hidden_states, attentions = outputs.hidden_states, outputs.attentions
        else:
            tokens, hidden, outputs = self._encode(
                input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options
            )
            loss, hidden_states = None, restored(tokens, outputs.hidden_states)
            attentions = restored_weights(tokens.layout, tokens.layout, outputs.attentions)
            if labels is not None:
                targets = next_token_labels(tokens.pack("labels", labels), tokens.packing.cu_seqlens)
                loss = projection_loss(self.lm_head, self.scaled(hidden), targets)
            hidden = tokens.restore(hidden)
        logits = None
        if labels is None if return_logits is None else return_logits:
            logits = self.lm_head(self.scaled(_last_columns(hidden, logits_to_keep)))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=hidden_states,
            attentions=attentions,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )


def _last_columns(hidden: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """Select the columns of `hidden` (batch, sequence, hidden_size) whose logits are needed."""
    if isinstance(keep, int) and keep == 0:
        return hidden
    if hidden.dim() != 3:
        raise ValueError("logits_to_keep is for dense input; packed input has no columns")
    return hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
