"""LoRA by PEFT: small trainable matrices added to a model's frozen ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastformer.models.loading import some_names
from fastformer.training.blocks import blocks


@dataclass(frozen=True)
class Lora:
    """Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021): W x + alpha / rank · B A x.

    Args:
        rank: rank of the product B A.
        alpha: factor of the product, before division by the rank; None for twice the rank.
        dropout: dropout of x in training.
        targets: names of the layers to adapt, full names or their last parts; None for every linear layer in the
            blocks.
        merge: add the products to the weights at the end, and save a complete model; False: save only the adapter, in
            PEFT's format.

    Raises:
        ValueError: an argument is out of range.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] | None = None
    merge: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be 1 or more; got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be above 0; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")

    def adapt(self, model: PreTrainedModel, new_layers: Collection[str]) -> Any:
        """Return the PEFT model. Only its adapters and `new_layers`, which are not pretrained, are trained.

        Raises:
            ValueError: there is nothing to adapt.
        """
        from peft import LoraConfig, get_peft_model

        targets = linear_layers_in_blocks(model) if self.targets is None else self.targets
        if not targets:
            raise ValueError(f"{type(model).__name__} has no linear layers in blocks; name the layers in targets")
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=sorted(new_layers) or None,
        )
        return get_peft_model(model, config)


def adapter_config(folder: str | Path) -> Any:
    """Return the PEFT configuration of the adapter in a folder.

    Raises:
        ValueError: the configuration is damaged, or does not name its base model.
    """
    from peft import PeftConfig

    file = Path(folder) / "adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f"{file} is not the configuration of an adapter: {type(error).__name__}: {error}") from error
    if not isinstance(config.base_model_name_or_path, str):
        raise ValueError(
            f"{file} must name the base model; base_model_name_or_path is {config.base_model_name_or_path!r}"
        )
    return config


def with_adapter(model: PreTrainedModel, config: Any, folder: str | Path) -> Any:
    """Return the model with the adapter in a folder merged into its weights.

    Raises:
        ValueError: the file of the adapter is missing or damaged, or does not hold exactly the weights that its
            configuration requires; the error names them.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    file = Path(folder) / "adapter_model.safetensors"
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or damaged: {error}") from error
    try:
        adapted: Any = get_peft_model(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: the adapter does not fit {config.base_model_name_or_path}: {error}") from error
    expected = get_peft_model_state_dict(adapted)
    for what, names in (("lacks", expected.keys() - found.keys()), ("has too many:", found.keys() - expected.keys())):
        if names:
            raise ValueError(f"{file} {what} {some_names(sorted(names))}, according to its adapter_config.json")
    for name, weight in expected.items():
        if found[name].shape != weight.shape:
            raise ValueError(
                f"{file}: {name} has the shape {tuple(found[name].shape)}, but must have {tuple(weight.shape)} "
                "according to its adapter_config.json"
            )
    set_peft_model_state_dict(adapted, found)
    return adapted.merge_and_unload()


def linear_layers_in_blocks(model: nn.Module) -> list[str]:
    """Return the full names of the linear layers inside a model's blocks."""
    prefixes = tuple(f"{name}." for name in blocks(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and f"{name}.".startswith(prefixes)
    ]
