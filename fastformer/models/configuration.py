"""The configuration of a Fastformer Transformer."""

# No postponed annotations here: `strict` checks values against types, and skips types that are strings.
import math
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Hugging Face's names of activations, and the operators' names.
HIDDEN_ACTS = {
    "relu": "relu",
    "relu2": "squared_relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

CHOICES = {
    "stack": ("encoder", "decoder", "encoder_decoder"),
    "position_embedding": ("learned", "sinusoidal", "rotary", "alibi", "relative", "none"),
    "norm": ("layer", "rms"),
    "norm_placement": ("post", "pre"),
    "hidden_act": tuple(HIDDEN_ACTS),
    "pooling": ("first", "last", "mean"),
    "pooler_act": ("tanh", "relu", "none"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")

# Fields that Hugging Face's own tools write into a configuration and that do not affect the numbers.
_FOREIGN_FIELDS = ("auto_map", "quantization_config", "use_cache", "rope_parameters", "_attn_implementation_internal")


@strict
class FastformerConfig(PreTrainedConfig):
    """Configuration of `FastformerModel` and its heads; the defaults are BERT base's, except for attention dropout.

    BERT, RoBERTa, DistilBERT, GPT-2, GPT-3, Llama, Qwen, Mistral, T5, BART, Marian and ViT are special cases of it; see
    `fastformer.models.preset` for published shapes.

    Args:
        stack: encoder, decoder or encoder_decoder.
        vocab_size: the number of tokens in the vocabulary.
        hidden_size: the number of features of each token.
        num_hidden_layers: the number of blocks of the stack; of an encoder-decoder, those of the encoder.
        num_decoder_layers: the number of blocks of an encoder-decoder's decoder; None for `num_hidden_layers`.
        num_attention_heads: the number of attention heads of each block.
        num_key_value_heads: the number of heads of keys and values, each shared by a group of query heads; None for one
            for each query head.
        head_dim: the number of features of a head; None for hidden_size / num_attention_heads.
        intermediate_size: the number of features between the feed-forward network's projections.
        hidden_act: relu, relu2, gelu, gelu_new, gelu_pytorch_tanh, silu or swish.
        gated: whether the feed-forward network is gated (GLU).
        position_embedding: learned, sinusoidal, rotary, alibi, relative (T5) or none.
        max_position_embeddings: the longest sequence with learned, sinusoidal and rotary positions.
        pad_positions: whether padding counts in default positions, as in BERT and GPT-2, or is skipped, as in RoBERTa.
        rope_parameters: settings of rotary positions, in Hugging Face's form: ``rope_theta``, ``rope_type`` (default,
            linear, llama3, yarn), the fields that the type needs, ``partial_rotary_factor``.
        relative_attention_num_buckets, relative_attention_max_distance: settings of relative positions.
        norm: layer or rms.
        norm_placement: post, after each residual (BERT), or pre, before each sublayer and once after the last block.
        layer_norm_eps: added to the variance in every norm.
        embedding_norm: whether embeddings are normalised.
        embedding_scale: multiplies word embeddings.
        qk_norm: whether each head's queries and keys get an RMSNorm (Qwen 3).
        attention_bias, attention_output_bias, feed_forward_bias: whether the projections of queries, keys and values,
            of attention's output and of the feed-forward network have biases.
        attention_scale: multiplies ``query @ key``; None for 1 / sqrt(head_dim).
        layer_types: full_attention or sliding_attention for each block, for instance alternating as in GPT-3; None for
            full attention, or for sliding in all blocks if `sliding_window` is set.
        sliding_window: the number of keys that a query of a sliding block sees, including its own. In a decoder they
            are the last ones; in an encoder they are this many less one on each side.
        hidden_dropout_prob: dropout of embeddings and of the sublayers' outputs, in training.
        attention_probs_dropout_prob: dropout of attention weights, in training. BERT's was 0.1. The default is 0.0,
            because dropping attention weights prevents the fast path on a CPU.
        activation_dropout: dropout inside the feed-forward network, in training.
        classifier_dropout: dropout before a classification head; None for `hidden_dropout_prob`.
        classifier_bias: whether a classification head's projection has a bias (GPT-2 and Llama: not for sequences).
        type_vocab_size: the number of segment types (`token_type_ids`); 0 for none.
        pooling: the vector that represents a sequence: the first token, the last token or the mean of all.
        pooler_act: tanh, relu or none, after the pooler's dense layer.
        initializer_range: standard deviation of the initial weights.
        pad_token_id: the padding token; None for none.
        train_padding: whether the padding token's embedding is like any other's (GPT-2, and T5, whose decoder starts
            with it), or starts at zero and gets no gradient from the input.
        tie_word_embeddings: whether the output projection shares the word embedding's weight.
        lm_head_bias: whether the output projection of causal and sequence-to-sequence models has a bias.
        logit_scale: multiplies the hidden states before the output projection (1 / sqrt(hidden_size) in T5).
        image_size, patch_size, num_channels: sizes of a Vision Transformer, whose tokens are patches of an image.

    Raises:
        ValueError: a field is out of range, or unknown: no field is kept without effect.
        StrictDataclassFieldValidationError: a field has the wrong type.
    """

    model_type = "fastformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["mlm_loss", "nsp_loss", "cache", "past_key_values"]
    # FastformerModel defines the FSDP units; an encoder-decoder has two such models.
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    stack: str = "encoder"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_decoder_layers: int | None = None
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    gated: bool = False
    position_embedding: str = "learned"
    max_position_embeddings: int = 512
    pad_positions: bool = True
    rope_parameters: dict[str, Any] | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    norm: str = "layer"
    norm_placement: str = "post"
    layer_norm_eps: float = 1e-12
    embedding_norm: bool = True
    embedding_scale: float | int = 1.0
    qk_norm: bool = False
    attention_bias: bool = True
    attention_output_bias: bool = True
    feed_forward_bias: bool = True
    attention_scale: float | int | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    activation_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    classifier_bias: bool = True
    type_vocab_size: int = 2
    pooling: str = "first"
    pooler_act: str = "tanh"
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    train_padding: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    logit_scale: float | int = 1.0
    image_size: int | None = None
    patch_size: int | None = None
    num_channels: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.is_encoder_decoder = self.stack == "encoder_decoder"
        super().__post_init__(**kwargs)
        if self.position_embedding != "rotary":
            self.rope_parameters = None  # the base class fills in its default
        known = {*(field.name for field in fields(self)), *_FOREIGN_FIELDS, *vars(type(self))}
        # The base class would make an attribute of any unknown argument.
        unknown = sorted(name for name in kwargs.keys() & vars(self).keys() - known if not name.startswith("_"))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no field {', '.join(map(repr, unknown))}")
        self.validate_architecture()

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Hugging Face's hook, from which caches take the number of blocks; a decoder's number is its own."""
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        if decoder and self.num_decoder_layers is not None:
            config.num_hidden_layers = self.num_decoder_layers  # of a copy
        return config

    @property
    def size_per_head(self) -> int:
        """The number of features of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """The number of heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def position_limit(self) -> int | None:
        """The longest sequence, or None if positions have no limit."""
        return self.max_position_embeddings if self.position_embedding in ("learned", "sinusoidal", "rotary") else None

    def windows(self, layers: int) -> list[int | None]:
        """Return the sliding window of each of `layers` blocks, None for full attention."""
        types = self.layer_types or ["sliding_attention" if self.sliding_window else "full_attention"] * layers
        return [self.sliding_window if kind == "sliding_attention" else None for kind in types]

    def validate_architecture(self) -> None:
        """Raise ValueError with the name of the first unsupported field."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        self._check_sizes()
        self._check_attention()
        self._check_probabilities()
        self._check_numbers()
        self._check_numbers()
        self._check_image()
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be in [0, vocab_size = {self.vocab_size}); got {self.pad_token_id}")
        if self.chunk_size_feed_forward or self.is_heterogeneous:
            raise ValueError("chunk_size_feed_forward and per_layer_config are not supported")
        if self.is_encoder_decoder != (self.stack == "encoder_decoder"):
            raise ValueError(f"is_encoder_decoder follows from stack, {self.stack!r}; got {self.is_encoder_decoder}")

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_decoder_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
            "sliding_window",
            "image_size",
            "patch_size",
            "num_channels",
        ):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be 1 or more; got {size}")
        if self.type_vocab_size < 0:
            raise ValueError(f"type_vocab_size must be 0 or more; got {self.type_vocab_size}")
        if self.num_decoder_layers is not None and self.stack != "encoder_decoder":
            raise ValueError(f"num_decoder_layers is for stack='encoder_decoder'; got stack={self.stack!r}")

    def _check_attention(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size; got {self.num_attention_heads} heads for a hidden_size "
                f"of {self.hidden_size}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads; got {self.kv_heads} and "
                f"{self.num_attention_heads}"
            )
        if self.layer_types is None:
            return
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types must hold {' and '.join(LAYER_TYPES)}; got {', '.join(map(repr, unknown))}")
        for layers in {self.num_hidden_layers, self.num_decoder_layers or self.num_hidden_layers}:
            if len(self.layer_types) != layers:
                raise ValueError(f"layer_types must name {layers} blocks; got {len(self.layer_types)}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("sliding_window must be set where layer_types has sliding_attention; got None")

    def _check_probabilities(self) -> None:
        for name in (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "activation_dropout",
            "classifier_dropout",
        ):
            probability = getattr(self, name)
            if probability is not None and not 0.0 <= probability < 1.0:
                raise ValueError(f"{name} must be in [0, 1); got {probability}")

    def _check_numbers(self) -> None:
        for name in ("layer_norm_eps", "initializer_range"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, and finite; got {getattr(self, name)}")
        for name in ("embedding_scale", "attention_scale", "logit_scale"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"{name} must be finite; got {getattr(self, name)}")

    def _check_image(self) -> None:
        given = {name: getattr(self, name) for name in ("image_size", "patch_size", "num_channels")}
        if not any(given.values()):
            return
        if self.image_size is None or self.patch_size is None or self.num_channels is None:
            raise ValueError(f"image_size, patch_size and num_channels go together; got {given}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size; got {self.patch_size} and {self.image_size}")
        if self.stack != "encoder":
            raise ValueError(f"images need stack='encoder'; got {self.stack!r}")
