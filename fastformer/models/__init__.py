"""The Transformer as Hugging Face models. Importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion import from_hugging_face, to_hugging_face
from fastformer.models.heads.causal_lm import FastformerForCausalLM
from fastformer.models.heads.classification import (
    FastformerForImageClassification,
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
)
from fastformer.models.heads.embedding import FastformerForEmbedding, FastformerForEmbeddingOutput
from fastformer.models.heads.masked_lm import (
    FastformerForMaskedLM,
    FastformerForPreTraining,
    FastformerForPreTrainingOutput,
)
from fastformer.models.heads.question_answering import FastformerForQuestionAnswering
from fastformer.models.heads.sequence_to_sequence import FastformerEncoderDecoderModel, FastformerForSeq2SeqLM
from fastformer.models.modeling import FastformerModel, FastformerPreTrainedModel
from fastformer.models.presets import PRESETS, preset

AutoConfig.register(FastformerConfig.model_type, FastformerConfig)
# If several classes are registered, the Auto class takes the one named in the configuration's `architectures`.
AutoModel.register(FastformerConfig, (FastformerModel, FastformerEncoderDecoderModel))
AutoModelForPreTraining.register(FastformerConfig, FastformerForPreTraining)
AutoModelForMaskedLM.register(FastformerConfig, FastformerForMaskedLM)
AutoModelForCausalLM.register(FastformerConfig, FastformerForCausalLM)
AutoModelForSeq2SeqLM.register(FastformerConfig, FastformerForSeq2SeqLM)
AutoModelForSequenceClassification.register(FastformerConfig, FastformerForSequenceClassification)
AutoModelForTokenClassification.register(FastformerConfig, FastformerForTokenClassification)
AutoModelForQuestionAnswering.register(FastformerConfig, FastformerForQuestionAnswering)
AutoModelForImageClassification.register(FastformerConfig, FastformerForImageClassification)
AutoModelForTextEncoding.register(FastformerConfig, FastformerForEmbedding)

__all__ = [
    "PRESETS",
    "FastformerConfig",
    "FastformerEncoderDecoderModel",
    "FastformerForCausalLM",
    "FastformerForEmbedding",
    "FastformerForEmbeddingOutput",
    "FastformerForImageClassification",
    "FastformerForMaskedLM",
    "FastformerForPreTraining",
    "FastformerForPreTrainingOutput",
    "FastformerForQuestionAnswering",
    "FastformerForSeq2SeqLM",
    "FastformerForSequenceClassification",
    "FastformerForTokenClassification",
    "FastformerModel",
    "FastformerPreTrainedModel",
    "from_hugging_face",
    "preset",
    "to_hugging_face",
]
