"""DistilBERT (Sanh et al. 2019).

Dropout before the span of an answer (``qa_dropout``) is left out, since Fastformer's head does not have it.
"""

from __future__ import annotations

import transformers

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.tensors import Table
from fastformer.models.heads.classification import (
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
)
from fastformer.models.heads.masked_lm import FastformerForMaskedLM
from fastformer.models.heads.question_answering import FastformerForQuestionAnswering
from fastformer.models.modeling import FastformerModel


def _tensors(config: FastformerConfig) -> Table:
    block = "transformer.layer.*."
    return {
        "embeddings.word": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "layers.*.attention.qkv": tuple(f"{block}attention.{part}_lin" for part in "qkv"),
        "layers.*.attention.output": f"{block}attention.out_lin",
        "layers.*.attention_norm": f"{block}sa_layer_norm",
        "layers.*.feed_forward.up": f"{block}ffn.lin1",
        "layers.*.feed_forward.down": f"{block}ffn.lin2",
        "layers.*.feed_forward_norm": f"{block}output_layer_norm",
    }


DISTILBERT = Architecture(
    config_class=transformers.DistilBertConfig,
    implied={"type_vocab_size": 0, "pooler_act": "none"},
    fields={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "activation": "hidden_act",
    },
    # The table of sinusoidal positions is in the checkpoint, like a learned one.
    without_effect=frozenset({"initializer_range", "sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout"}),
    tensors=_tensors,
    buffers=(r".*embeddings\.position_ids",),
    heads=(
        Head(transformers.DistilBertModel, FastformerModel),
        Head(
            transformers.DistilBertForMaskedLM,
            FastformerForMaskedLM,
            {
                "mlm_head.dense": "vocab_transform",
                "mlm_head.norm": "vocab_layer_norm",
                "mlm_head.decoder": "vocab_projector",
            },
            prefix="distilbert.",
        ),
        Head(
            transformers.DistilBertForSequenceClassification,
            FastformerForSequenceClassification,
            {"model.pooler.dense": "pre_classifier", "classifier.projection": "classifier"},
            prefix="distilbert.",
            implied={"pooler_act": "relu"},
            fields={"seq_classif_dropout": "classifier_dropout"},
        ),
        Head(
            transformers.DistilBertForTokenClassification,
            FastformerForTokenClassification,
            {"classifier.projection": "classifier"},
            prefix="distilbert.",
        ),
        Head(
            transformers.DistilBertForQuestionAnswering,
            FastformerForQuestionAnswering,
            {"span": "qa_outputs"},
            prefix="distilbert.",
        ),
    ),
)
