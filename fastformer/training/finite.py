"""Losses and weights that are no numbers: noticed at the first step that has one, and never in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from fastformer.models.finite import first_not_finite
from fastformer.training.checkpoints import newest_checkpoint

_MOST_SKIPPED = 20
"""Steps in a row; then it is not the batches."""


class NotFiniteError(ValueError):
    """Training has met a loss or a weight that is infinite or no number."""


class FiniteLosses(Callback):
    """Ends training at the first optimizer step whose loss is infinite or no number, before the weights are touched.

    On an accelerator, which would have to be waited for at each step, that is noticed when the next step is logged,
    validated or saved; the error says of which step it was. Checkpoints have finite weights alone.

    Args:
        checkpoints: the run's, for the error.
        skip: leave such steps out instead, and those with such gradients. Waits for the accelerator at each step.
    """

    def __init__(self, checkpoints: Path, skip: bool = False) -> None:
        self.checkpoints = checkpoints
        self.skip = skip
        self.skipped = 0
        self._in_a_row = 0
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
            print(f"{_said(step, rate, loss.item())}: the step is left out", flush=True)

    def _error(self, step: int, rate: float, loss: float) -> NotFiniteError:
        return NotFiniteError(f"{_said(step, rate, loss)}; training ends, and {self._kept()}")

    def _kept(self) -> str:
        newest = newest_checkpoint(self.checkpoints)
        kept = "no checkpoint was written yet" if newest is None else f"the last good checkpoint is {newest}"
        return f"{kept}. Give a lower learning rate, or --skip_nonfinite to leave such steps out"

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
        name = first_not_finite_of(pl_module)
        if trainer.strategy.reduce_boolean_decision(name is not None, all=False):
            raise NotFiniteError(
                f"after step {trainer.global_step:,} the weights {name or 'on another device'} are not finite: they "
                f"are not saved, and {self._kept()}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]


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
