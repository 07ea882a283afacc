"""An encoder together with a decoder, and sequence-to-sequence language modelling with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from fastformer.data.packing import IGNORE_INDEX
from fastformer.models.configuration import FastformerConfig
from fastformer.models.heads.causal_lm import GenerativeModel
from fastformer.models.heads.projection import projection_loss
from fastformer.models.inputs import token_batch
from fastformer.models.modeling import (
    CACHE_FIELD,
    FastformerModel,
    FastformerPreTrainedModel,
    ModelOptions,
    restored,
    restored_weights,
)
from fastformer.nn import TransformerEmbedding


class FastformerEncoderDecoderModel(FastformerPreTrainedModel):
    """An encoder, and a decoder that attends to its output. Both use the encoder's table of word embeddings."""

    _stacks = ("encoder_decoder",)

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        self.encoder = FastformerModel(config, add_pooling_layer=False, role="encoder")
        self.decoder = FastformerModel(config, add_pooling_layer=False, role="decoder")
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> FastformerModel:
        return self.encoder

    def get_decoder(self) -> FastformerModel:
        return self.decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_cu_seqlens: torch.Tensor | None = None,
        decoder_max_seqlen: int | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **options: Unpack[ModelOptions],
    ) -> Seq2SeqModelOutput:
        """Run sources through the encoder and targets through the decoder.

        Args:
            input_ids, inputs_embeds, attention_mask: the sources, as in `FastformerModel.forward`, packed with
                ``cu_seqlens`` and ``max_seqlen``.
            decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, decoder_position_ids: the targets, packed
                with decoder_cu_seqlens and decoder_max_seqlen; equally many as there are sources.
            encoder_outputs: the output of a call of `encoder`, dense, instead of the sources.
            cache, past_key_values, use_cache: as in `FastformerModel.forward`; targets must be dense then.
            options: cu_seqlens, max_seqlen, output_hidden_states, output_attentions.

        Returns:
            last_hidden_state of the decoder, in its input's layout; encoder_last_hidden_state, in the sources' layout;
            the cache; both models' hidden states and all attentions, if requested.
        """
        outputs_wanted = {
            name: options.get(name) for name in ("output_hidden_states", "output_attentions") if name in options
        }
        packed: dict[str, Any] = {}
        source_layout = None
        cached = cache is not None or past_key_values is not None or bool(use_cache)
        if encoder_outputs is not None:
            encoded = encoder_outputs[0]
            encoder_hidden_states = getattr(encoder_outputs, "hidden_states", None)
            encoder_attentions = getattr(encoder_outputs, "attentions", None)
            dense = encoded
        else:
            tokens = token_batch(
                input_ids,
                inputs_embeds,
                attention_mask,
                None,
                None,
                options.get("cu_seqlens"),
                options.get("max_seqlen"),
                self.config,
            )
            outputs = self.encoder(
                tokens.input_ids,
                position_ids=tokens.position_ids,
                inputs_embeds=tokens.inputs_embeds,
                cu_seqlens=tokens.packing.cu_seqlens,
                max_seqlen=tokens.packing.max_seqlen,
                return_dict=True,
                **outputs_wanted,
            )
            encoded, dense = outputs.last_hidden_state, tokens.restore(outputs.last_hidden_state)
            encoder_hidden_states = restored(tokens, outputs.hidden_states)
            encoder_attentions = restored_weights(tokens.layout, tokens.layout, outputs.attentions)
            if cached:
                encoded = dense
            else:
                source_layout = tokens.layout
                packed = {
                    "encoder_cu_seqlens": tokens.packing.cu_seqlens,
                    "encoder_max_seqlen": tokens.packing.max_seqlen,
                }
        if decoder_inputs_embeds is None and decoder_input_ids is not None:
            embeddings = self.encoder.embeddings
            assert isinstance(embeddings, TransformerEmbedding)
            decoder_inputs_embeds = embeddings.words(decoder_input_ids)
        elif decoder_input_ids is not None or decoder_inputs_embeds is None:
            raise ValueError("decoder_input_ids or decoder_inputs_embeds must be given, and not both")
        decoded = self.decoder(
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            cu_seqlens=decoder_cu_seqlens,
            max_seqlen=decoder_max_seqlen,
            encoder_hidden_states=encoded,
            encoder_attention_mask=None if packed else attention_mask,
            cache=cache if cache is not None else past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **packed,
            **outputs_wanted,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=restored_weights(None, source_layout, decoded.cross_attentions),
            encoder_last_hidden_state=dense,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attentions=encoder_attentions,
            **{CACHE_FIELD: decoded.get(CACHE_FIELD)},
        )


class FastformerForSeq2SeqLM(GenerativeModel):
    """An encoder-decoder that predicts the next token at each target token."""

    _stacks = ("encoder_decoder",)
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embeddings.word.weight"}  # noqa: RUF012

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__(config)
        self.model = FastformerEncoderDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> FastformerModel:
        return self.model.encoder

    def get_decoder(self) -> FastformerModel:
        return self.model.decoder

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Shift `labels` (batch, sequence) one place to the right, after the start token; -100 becomes padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                "decoder_start_token_id and pad_token_id must be set in the configuration to make decoder inputs from "
                f"labels; got {start} and {pad}"
            )
        moved = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
        return moved.masked_fill(moved == IGNORE_INDEX, pad)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        decoder_cu_seqlens: torch.Tensor | None = None,
        decoder_max_seqlen: int | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        return_logits: bool | None = None,
        **options: Unpack[ModelOptions],
    ) -> Seq2SeqLMOutput:
        """Return loss and logits; the other arguments are as in `FastformerEncoderDecoderModel.forward`.

        Args:
            labels: like decoder_input_ids: the token that each target token predicts, int64, -100 where nothing is
                predicted. If decoder_input_ids are not given, they are made from dense labels.
            return_logits: whether to return logits. None: only without labels, because the loss never holds all logits.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels.dim() != 2:
                raise ValueError("decoder_input_ids must be given with packed labels")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            decoder_position_ids,
            encoder_outputs,
            inputs_embeds,
            decoder_inputs_embeds,
            decoder_cu_seqlens,
            decoder_max_seqlen,
            cache,
            past_key_values,
            use_cache,
            return_dict=True,
            **options,
        )
        hidden, loss, logits = self.scaled(outputs.last_hidden_state), None, None
        if labels is not None:
            if labels.shape != hidden.shape[:-1]:
                raise ValueError(f"labels must have shape {tuple(hidden.shape[:-1])}; got {tuple(labels.shape)}")
            loss = projection_loss(self.lm_head, hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1))
        if labels is None if return_logits is None else return_logits:
            logits = self.lm_head(hidden)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )
