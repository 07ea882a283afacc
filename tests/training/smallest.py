"""The smallest module that has what callbacks need, and a short run of it."""

import random
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from fastformer.training.checkpoints import StepCheckpoint

TOKENS = 5


class Module(LightningModule):
    """A module that remembers what each training step draws, and sleeps in validation."""

    def __init__(self, validation_seconds: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.validation_seconds = validation_seconds
        self.drawn: list[tuple[float, float, float]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.drawn.append((random.random(), np.random.random(), torch.rand(()).item()))
        loss = self.layer(batch["input_ids"][:, None].float()).square().mean()
        self.log("train/mlm_loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        time.sleep(self.validation_seconds)
        self.log("val/mlm_loss", self.trainer.global_step + 0.5, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module: Module, *callbacks: Callback, batches: int = 6, **arguments: Any) -> Trainer:
    """Train a module for a few steps with these callbacks, and return the trainer."""
    loader = DataLoader([{"input_ids": torch.arange(TOKENS)} for _ in range(batches)], batch_size=None)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(callback, StepCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        **{"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": -1, "log_every_n_steps": 1, **arguments},
    )
    trainer.fit(module, loader, loader)
    return trainer
