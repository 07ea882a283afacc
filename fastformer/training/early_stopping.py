"""Early stopping of a run, which restores the weights of the best validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fastformer.training.checkpoints import check_checkpoint, save_checked
from fastformer.training.progress import validation_metrics
from fastformer.training.sharding import load_weights


class EarlyStopping(Callback):
    """Stop when the monitored metric no longer improves, and restore the weights of the best validation.

    (Lightning's own callback keeps no weights, and a stopped run that is resumed does not stay stopped.) The best
    weights are kept in a separate file. A resumed run repeats the validations after its checkpoint, and writes the file
    again if they are better. A value that is not finite is worse than any number. If the file is damaged, the search
    for the best starts again from there.

    Args:
        path: file for the best trainable weights.
        monitor: the metric, logged as ``val/MONITOR``.
        mode: whether the smallest ("min") or the largest ("max") value is best.
        patience: number of validations without improvement after which training stops.
        run: returns the id of this run, None if unknown; a file of another run counts as damaged.
    """

    def __init__(
        self,
        path: Path,
        monitor: str,
        mode: Literal["min", "max"],
        patience: int,
        run: Callable[[], str | None] = lambda: None,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be 1 or more; got {patience}")
        self.path = path
        self.monitor = monitor
        self.sign = 1.0 if mode == "min" else -1.0
        self.patience = patience
        self.run = run
        self.best: float | None = None
        self.step = 0
        self.waited = 0
        self._restored = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is not None:
            self._check_file()
        trainer.should_stop = self.waited >= self.patience  # a run that had stopped was resumed

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = validation_metrics(trainer)
        if self.monitor not in metrics:
            raise ValueError(f"there is no metric {self.monitor!r} to monitor; there are {', '.join(metrics)}")
        found = metrics[self.monitor]
        if math.isfinite(found) and (self.best is None or self.sign * found < self.sign * self.best):
            self.best, self.step, self.waited = found, trainer.global_step, 0
            self._save(trainer, pl_module)
        else:
            self.waited += 1
        if self.waited >= self.patience:
            trainer.should_stop = True

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            trained = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
            save_checked({"run": self.run(), "weights": {name: state[name] for name in trained}}, self.path)

    def _check_file(self) -> None:
        """Forget the best value if its weights are lost."""
        try:
            check_checkpoint(self.path)
            if (run := self.run()) is not None and self._content("meta").get("run") != run:
                raise ValueError(f"{self.path} belongs to another run")
        except (ValueError, OSError) as error:
            warnings.warn(f"the best weights so far are lost, and looked for again: {error}", stacklevel=2)
            self.best, self.waited = None, 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is not None and not self._restored:
            self._check_file()
        self._restore(trainer, pl_module)  # resumed after the last step: there was nothing to train

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is None or self._restored:
            return
        self._restored = True
        trainer.strategy.barrier()
        content = self._content(pl_module.device)
        load_weights(pl_module, content.get("weights", content))  # a file of an older run has only the weights

    def _content(self, device: torch.device | str) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        return content

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "step": self.step, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.step, self.waited = (state_dict[name] for name in ("best", "step", "waited"))
