"""The configuration of a Fastformer Transformer."""

# No postponed annotations here: `strict` checks values against the types themselves, and skips types that are strings.
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Hugging Face's names of activations, and the operators'.
HIDDEN_ACTS = {
    "relu": "relu",
    "relu2": "squared_relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

# What Hugging Face's own tools write into a configuration and what has no bearing on the numbers.
_FOREIGN_FIELDS = ("auto_map", "quantization_config", "use_cache")


@strict
class FastformerConfig(PreTrainedConfig):
    """Configuration of `FastformerModel` and its heads; the defaults are BERT base's, except for attention dropout.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: features of each token; a multiple of `num_attention_heads`.
        num_hidden_layers: blocks.
        num_attention_heads: attention heads of each block.
        intermediate_size: features between the feed-forward network's two projections.
        hidden_act: relu, relu2, gelu, gelu_new, gelu_pytorch_tanh, silu or swish.
        hidden_dropout_prob: dropout of embeddings and of both outputs of each block, in training.
        attention_probs_dropout_prob: dropout of attention weights, in training. BERT's was 0.1; the default is 0.0
            because dropping attention weights costs the fast path on a CPU.
        classifier_dropout: dropout before a classification head; None for `hidden_dropout_prob`.
        max_position_embeddings: the longest sequence.
        type_vocab_size: kinds of segments (`token_type_ids`).
        layer_norm_eps: added to the variance in every norm.
        initializer_range: standard deviation of the initial weights.
        pad_token_id: the token whose embedding starts at zero and gets no gradient from the input; None for none.
        tie_word_embeddings: whether the masked-LM head's output projection is the word embedding.

    Raises:
        ValueError: a field is out of range, or unknown: nothing is kept without effect.
        StrictDataclassFieldValidationError: a field is of another type.
    """

    model_type = "fastformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["mlm_loss", "nsp_loss"]
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {"embeddings": "free_full_weight", "layers.*": "free_full_weight"}

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    classifier_dropout: float | int | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        known = {*(field.name for field in fields(self)), *_FOREIGN_FIELDS, *vars(type(self))}
        # The base class makes an attribute of any argument it does not know.
        unknown = sorted(name for name in kwargs.keys() & vars(self).keys() - known if not name.startswith("_"))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no field {', '.join(map(repr, unknown))}")
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Raise ValueError naming the first field that cannot be honoured."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size; got {self.num_attention_heads} heads for a hidden_size "
                f"of {self.hidden_size}"
            )
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(f"hidden_act must be one of {', '.join(HIDDEN_ACTS)}; got {self.hidden_act!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            probability = getattr(self, name)
            if probability is not None and not 0.0 <= probability < 1.0:
                raise ValueError(f"{name} must be in [0, 1); got {probability}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be in [0, vocab_size = {self.vocab_size}); got {self.pad_token_id}")
        if self.chunk_size_feed_forward or self.is_encoder_decoder or self.is_heterogeneous:
            raise ValueError("chunk_size_feed_forward, is_encoder_decoder and per_layer_config are not supported")
