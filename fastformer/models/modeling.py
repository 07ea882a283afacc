"""The Transformer's stack as a Hugging Face model. Tokens are packed inside it, from embedding to loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.generic import can_return_tuple
from typing_extensions import TypedDict

from fastformer.models.block import NORMS, Block
from fastformer.models.configuration import FastformerConfig
from fastformer.models.context import (
    AttentionContext,
    AttentionPattern,
    AttentionRecord,
    CachedContext,
    PackedContext,
)
from fastformer.models.inputs import TokenBatch, check_packing, check_position_limit, token_batch
from fastformer.models.patches import PatchEmbedding
from fastformer.models.pooling import Pooler, pooled_tokens
from fastformer.models.positions import AlibiSlopes, RelativeBias, rotary_embedding
from fastformer.models.selection import Selection
from fastformer.nn import DenseLayout, Packing, RotaryEmbedding, SinusoidalEmbedding, TransformerEmbedding

# transformers before 5.24 uses the name past_key_values for the cache of keys and values.
CACHE_FIELD = (
    "cache"
    if "cache" in {field.name for field in fields(BaseModelOutputWithPoolingAndCrossAttentions)}
    else "past_key_values"
)


Inputs = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""input_ids, attention_mask, token_type_ids, position_ids and inputs_embeds; see `FastformerModel.forward`."""


class ModelOptions(TypedDict, total=False):
    """The arguments that every model's forward takes besides its inputs; see `FastformerModel.forward`."""

    cu_seqlens: torch.Tensor | None
    max_seqlen: int | None
    output_hidden_states: bool | None
    output_attentions: bool | None


class FastformerPreTrainedModel(PreTrainedModel):
    """The base of all Fastformer models: configuration, initial weights, loading and saving.

    Attention always runs Fastformer's operator. Hugging Face's name for a model's own attention is "eager"; any other
    `attn_implementation` is refused with an error.
    """

    config: FastformerConfig
    config_class = FastformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # A batch's loss is its mean, so Trainer must not pass the number of labels of several batches.
    accepts_loss_kwargs = False
    _no_split_modules = ["TransformerEmbedding", "PatchEmbedding", "Block"]  # noqa: RUF012
    _stacks: tuple[str, ...] = ("encoder", "decoder")

    def __init__(self, config: FastformerConfig) -> None:
        config.validate_architecture()
        if config.stack not in self._stacks:
            accepted = " or ".join(map(repr, self._stacks))
            raise ValueError(f"{type(self).__name__} needs a configuration with stack={accepted}; got {config.stack!r}")
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as in Hugging Face's models.

        Raises:
            OSError: a weights file is damaged or cut short; the message names it.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            source = _damaged_file(pretrained_model_name_or_path) or pretrained_model_name_or_path
            raise OSError(f"the weights in {source} are damaged or cut short: {error}") from error

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (RotaryEmbedding, SinusoidalEmbedding, AlibiSlopes)):
            module.reset_parameters()
        elif isinstance(module, PatchEmbedding):
            init.normal_(module.image, std=self.config.initializer_range)
        elif isinstance(module, Block) and module.pre_norm:
            # Keep the residual stream's variance from growing with depth (Radford et al. 2019, section 2.3).
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            for projection in (module.attention.output, module.feed_forward.down):
                init.normal_(projection.weight, std=std)

    def _encode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        pooled_alone: bool = False,
    ) -> tuple[TokenBatch, torch.Tensor, BaseModelOutputWithPoolingAndCrossAttentions]:
        """Pack a head's inputs and run its model; return the packed batch, its last hidden states and all outputs.

        With `pooled_alone`, the last hidden states are only those of the tokens that the pooler uses.
        """
        tokens = self._pack(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen
        )
        pooled = pooled_tokens(tokens.packing, self.config.pooling) if pooled_alone else None
        selection = None if pooled is None else Selection.of(tokens.packing, pooled)
        outputs = self._run(tokens, selection, output_hidden_states, output_attentions)
        assert outputs.last_hidden_state is not None
        return tokens, outputs.last_hidden_state, outputs

    def _pack(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
    ) -> TokenBatch:
        return token_batch(
            input_ids,
            inputs_embeds,
            attention_mask,
            token_type_ids,
            position_ids,
            cu_seqlens,
            max_seqlen,
            self.config,
        )

    def _run(
        self,
        tokens: TokenBatch,
        output_tokens: Selection | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return self.model(
            tokens.input_ids,
            token_type_ids=tokens.token_type_ids,
            position_ids=tokens.position_ids,
            inputs_embeds=tokens.inputs_embeds,
            cu_seqlens=tokens.packing.cu_seqlens,
            max_seqlen=tokens.packing.max_seqlen,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_tokens=output_tokens,
            return_dict=True,
        )

    def _wants(self, name: str, asked: bool | None) -> bool:
        """Whether Hugging Face's optional output `name` is requested, by argument or configuration."""
        if asked not in (None, True, False):
            raise ValueError(f"{name} must be True, False or None; got {asked!r}")
        return bool(getattr(self.config, name) if asked is None else asked)


class FastformerModel(FastformerPreTrainedModel):
    """One stack, encoder or decoder: embeddings, blocks, final norm and, with `add_pooling_layer`, the pooler.

    Args:
        config: the configuration.
        add_pooling_layer: whether there is a pooler; None for one in encoders of text whose pooler has a dense layer.
        role: "encoder" or "decoder" of an encoder-decoder's configuration; such a decoder has cross-attention and
            shares the encoder's word embeddings.
    """

    _stacks = ("encoder", "decoder", "encoder_decoder")
    # The modules that FSDP2 shards and gathers as units, by Hugging Face's names. Embeddings may be tied to a head's
    # projection, so they belong to the whole model.
    _fsdp_plan = {"layers.*": "free_full_weight"}  # noqa: RUF012

    def __init__(
        self, config: FastformerConfig, add_pooling_layer: bool | None = None, role: str | None = None
    ) -> None:
        super().__init__(config)
        if (role is None) == (config.stack == "encoder_decoder"):
            raise ValueError(
                "FastformerModel is one stack; a configuration with stack='encoder_decoder' is for "
                "FastformerEncoderDecoderModel, which gives each of its two their role"
            )
        self.role = role or config.stack
        cross_attention = role == "decoder"
        layers = config.num_hidden_layers
        if cross_attention and config.num_decoder_layers is not None:
            layers = config.num_decoder_layers
        self.windows = config.windows(layers)
        self.embeddings = PatchEmbedding(config) if config.image_size else _embedding(config, not cross_attention)
        self.layers = nn.ModuleList(Block(config, layer, cross_attention) for layer in range(layers))
        self.norm = None
        if config.norm_placement == "pre":
            self.norm = NORMS[config.norm](config.hidden_size, eps=config.layer_norm_eps)
        self.rotary = rotary_embedding(config) if config.position_embedding == "rotary" else None
        self.alibi = AlibiSlopes(config.num_attention_heads) if config.position_embedding == "alibi" else None
        self.relative_bias = None
        if config.position_embedding == "relative":
            self.relative_bias = RelativeBias(config, bidirectional=self.role == "encoder")
        if add_pooling_layer is None:
            add_pooling_layer = config.stack == "encoder" and config.pooler_act != "none"
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.embeddings, self._input_name())

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.embeddings, self._input_name(), value)

    def _input_name(self) -> str:
        return "projection" if isinstance(self.embeddings, PatchEmbedding) else "word"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_cu_seqlens: torch.Tensor | None = None,
        encoder_max_seqlen: int | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_tokens: Selection | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Run a batch through the stack, given in one of two layouts.

        *Packed*, with `cu_seqlens`: sequences one after the other. Nothing waits for a GPU.

        *Dense*, without `cu_seqlens`: the batch is packed at the start and unpacked at the end, so that padding is
        never computed. With an attention_mask this reads the number of real tokens on the host, one synchronisation
        with a GPU. With a cache, tokens stay dense.

        Args:
            input_ids: (total_tokens,) or (batch, sequence), int64 or int32.
            attention_mask: (batch, sequence), dense only: non-zero for a token, zero for padding, anywhere; None for
                no padding. With a cache (batch, past + sequence).
            token_type_ids: like input_ids; None for zeros.
            position_ids: like input_ids; dense also (1, sequence). None for the position within the packed sequence, or
                the column of the dense batch, as in Hugging Face's BERT; with pad_positions=False the position among
                the real tokens, as in its RoBERTa.
            inputs_embeds: (total_tokens, hidden_size) or (batch, sequence, hidden_size), instead of input_ids.
            pixel_values: (batch, channels, height, width), instead of input_ids, for an image model.
            cu_seqlens: (batch + 1,) int32, the first token of each packed sequence and the total at the end.
            max_seqlen: the length of the longest packed sequence.
            encoder_hidden_states: the output of a decoder's encoder, (source_tokens, hidden_size) if the decoder's
                tokens are packed, otherwise (batch, source, hidden_size).
            encoder_attention_mask: (batch, source), with dense encoder_hidden_states.
            encoder_cu_seqlens, encoder_max_seqlen: boundaries and longest sequence of packed encoder_hidden_states.
            cache, past_key_values: a decoder's keys and values of earlier tokens, one of Hugging Face's caches, under
                its new or its old name; the new keys and values are added to it.
            use_cache: make such a cache and return it. For inference; default False.
            output_hidden_states: also return the embeddings and each block's output, the last normalised.
            output_attentions: also return each block's attention weights, and those for the encoder's output. They are
                computed again from the fused attention's log-sum-exp: before dropout, without gradient.
            output_tokens: for packed input, the tokens whose last hidden states are needed, including those that the
                pooler uses. last_hidden_state has only these, and if possible the last block computes only these.

        Returns:
            last_hidden_state (total_tokens, hidden_size), or (batch, sequence, hidden_size) with zeros at padding;
            pooler_output (batch, hidden_size), if there is a pooler; the cache, if there is one; hidden_states, if
            requested, in the same layout as last_hidden_state; attentions and cross_attentions, if requested, each
            (batch, heads, queries, keys) with zeros at padding, for packed sequences as long as the longest.

        Raises:
            TypeError, ValueError, IndexError: the message names the argument, what was given and what is accepted.
        """
        returns_hidden_states = self._wants("output_hidden_states", output_hidden_states)
        record = AttentionRecord() if self._wants("output_attentions", output_attentions) else None
        if output_tokens is not None and cu_seqlens is None:
            raise ValueError("output_tokens is for packed input; give cu_seqlens with it")
        cache = self._cache(cache if cache is not None else past_key_values, use_cache)
        context: AttentionContext
        source_layout = None
        if cache is not None:
            if cu_seqlens is not None or pixel_values is not None:
                raise ValueError("a cache is for dense input; got it together with cu_seqlens or pixel_values")
            tokens, context = self._continue(
                cache,
                input_ids,
                inputs_embeds,
                attention_mask,
                token_type_ids,
                position_ids,
                encoder_hidden_states,
                encoder_attention_mask,
                record,
            )
        else:
            if isinstance(self.embeddings, PatchEmbedding):
                tokens = self._patches(pixel_values, input_ids)
            elif pixel_values is not None:
                raise ValueError("pixel_values is for image models; this one's configuration has no image_size")
            else:
                tokens = token_batch(
                    input_ids,
                    inputs_embeds,
                    attention_mask,
                    token_type_ids,
                    position_ids,
                    cu_seqlens,
                    max_seqlen,
                    self.config,
                )
            encoded, source, source_layout = self._source(
                encoder_hidden_states, encoder_attention_mask, encoder_cu_seqlens, encoder_max_seqlen
            )
            context = PackedContext(tokens.packing, tokens.position_ids, encoded, source, record)
        hidden = self._embed(tokens)
        hidden_states = [hidden] if returns_hidden_states else None
        hidden = self.run(hidden, context, hidden_states, output_tokens)
        caches: dict[str, Any] = {CACHE_FIELD: cache}
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=tokens.restore(hidden),
            pooler_output=None if self.pooler is None else self.pooler(hidden, (output_tokens or tokens).packing),
            hidden_states=restored(tokens, hidden_states),
            attentions=None if record is None else restored_weights(tokens.layout, tokens.layout, record.own.values()),
            cross_attentions=restored_weights(tokens.layout, source_layout, record.source.values())
            if record is not None and record.source
            else None,
            **caches,
        )

    def run(
        self,
        hidden: torch.Tensor,
        context: AttentionContext,
        hidden_states: list[torch.Tensor] | None = None,
        output_tokens: Selection | None = None,
    ) -> torch.Tensor:
        """Run the blocks and the final norm on embedded tokens (tokens, hidden_size); returns the same shape.

        `hidden_states`, if given, gets each block's output, the last one normalised. With `output_tokens` only these
        are returned.
        """
        patterns, cross_pattern = self._patterns()
        for layer, pattern in zip(self.layers, patterns, strict=True):
            positions = None
            if output_tokens is not None and layer is self.layers[-1] and hidden_states is None:
                assert isinstance(context, PackedContext)
                if context.record is None and not pattern.knows_positions:
                    context = context._replace(queries=output_tokens.packing)
                    positions, output_tokens = output_tokens.positions, None
            hidden = layer(hidden, context, pattern, cross_pattern, positions)
            if hidden_states is not None:
                hidden_states.append(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
            if hidden_states is not None:
                hidden_states[-1] = hidden
        return hidden if output_tokens is None else hidden.index_select(0, output_tokens.positions)

    def _embed(self, tokens: TokenBatch) -> torch.Tensor:
        """Embed the tokens as (total_tokens, hidden_size)."""
        if isinstance(self.embeddings, PatchEmbedding):
            assert tokens.inputs_embeds is not None
            return tokens.inputs_embeds
        return self.embeddings(
            tokens.input_ids, tokens.token_type_ids, tokens.position_ids, inputs_embeds=tokens.inputs_embeds
        )

    def _patterns(self) -> tuple[list[AttentionPattern], AttentionPattern]:
        """The attention settings of each block, and those that all blocks use for the encoder's output."""
        causal = self.role == "decoder"
        plain = AttentionPattern(False, None, self.config.attention_scale, self.config.attention_probs_dropout_prob)
        own = plain._replace(
            causal=causal,
            rotary=None if self.rotary is None else (self.rotary.cos, self.rotary.sin),
            alibi_slopes=None if self.alibi is None else self.alibi(),
            relative_bias=None if self.relative_bias is None else self.relative_bias(),
        )
        windows = [None if size is None else (size - 1, None if causal else size - 1) for size in self.windows]
        return [own._replace(window=window) for window in windows], plain

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        if cache is None and not use_cache:
            return None
        if self.role != "decoder":
            raise ValueError("a cache (use_cache, cache) is for decoders; this model is an encoder")
        if self.training and torch.is_grad_enabled():
            raise ValueError("a cache (use_cache, cache) is for inference; this model is in training mode")
        if cache is not None:
            return cache
        if self.config.stack == "encoder_decoder":
            return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        return DynamicCache(config=self.config)

    def _continue(
        self,
        cache: Cache,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        encoded: torch.Tensor | None,
        source_mask: torch.Tensor | None,
        record: AttentionRecord | None,
    ) -> tuple[TokenBatch, CachedContext]:
        """Make a batch of new dense tokens, padding included, that follow those in `cache`."""
        past = cache.get_seq_length()
        given = input_ids if input_ids is not None else inputs_embeds
        if position_ids is None and given is not None:
            position_ids = (torch.arange(given.shape[1], device=given.device) + past).unsqueeze(0)
            if isinstance(past, int):
                check_position_limit(past + given.shape[1], self.config)
        tokens = token_batch(input_ids, inputs_embeds, None, token_type_ids, position_ids, None, None, self.config)
        assert tokens.layout is not None
        batch, sequence = tokens.layout.batch, tokens.layout.sequence
        if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.shape[0] != batch):
            raise ValueError(
                f"attention_mask must be (batch, past + sequence) with a cache; got {tuple(attention_mask.shape)}"
            )
        positions = tokens.position_ids.view(batch, sequence)
        return tokens, CachedContext(cache, batch, sequence, attention_mask, positions, encoded, source_mask, record)

    def _patches(self, pixel_values: torch.Tensor | None, input_ids: torch.Tensor | None) -> TokenBatch:
        assert isinstance(self.embeddings, PatchEmbedding)
        if pixel_values is None or input_ids is not None:
            raise ValueError("an image model takes pixel_values and no input_ids")
        embedded = self.embeddings(pixel_values)
        layout, packing = DenseLayout.from_mask(embedded.shape[0], embedded.shape[1], None, embedded.device)
        positions = torch.arange(embedded.shape[1], device=embedded.device).repeat(len(embedded))
        return TokenBatch(None, layout.pack(embedded), None, positions, packing, layout)

    def _source(
        self,
        encoded: torch.Tensor | None,
        mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
    ) -> tuple[torch.Tensor | None, Packing | None, DenseLayout | None]:
        """Return the encoder's output, packed, and the padded batch from which it was packed, if any."""
        if encoded is None:
            if self.layers and self.layers[0].cross_attention is not None:
                raise ValueError("encoder_hidden_states must be given to the decoder of an encoder-decoder; got None")
            return None, None, None
        if cu_seqlens is not None:
            return encoded, check_packing("encoder_", cu_seqlens, max_seqlen, encoded.shape[0]), None
        layout, packing = DenseLayout.from_mask(encoded.shape[0], encoded.shape[1], mask, encoded.device)
        return layout.pack(encoded), packing, layout


def restored(tokens: TokenBatch, hidden_states: Sequence[torch.Tensor] | None) -> tuple[torch.Tensor, ...] | None:
    """Bring a model's packed hidden states into the layout of the caller's batch."""
    return None if hidden_states is None else tuple(map(tokens.restore, hidden_states))


def restored_weights(
    queries: DenseLayout | None, keys: DenseLayout | None, weights: Iterable[torch.Tensor] | None
) -> tuple[torch.Tensor, ...] | None:
    """Bring packed tokens' attention weights, (batch, heads, queries, keys), to the columns of the caller's batch."""
    if weights is None:
        return None
    rows = [each if queries is None else queries.spread(each, 2) for each in weights]
    return tuple(each if keys is None else keys.spread(each, 3) for each in rows)


def _embedding(config: FastformerConfig, words: bool) -> TransformerEmbedding:
    sinusoidal = config.position_embedding == "sinusoidal"
    return TransformerEmbedding(
        config.vocab_size if words else 0,
        config.hidden_size,
        config.max_position_embeddings if sinusoidal or config.position_embedding == "learned" else 0,
        config.type_vocab_size,
        padding_idx=None if config.train_padding else config.pad_token_id,
        eps=config.layer_norm_eps,
        dropout=config.hidden_dropout_prob,
        norm=config.embedding_norm,
        scale=float(config.embedding_scale),
        sinusoidal=sinusoidal,
    )


def _damaged_file(folder: Any) -> Path | None:
    """Return the first safetensors file in `folder` that cannot be opened."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
    return None
