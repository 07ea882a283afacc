"""Acceleration of the model that a transformers `Trainer` trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from fastformer.integrations.acceleration import Acceleration, accelerate


class AccelerateCallback(TrainerCallback):
    """A callback that accelerates the Trainer's model as soon as it exists, before it is wrapped or compiled.

    The model stays accelerated after training; `fastformer.restore(model)` undoes it. Saved files are the same as
    without acceleration.

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
        """Accelerate the model that `model_init` made."""
        self._accelerate(kwargs.get("model"))

    def _accelerate(self, model: nn.Module | None) -> None:
        if model is not None:
            self.report = accelerate(model)
            logging.get_logger(__name__).info(str(self.report))
