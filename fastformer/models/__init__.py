"""The Transformer as Hugging Face models, registered with the Auto classes upon import."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion import config_from_bert, load_bert
from fastformer.models.heads import (
    FastformerForMaskedLM,
    FastformerForPreTraining,
    FastformerForPreTrainingOutput,
    FastformerForSequenceClassification,
)
from fastformer.models.modeling import FastformerModel, FastformerPreTrainedModel
from fastformer.models.presets import PRESETS, preset

AutoConfig.register(FastformerConfig.model_type, FastformerConfig)
AutoModel.register(FastformerConfig, FastformerModel)
AutoModelForPreTraining.register(FastformerConfig, FastformerForPreTraining)
AutoModelForMaskedLM.register(FastformerConfig, FastformerForMaskedLM)
AutoModelForSequenceClassification.register(FastformerConfig, FastformerForSequenceClassification)

__all__ = [
    "PRESETS",
    "FastformerConfig",
    "FastformerForMaskedLM",
    "FastformerForPreTraining",
    "FastformerForPreTrainingOutput",
    "FastformerForSequenceClassification",
    "FastformerModel",
    "FastformerPreTrainedModel",
    "config_from_bert",
    "load_bert",
    "preset",
]
