"""Losses and weights that are no numbers: noticed at the first step that has one, and never in a checkpoint."""

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
"""Steps in a row; then it is not the batches. Half as many at the end of a run say the same."""
_HELD_OUT = ("val/loss", "val/mlm_loss")
_OR_SKIP = ", or --skip_nonfinite to leave such steps out"


class NotFiniteError(ValueError):
    """Training has met a loss or a weight that is infinite or no number."""


class FiniteLosses(Callback):
    """Ends training at the first optimizer step whose loss is infinite or no number, before the weights are touched.

    On an accelerator, which would have to be waited for at each step, that is noticed when the next step is logged,
    validated or saved; the error says of which step it was. Checkpoints have finite weights alone. A held-out loss that
    is not finite ends training as well, and the checkpoint of that step goes: the step has ruined the model.

    Args:
        checkpoints: the run's, for the error.
        skip: leave such steps out instead, and those with such gradients. Waits for the accelerator at each step. A run
            of which most steps, or many at its end, were left out has failed all the same.
    """

    def __init__(self, checkpoints: Path, skip: bool = False) -> None:
        self.checkpoints = checkpoints
        self.skip = skip
        self.skipped = 0
        self._in_a_row = 0
        self._rate: float | None = None  # of the last step
        self._first: torch.Tensor | None = None  # step, rate and loss of the first, on an accelerator

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.watch = self  # type: ignore[assignment]

    def see(self, module: Any, loss: torch.Tensor, rate: float) -> None:
        """Look at the loss of the optimizer step that is about to be taken.

        Args:
            module: the `TrainingModule`.
            loss: over all processes.
            rate: the learning rate.

        Raises:
            NotFiniteError: it is not, and is not to be skipped.
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
        if not bad and module.trainer.precision != "16-mixed":  # whose scaler skips by gradients itself
            bad = first_not_finite({str(n): _local(each.grad) for n, each in enumerate(parameters)}) is not None
        if not module.trainer.strategy.reduce_boolean_decision(bad, all=False):
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > _MOST_SKIPPED:
            raise NotFiniteError(f"{_said(step, rate, loss.item())}, as in {_MOST_SKIPPED} steps before it")
        for parameter in parameters:
            parameter.grad = None
        if module.trainer.is_global_zero:
            say(f"{_said(step, rate, loss.item())}: the step is left out")

    def _error(self, step: int, rate: float, loss: float) -> NotFiniteError:
        return NotFiniteError(f"{_said(step, rate, loss)}; training ends, and {self._kept()}{_OR_SKIP}")

    def _kept(self) -> str:
        newest = newest_checkpoint(self.checkpoints)
        kept = "no checkpoint was written yet" if newest is None else f"the last good checkpoint is {newest}"
        return f"{kept}. Give a lower learning rate"

    def _check_skipped(self, steps: int) -> None:
        if 2 * self.skipped > steps or 2 * self._in_a_row > _MOST_SKIPPED:
            raise NotFiniteError(
                f"{self.skipped:,} of {steps:,} steps were left out, {self._in_a_row:,} of them at the end: the model "
                f"is not saved, and {self._kept()}"
            )

    # --- Where an accelerator may be waited for -----------------------------------------------------------------------

    def check(self) -> None:
        """Raises NotFiniteError where a step has been seen whose loss was not."""
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

    # --- What came of it ----------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = (trainer.callback_metrics[name].item() for name in _HELD_OUT if name in trainer.callback_metrics)
        loss = next((loss for loss in found if not math.isfinite(loss)), None)
        if loss is None:
            return
        self._check_weights(trainer, pl_module)  # which would say more
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
    """The name of the first parameter of which this process has elements that are infinite or no numbers."""
    return first_not_finite({name: _local(parameter.detach()) for name, parameter in module.named_parameters()})


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises NotFiniteError for tensors of weights that are not, naming the first."""
    name = first_not_finite(tensors)
    if name is not None:
        raise NotFiniteError(f"the weights {name} are not finite: they are not saved")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _said(step: int, rate: float, loss: float) -> str:
    return f"the loss of step {step:,} is {loss}, at a learning rate of {rate:.3g}"
