"""Acceleration of the model that a transformers `Trainer` trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from fastformer.integrations.acceleration import Acceleration, accelerate


class AccelerateCallback(TrainerCallback):
    """Accelerates the Trainer's model as soon as there is one, before it is wrapped for many devices or compiled.

    The model stays accelerated after training; `fastformer.restore(model)` undoes it. What is saved is what would be
    saved without.

    Attributes:
        report: what was accelerated; None until there is a model.

    >>> trainer = Trainer(model, TrainingArguments("out"), callbacks=[fastformer.integrations.AccelerateCallback()])
    """

    def __init__(self) -> None:
        self.report: Acceleration | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Accelerate the model that the Trainer was given."""
        self._accelerate(kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Accelerate the model that `model_init` has made."""
        self._accelerate(kwargs.get("model"))

    def _accelerate(self, model: nn.Module | None) -> None:
        if model is not None:
            self.report = accelerate(model)
            logging.get_logger(__name__).info(str(self.report))
