"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019).

transformers' RoBERTa recognises padding by its token, Fastformer by the attention mask. RoBERTa's classifier has
dropout before its dense layer; Fastformer's pooler does not have it, so it is left out.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import RobertaConfig

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.tensors import LaterRows, Table
from fastformer.models.heads.classification import (
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
)
from fastformer.models.heads.masked_lm import FastformerForMaskedLM, FastformerForPreTraining
from fastformer.models.heads.question_answering import FastformerForQuestionAnswering
from fastformer.models.modeling import FastformerModel

_FIELDS = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
        "type_vocab_size",
        "layer_norm_eps",
        "classifier_dropout",
    )
}
_WITHOUT_EFFECT = frozenset({"use_cache", "initializer_range"})
_ABSOLUTE = {"position_embedding_type": "absolute"}
_BUFFERS = (r".*embeddings\.(position_ids|token_type_ids)",)
# Names in files that were converted from TensorFlow.
_RENAMED = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}


def _tensors(config: FastformerConfig) -> Table:
    block = "encoder.layer.*."
    return {
        "embeddings.word": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.token_type": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "layers.*.attention.qkv": tuple(f"{block}attention.self.{part}" for part in ("query", "key", "value")),
        "layers.*.attention.output": f"{block}attention.output.dense",
        "layers.*.attention_norm": f"{block}attention.output.LayerNorm",
        "layers.*.feed_forward.up": f"{block}intermediate.dense",
        "layers.*.feed_forward.down": f"{block}output.dense",
        "layers.*.feed_forward_norm": f"{block}output.LayerNorm",
        "pooler.dense": "pooler.dense",
    }


# A base model may have been saved without its pooler.
_NO_POOLER = {"pooler.dense.weight": {"pooler_act": "none"}}

# If tied, the bias has both names; if untied, `cls.predictions.bias` is not used.
_UNTIED: Table = {"mlm_head.decoder.bias": "cls.predictions.decoder.bias"}
_MASKED_LM: Table = {
    "mlm_head.dense": "cls.predictions.transform.dense",
    "mlm_head.norm": "cls.predictions.transform.LayerNorm",
    "mlm_head.decoder.weight": "cls.predictions.decoder.weight",
    "mlm_head.decoder.bias": "cls.predictions.bias",
}

BERT = Architecture(
    config_class=transformers.BertConfig,
    fields=_FIELDS,
    without_effect=_WITHOUT_EFFECT,
    undeclared=_ABSOLUTE,
    tensors=_tensors,
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    buffers=(*_BUFFERS, r"cls\.predictions\.bias"),
    renamed=_RENAMED,
    heads=(
        Head(transformers.BertModel, FastformerModel, absent=_NO_POOLER),
        Head(
            transformers.BertForPreTraining,
            FastformerForPreTraining,
            {**_MASKED_LM, "nsp_head": "cls.seq_relationship"},
            prefix="bert.",
            untied=_UNTIED,
        ),
        Head(transformers.BertForMaskedLM, FastformerForMaskedLM, _MASKED_LM, prefix="bert.", untied=_UNTIED),
        Head(
            transformers.BertForSequenceClassification,
            FastformerForSequenceClassification,
            {"classifier.projection": "classifier"},
            prefix="bert.",
        ),
        Head(
            transformers.BertForTokenClassification,
            FastformerForTokenClassification,
            {"classifier.projection": "classifier"},
            prefix="bert.",
        ),
        Head(
            transformers.BertForQuestionAnswering,
            FastformerForQuestionAnswering,
            {"span": "qa_outputs"},
            prefix="bert.",
        ),
    ),
)


def _first_position(pad_token_id: int | None) -> int:
    """The first position in RoBERTa, which follows the padding token's number; padding itself has that number."""
    if pad_token_id is None:
        raise ValueError("pad_token_id must be a number in roberta, whose positions begin after it; got None")
    return pad_token_id + 1


def _roberta_tensors(config: FastformerConfig) -> Table:
    rows = LaterRows("embeddings.position_embeddings", _first_position(config.pad_token_id))
    return {**_tensors(config), "embeddings.position": rows}


def _read_roberta(config: RobertaConfig) -> dict[str, Any]:
    return {"max_position_embeddings": config.max_position_embeddings - _first_position(config.pad_token_id)}


def _write_roberta(config: FastformerConfig) -> dict[str, Any]:
    return {"max_position_embeddings": config.max_position_embeddings + _first_position(config.pad_token_id)}


_ROBERTA_MASKED_LM: Table = {
    "mlm_head.dense": "lm_head.dense",
    "mlm_head.norm": "lm_head.layer_norm",
    "mlm_head.decoder.weight": "lm_head.decoder.weight",
    "mlm_head.decoder.bias": "lm_head.bias",
}

ROBERTA = Architecture(
    config_class=transformers.RobertaConfig,
    implied={"pad_positions": False},
    fields={theirs: ours for theirs, ours in _FIELDS.items() if theirs != "max_position_embeddings"},
    read=_read_roberta,
    write=_write_roberta,
    translated=frozenset({"max_position_embeddings"}),
    without_effect=_WITHOUT_EFFECT,
    undeclared=_ABSOLUTE,
    tensors=_roberta_tensors,
    copies={"lm_head.decoder.bias": "lm_head.bias"},
    buffers=(*_BUFFERS, r"lm_head\.bias"),
    renamed=_RENAMED,
    heads=(
        Head(transformers.RobertaModel, FastformerModel, absent=_NO_POOLER),
        Head(
            transformers.RobertaForMaskedLM,
            FastformerForMaskedLM,
            _ROBERTA_MASKED_LM,
            prefix="roberta.",
            untied={"mlm_head.decoder.bias": "lm_head.decoder.bias"},
            implied={"hidden_act": "gelu"},  # the head's activation; the blocks may have another
        ),
        Head(
            transformers.RobertaForSequenceClassification,
            FastformerForSequenceClassification,
            {"model.pooler.dense": "classifier.dense", "classifier.projection": "classifier.out_proj"},
            prefix="roberta.",
        ),
        Head(
            transformers.RobertaForTokenClassification,
            FastformerForTokenClassification,
            {"classifier.projection": "classifier"},
            prefix="roberta.",
        ),
        Head(
            transformers.RobertaForQuestionAnswering,
            FastformerForQuestionAnswering,
            {"span": "qa_outputs"},
            prefix="roberta.",
        ),
    ),
)
