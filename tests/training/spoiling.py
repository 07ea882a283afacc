"""A callback that spoils losses, gradients or weights at given steps."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Spoil(Callback):
    """A callback that spoils the given steps, counted from 1.

    Kind nan or inf: the loss has this value. Kind gradient: one gradient is infinite, and the loss is as it is.

    Kind weights: after the steps, the weights are finite, but too large to compute with.
    """

    def __init__(self, kind: str, steps: list[int]) -> None:
        self.kind = kind
        self.steps = steps

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        losses = pl_module.batch_losses

        def spoilt(batch: Any) -> list[torch.Tensor]:
            found = list(losses(batch))
            if self.kind in ("nan", "inf") and trainer.global_step + 1 in self.steps:
                found[0] = found[0] * (math.nan if self.kind == "nan" else math.inf)
            return found

        pl_module.batch_losses = spoilt

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.kind == "gradient" and trainer.global_step + 1 in self.steps:
            next(weight for weight in pl_module.parameters() if weight.grad is not None).grad.fill_(math.inf)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.kind == "weights" and trainer.global_step in self.steps:
            for weight in pl_module.parameters():
                weight.data.fill_(1e30)
