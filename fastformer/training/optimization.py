"""The optimizer of all objectives: AdamW without decay on biases and norms, learning rates by layer, a warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fastformer.training.blocks import blocks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

Schedule = Literal["linear", "cosine"]

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Optimization:
    """AdamW and its schedule.

    Args:
        learning_rate: the peak, reached at the end of the warm-up. None: 0.384 / hidden size for new weights and for
            adapters (3e-3 for bert-tiny, 5e-4 for bert-base), and a tenth of that for pretrained weights. Adam needs a
            rate proportional to 1 / width (Yang et al. 2022, https://arxiv.org/abs/2203.03466).
        weight_decay: AdamW's weight decay, for matrices only: biases and the weights of norms are not decayed.
        betas: AdamW's decay rates of the first and the second moment.
        eps: AdamW's addend to the root of the second moment.
        warmup_steps: 1 or more: optimizer steps; below 1: share of all optimizer steps.
        schedule: the form of the decay of the learning rate, which reaches zero at the last step.
        layer_decay: factor on the learning rate for each block further from the output; 1 for one rate.

    Raises:
        ValueError: an argument is out of range.
    """

    learning_rate: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup_steps: float = 0.1
    schedule: Schedule = "linear"
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0; got {value}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0; got {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1); got {self.betas}")
        if self.warmup_steps < 0 or (self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps)):
            raise ValueError(
                f"warmup_steps must be a whole number of steps or a share below 1; got {self.warmup_steps}"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1]; got {self.layer_decay}")

    def for_width(self, hidden_size: int, pretrained: bool = False) -> Optimization:
        """Return these settings with a learning rate: the given one, or one that suits a model of this width."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=(0.0384 if pretrained else 0.384) / hidden_size)

    def configure(self, module: LightningModule) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its schedule, for `LightningModule.configure_optimizers`.

        Raises:
            ValueError: there is no learning rate, the run has no last step, or the warm-up is as long as the run.
        """
        if self.learning_rate is None:
            raise ValueError("learning_rate must be a number to train with; `for_width` gives one that suits a model")
        trainer = module.trainer
        total_steps = trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ValueError(
                "the learning rate falls to zero at the last step: give max_steps or max_epochs (--epochs)"
            )
        warmup = int(self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * total_steps)
        optimizer = adamw(
            module,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=self.betas,
            eps=self.eps,
            allow_fused=trainer.precision != "16-mixed",
            layer_decay=self.layer_decay,
        )
        if trainer.precision == "bf16-mixed":
            # Lightning refuses to clip gradients that a fused step would unscale later; bfloat16 has no scaler.
            optimizer._step_supports_amp_scaling = False
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, warmup_and_decay(warmup, int(total_steps), self.schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def adamw(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    allow_fused: bool = True,
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """Return AdamW over the parameters of `module` that require gradients, fused if the device supports it.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).

    Args:
        weight_decay: applied to matrices only; vectors (biases and the weights of norms) are not decayed.
        allow_fused: False for float16 with a gradient scaler: a fused step would unscale the gradients itself, after
            they have been clipped.
        layer_decay: the learning rate of a parameter is ``learning_rate * layer_decay ** distance``, with the distance
            of `distances_from_output`.
    """
    distances = distances_from_output(module)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            distance = 0 if layer_decay == 1.0 else distances[name]
            members.setdefault((distance, parameter.ndim < 2), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": members[distance, is_vector],
            "weight_decay": 0.0 if is_vector else weight_decay,
            "lr": learning_rate * layer_decay**distance,
        }
        for distance, is_vector in sorted(members)
    ]
    fused = allow_fused and all(parameter.device.type in _FUSED_DEVICES for parameter in module.parameters())
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)


def distances_from_output(module: nn.Module) -> dict[str, int]:
    """Return the distance of each parameter from the output in blocks, for layer-wise learning rates.

    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (2018), section 3.2. The last of
    `blocks` has distance 1. Parameters registered before the first block (embeddings) are one further than that block;
    parameters after a block (a norm, a pooler, a head) are one nearer than it.
    """
    prefixes = [f"{name}." for name in blocks(module)]
    distances: dict[str, int] = {}
    nearest = len(prefixes) + 1
    for name, _ in module.named_parameters():
        block = next((number for number, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if block is not None:
            nearest = len(prefixes) - block - 1
        distances[name] = nearest if block is None else nearest + 1
    return distances


def warmup_and_decay(warmup_steps: int, total_steps: int, schedule: Schedule) -> Callable[[int], float]:
    """Return a function that gives the factor on the peak learning rate at each optimizer step, counted from 0.

    It rises linearly to 1 over `warmup_steps`, and falls to 0 at `total_steps`, linearly or along half a cosine.

    Raises:
        ValueError: the warm-up is as long as the run, or longer.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be at least 0 and below the run's {total_steps} steps; got {warmup_steps}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        remaining = max(0.0, (total_steps - step) / (total_steps - warmup_steps))
        return remaining if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * remaining))

    return factor
