"""Loading of a model that can write text."""

from __future__ import annotations

from pathlib import Path

import torch

from fastformer.generation.cached_model import LanguageModel
from fastformer.models import FastformerConfig, FastformerForCausalLM, FastformerForSeq2SeqLM
from fastformer.models.loading import load_configuration, load_whole_model


def load_language_model(folder: Path, device: torch.device, dtype: str = "auto") -> LanguageModel:
    """Load the model in a folder in Fastformer's format, in evaluation mode, on a device.

    Args:
        folder: the model's folder.
        device: where the model will work.
        dtype: the name of the weights' dtype; "auto" for the one they were saved in.

    Raises:
        ValueError, OSError: there is no such folder, or its model cannot write text, or it is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    config = load_configuration(folder)
    if not isinstance(config, FastformerConfig):
        raise ValueError(
            f"{folder} holds a {config.model_type} model in Hugging Face's format; convert it with `fastformer convert`"
        )
    if config.stack == "encoder":
        raise ValueError(f"{folder} holds an encoder, which cannot generate text")
    kind = FastformerForSeq2SeqLM if config.is_encoder_decoder else FastformerForCausalLM
    return load_whole_model(kind, folder, dtype=dtype).to(device).eval()
