"""LoRA by PEFT: small matrices beside a model's frozen ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastformer.training.blocks import blocks


@dataclass(frozen=True)
class Lora:
    """Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021): W x + alpha / rank · B A x.

    Args:
        rank: of the product B A.
        alpha: None for twice the rank.
        dropout: of x, in training.
        targets: names of the layers to adapt, whole or their last parts; None for every linear layer in the blocks.
        merge: add the products to the weights in the end, so that a whole model is saved; False: save the adapter
            alone, in PEFT's format.

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
        """The PEFT model; only its adapters and `new_layers`, which are not pretrained, are trained.

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


def linear_layers_in_blocks(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside a model's blocks."""
    prefixes = tuple(f"{name}." for name in blocks(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and f"{name}.".startswith(prefixes)
    ]
