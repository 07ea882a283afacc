"""What `fastformer verify` verifies: a transformers model of a folder, the hub's cache or a class, and its input."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

TOKENS = 11
_PADDED = (11, 6, 8)
"""Tokens of each sequence of a padded batch."""

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "projection_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size_mlp", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "image_size": 12,
    "patch_size": 4,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Options of configurations that make a model small; those that a configuration has are taken."""


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, with eager attention, and what it was found as."""

    model: PreTrainedModel
    source: str

    @staticmethod
    def find(name: str, seed: int = 0) -> Subject:
        """The model of a folder, of a name on the hub that is in the local cache, or a small random one of a class.

        Raises:
            ValueError: `name` is none of these, or its class takes no eager attention.
        """
        torch.manual_seed(seed)
        model_class = getattr(transformers, name, None) if name.isidentifier() else None
        if inspect.isclass(model_class) and issubclass(model_class, PreTrainedModel) and model_class.config_class:
            model = _small_model(model_class)
            _spread_weights(model)
            if model.can_generate():
                model.generation_config.update(decoder_start_token_id=1, forced_eos_token_id=None)
            return Subject(model.eval(), "a small configuration, random weights")
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name!r} is no class of transformers' models, no folder with one and no model in the local cache of "
                f"the hub: {error}"
            ) from error
        architecture = (config.architectures or [""])[0]
        auto: Any = getattr(transformers, architecture, transformers.AutoModel)
        model = auto.from_pretrained(name, local_files_only=True, attn_implementation="eager", dtype=torch.float32)
        return Subject(model.eval(), "a folder" if Path(name).is_dir() else "the hub's cache")

    @property
    def reads_tokens(self) -> bool:
        return self.model.main_input_name == "input_ids"

    def batch(self, padding: str | None = None) -> dict[str, Tensor]:
        """Three inputs with labels where the model takes them; tokens may be padded "left" or "right".

        Raises:
            ValueError: the model reads something else than tokens, pixels or a spectrogram.
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
                f"{type(model).__name__} reads {model.main_input_name}, of which no input can be made here"
            )
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = self.tokens(3, TOKENS - 3)
        return {**batch, **self._labels(batch)}

    def tokens(self, *shape: int) -> Tensor:
        """Random words, none of them padding."""
        size = self.model.config.get_text_config().vocab_size
        return torch.randint(3, size, shape).where(torch.tensor(True), 3)

    @property
    def _padding(self) -> int:
        padding = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return 0 if padding is None else padding

    def _labels(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A label for all that the model gives logits of, if it takes labels: tokens that are attended, or inputs."""
        arguments = inspect.signature(self.model.forward).parameters
        if "labels" not in arguments:
            return {}
        with torch.no_grad():
            logits = getattr(self.model(**batch), "logits", None)
        if logits is None:
            return {}
        labels = self._classes(batch, logits)
        try:
            with torch.no_grad():
                self.model(**batch, labels=labels)
        except (RuntimeError, ValueError, IndexError, TypeError):  # its labels are of another kind
            return {}
        return {"labels": labels}

    def _classes(self, batch: dict[str, Tensor], logits: Tensor) -> Tensor:
        labels = torch.randint(min(3, logits.shape[-1] - 1), logits.shape[-1], logits.shape[:-1])
        if "attention_mask" not in batch or labels.shape != batch["input_ids"].shape:
            return labels
        # The token after padding is predicted from what has seen nothing.
        attended = batch["attention_mask"].bool()
        after = torch.nn.functional.pad(~attended, (1, -1))
        return labels.masked_fill(~attended | after, -100)


def _small_model(model_class: Any) -> PreTrainedModel:
    try:
        return model_class._from_config(_small(model_class.config_class), attn_implementation="eager")
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"no small {model_class.__name__} with eager attention could be made; save one to a folder and give that: "
            f"{error}"
        ) from error


def _pixels(config: Any) -> dict[str, Tensor]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(3, config.num_channels, height, width)}


def _small(config_class: type[PretrainedConfig], **options: Any) -> PretrainedConfig:
    default = config_class()
    if default.sub_configs:
        for name, kind in default.sub_configs.items():
            if getattr(default, name, None) is not None and kind is not AutoConfig:
                options[name] = _small(kind).to_dict()
    known = {name: value for name, value in _SMALL.items() if hasattr(default, name)}
    if getattr(default, "sliding_window", None) is None:
        known.pop("sliding_window", None)
    return config_class(**{**known, **options})


def _spread_weights(model: PreTrainedModel) -> None:
    """Give a new model weights with which attention is far from uniform, and norms and biases that do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(noise * 0.1)
