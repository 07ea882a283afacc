"""Detect losses and weights that are infinite or NaN at the first such step, and keep them out of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from fastformer.console import say
from fastformer.models.finite import first_not_finite
from fastformer.training.checkpoints import checkpoint_of, newest_checkpoint

_MOST_SKIPPED = 20
"""Most skipped steps in a row; with more, the batches are not the cause. At the end of a run, half as many."""
_HELD_OUT = ("val/loss", "val/mlm_loss")
_OR_SKIP = ", or --skip_nonfinite to skip such steps"


class NotFiniteError(ValueError):
    """A loss or a weight of training is infinite or NaN."""


class FiniteLosses(Callback):
    """End training at the first optimizer step whose loss is infinite or NaN, before the weights change.

    On an accelerator, a check at each step would wait for the device: there the loss is checked when a step is logged,
    validated or saved, and the error names the step. Checkpoints only have finite weights. A held-out loss that is not
    finite ends training as well, and the checkpoint of that step is removed, because the step has ruined the model.

    Args:
        checkpoints: the run's folder of checkpoints, for the error message.
        skip: skip such steps instead, and steps with such gradients. Waits for the accelerator at each step. A run
            still fails if most steps, or many at its end, were skipped.
    """

    def __init__(self, checkpoints: Path, skip: bool = False) -> None:
        self.checkpoints = checkpoints
        self.skip = skip
        self.skipped = 0
        self._in_a_row = 0
        self._rate: float | None = None  # learning rate of the last step
        self._first: torch.Tensor | None = None  # on an accelerator: step, rate, loss of the first bad step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.watch = self  # type: ignore[assignment]

    def see(self, module: Any, loss: torch.Tensor, rate: float) -> None:
        """Check the loss of the optimizer step that comes next.

        Args:
            module: the `TrainingModule`.
            loss: the loss over all processes.
            rate: the learning rate.

        Raises:
            NotFiniteError: the loss is not finite, and such steps are not skipped.
        """
        step = module.trainer.global_step + 1
        self._rate = rate
        if self.skip:
            self._skip_unless_finite(module, loss, rate, step)
        elif loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                raise self._error(step, rate, loss.item())
        else:
            found = torch.stack([torch.full_like(loss, step), torch.full_like(loss, rate), loss])
            seen = self._first
            self._first = found if seen is None else torch.where(seen[2].isfinite(), found, seen)

    def _skip_unless_finite(self, module: Any, loss: torch.Tensor, rate: float, step: int) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        bad = not math.isfinite(loss.item())
        if not bad and module.trainer.precision != "16-mixed":  # its scaler skips such gradients itself
            bad = first_not_finite({str(n): _local(each.grad) for n, each in enumerate(parameters)}) is not None
        if not module.trainer.strategy.reduce_boolean_decision(bad, all=False):
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > _MOST_SKIPPED:
            raise NotFiniteError(f"{_said(step, rate, loss.item())}, as in the {_MOST_SKIPPED} steps before it")
        for parameter in parameters:
            parameter.grad = None
        if module.trainer.is_global_zero:
            say(f"{_said(step, rate, loss.item())}: the step is skipped")

    def _error(self, step: int, rate: float, loss: float) -> NotFiniteError:
        return NotFiniteError(f"{_said(step, rate, loss)}; training ends, and {self._kept()}{_OR_SKIP}")

    def _kept(self) -> str:
        newest = newest_checkpoint(self.checkpoints)
        kept = "no checkpoint was written yet" if newest is None else f"the last good checkpoint is {newest}"
        return f"{kept}. Give a lower learning rate"

    def _check_skipped(self, steps: int) -> None:
        if 2 * self.skipped > steps or 2 * self._in_a_row > _MOST_SKIPPED:
            raise NotFiniteError(
                f"{self.skipped:,} of {steps:,} steps were skipped, {self._in_a_row:,} of them at the end: the model "
                f"is not saved, and {self._kept()}"
            )

    # --- Checks that may wait for the accelerator ---------------------------------------------------------------------

    def check(self) -> None:
        """Raise NotFiniteError if the loss of an earlier step was not finite."""
        if self._first is not None:
            step, rate, loss = self._first.tolist()
            if not math.isfinite(loss):
                raise self._error(int(step), rate, loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self.check()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check()
        self._check_weights(trainer, pl_module)

    def _check_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = first_not_finite_of(pl_module)
        if trainer.strategy.reduce_boolean_decision(name is not None, all=False):
            raise NotFiniteError(
                f"after step {trainer.global_step:,} the weights {name or 'on another device'} are not finite: they "
                f"are not saved, and {self._kept()}{_OR_SKIP}"
            )

    # --- Checks after validation and training -------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = (trainer.callback_metrics[name].item() for name in _HELD_OUT if name in trainer.callback_metrics)
        loss = next((loss for loss in found if not math.isfinite(loss)), None)
        if loss is None:
            return
        self._check_weights(trainer, pl_module)  # its error says more
        step = trainer.global_step
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            checkpoint_of(self.checkpoints, step).unlink(missing_ok=True)
        rate = "" if self._rate is None else f", at a learning rate of {self._rate:.3g}"
        raise NotFiniteError(
            f"the held-out loss after step {step:,} is {loss}{rate}; training ends, and {self._kept()}"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check()
        self._check_skipped(trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_skipped(trainer.global_step)  # resumed after the last step: there was nothing to train

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self._in_a_row = state_dict.get("in_a_row", 0)  # older checkpoints have none


def first_not_finite_of(module: torch.nn.Module) -> str | None:
    """Return the name of the first parameter with infinite or NaN elements in this process; None if all are finite."""
    return first_not_finite({name: _local(parameter.detach()) for name, parameter in module.named_parameters()})


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise NotFiniteError, naming the first tensor of weights that is not finite."""
    name = first_not_finite(tensors)
    if name is not None:
        raise NotFiniteError(f"the weights {name} are not finite: they are not saved")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _said(step: int, rate: float, loss: float) -> str:
    return f"the loss of step {step:,} is {loss}, at a learning rate of {rate:.3g}"
