"""The model that `fastformer verify` verifies, from a folder, the hub's cache or a class, and its input."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from fastformer.data.pretraining.tokenizer import check_tokenizer
from fastformer.integrations.acceleration.probing import ERRORS
from fastformer.integrations.verification.small_models import BEGIN, small_model
from fastformer.models.loading import load_configuration, load_model

TOKENS = 11
_PADDED = (11, 6, 8)
"""The numbers of tokens of the sequences of a padded batch."""


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode with eager attention, and a description of its origin."""

    model: PreTrainedModel
    source: str

    @staticmethod
    def find(name: str, seed: int = 0) -> Subject:
        """Load the model of a folder or of a hub name in the local cache, or make a small random one of a class.

        Raises:
            ValueError: `name` is none of these, its class takes no eager attention, or its tokenizer is damaged.
        """
        torch.manual_seed(seed)
        model_class = getattr(transformers, name, None) if name.isidentifier() else None
        if inspect.isclass(model_class) and issubclass(model_class, PreTrainedModel) and model_class.config_class:
            return Subject(_small_random(model_class, seed), "a small configuration, random weights")
        try:
            config = load_configuration(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name!r} is not a class of transformers' models, a folder with a model, or a model in the hub's "
                f"local cache: {error}"
            ) from error
        check_tokenizer(Path(name))
        architecture = (config.architectures or [""])[0]
        auto: Any = getattr(transformers, architecture, transformers.AutoModel)
        model, _ = load_model(
            auto, name, local_files_only=True, trust_remote_code=False, attn_implementation="eager", dtype=torch.float32
        )
        return Subject(model.eval(), "a folder" if Path(name).is_dir() else "the hub's cache")

    @property
    def reads_tokens(self) -> bool:
        return self.model.main_input_name == "input_ids"

    def batch(self, padding: str | None = None) -> dict[str, Tensor]:
        """Make three inputs, with labels if the model takes them; tokens may be padded "left" or "right".

        Raises:
            ValueError: the model reads something other than tokens, pixels or a spectrogram.
        """
        torch.manual_seed(1)
        model, config = self.model, self.model.config
        if self.reads_tokens:
            ids = self.tokens(3, TOKENS)
            batch = {"input_ids": ids}
            if padding is not None:
                position, lengths = torch.arange(TOKENS), torch.tensor(_PADDED)[:, None]
                mask = position >= TOKENS - lengths if padding == "left" else position < lengths
                batch = {"input_ids": ids.where(mask, self._padding), "attention_mask": mask.long()}
            if hasattr(config, "vision_config") and "pixel_values" in inspect.signature(model.forward).parameters:
                batch |= _pixels(config.vision_config)
        elif model.main_input_name == "pixel_values":
            batch = _pixels(config)
        elif model.main_input_name == "input_features":
            batch = {"input_features": torch.randn(3, config.num_mel_bins, 2 * config.max_source_positions)}
        else:
            raise ValueError(
                f"{type(model).__name__} reads {model.main_input_name}; no input of this kind can be made here"
            )
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = self.tokens(3, TOKENS - 3)
        return {**batch, **self._labels(batch)}

    def tokens(self, *shape: int) -> Tensor:
        """Draw random words, none of them padding."""
        ids = torch.randint(3, self.model.config.get_text_config().vocab_size, shape)
        return ids - (ids == self._padding).long()

    @property
    def _padding(self) -> int:
        padding = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return 0 if padding is None else padding

    def _labels(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make labels for all logits of attended tokens or of inputs, if the model takes labels."""
        if "labels" not in inspect.signature(self.model.forward).parameters:
            return {}
        given = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        try:
            with torch.no_grad():
                labels = self._classes(batch, self.model(**given).logits.shape)
                self.model(**given, labels=labels.to(self.model.device))
        except ERRORS:  # it has no logits, or its labels are of another kind
            return {}
        return {"labels": labels}

    def _classes(self, batch: dict[str, Tensor], logits: torch.Size) -> Tensor:
        labels = torch.randint(min(3, logits[-1] - 1), logits[-1], logits[:-1])
        if "attention_mask" not in batch or labels.shape != batch["input_ids"].shape:
            return labels
        # The token after padding is predicted from padding alone.
        attended = batch["attention_mask"].bool()
        after = torch.nn.functional.pad(~attended, (1, -1))
        return labels.masked_fill(~attended | after, -100)


def _small_random(model_class: Any, seed: int) -> PreTrainedModel:
    try:
        model = small_model(model_class, seed)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"no small {model_class.__name__} with eager attention could be made; save one to a folder and give that: "
            f"{error}"
        ) from error
    with torch.no_grad():
        # Weights of ones and biases of zeros would hide how they are used.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if model.can_generate():
        model.generation_config.update(decoder_start_token_id=BEGIN, forced_eos_token_id=None)
    return model


def _pixels(config: Any) -> dict[str, Tensor]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(3, config.num_channels, height, width)}
