"""Tests of early stopping: when it stops, which weights it leaves, and where a resumed run stops."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from fastformer.training.checkpoints import AtomicCheckpointIO, ValidationCheckpoint, latest_checkpoint
from fastformer.training.early_stopping import EarlyStopping

LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 2.0, 10: 2.5, 12: 2.0, 14: 1.0}
"""The held-out loss after each step with a validation.

Two validations in a row are no better than that of step 8.
"""


class Module(LightningModule):
    """A module whose weight is the number of steps taken."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return -self.weight

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", LOSSES.get(self.trainer.global_step, 9.0), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Halt(Callback):
    """A callback that ends a run after a step, before the validation of that step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


class Validated(Callback):
    """A callback that notes the steps after which a validation ran."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)


class Loader(DataLoader):
    """A loader that continues where the trainer is, as the loaders of our data modules do."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def fit(folder: Path, *callbacks: Callback) -> tuple[Module, Trainer]:
    module = Module()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=20,
        callbacks=[EarlyStopping(folder / "best.pt", "loss", "min", 2), ValidationCheckpoint(folder), *callbacks],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=2,
    )
    loader = Loader([torch.zeros(1)] * 100)
    with contextlib.suppress(SystemExit):  # Lightning raises it after an interrupt
        trainer.fit(module, loader, loader, ckpt_path=latest_checkpoint(folder))
    return module, trainer


def test_stops_after_two_validations_that_are_no_better_with_the_best_weights(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path)
    assert trainer.global_step == 12
    assert module.weight.item() == 8


@pytest.mark.parametrize("halt", [5, 6, 8, 9, 12])
def test_a_resumed_run_validates_and_stops_where_it_would_have(halt: int, tmp_path: Path) -> None:
    before, after = Validated(), Validated()
    fit(tmp_path, before, Halt(halt))
    module, trainer = fit(tmp_path, after)
    assert (trainer.global_step, module.weight.item()) == (12, 8)
    assert before.steps + after.steps == [2, 4, 6, 8, 10, 12]


def test_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    fit(tmp_path)
    module, trainer = fit(tmp_path)
    assert (trainer.global_step, module.weight.item()) == (12, 8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("step", "end", "best"), [(2, 12, 8), (8, 8, 4)])
def test_what_is_no_number_is_worse_than_any(
    step: int, end: int, best: int, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, step, value)
    module, trainer = fit(tmp_path)
    assert (trainer.global_step, module.weight.item()) == (end, best)


@pytest.mark.parametrize("damage", ["cut", "gone", "folder"])
def test_lost_weights_of_the_best_are_looked_for_anew(damage: str, tmp_path: Path) -> None:
    fit(tmp_path, Halt(9))
    best = tmp_path / "best.pt"
    content = best.read_bytes()
    best.unlink()
    if damage == "cut":
        best.write_bytes(content[:-9])
    elif damage == "folder":
        best.mkdir()
    with pytest.warns(UserWarning, match="best weights so far are lost"):
        module, trainer = fit(tmp_path)
    assert (trainer.global_step, module.weight.item()) == (18, 14)


def test_what_is_saved_is_never_between_optimizer_steps(tmp_path: Path) -> None:
    """No checkpoint lies between optimizer steps.

    Here a validation comes after three batches, and an optimizer step after two.
    """
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        callbacks=[ValidationCheckpoint(tmp_path, keep=9)],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=3,
        accumulate_grad_batches=2,
    )
    loader = Loader([torch.zeros(1)] * 100)
    trainer.fit(Module(), loader, loader)
    batches = {}
    for path in sorted(tmp_path.iterdir()):
        loops = AtomicCheckpointIO().load_checkpoint(path)["loops"]["fit_loop"]
        batches[path.stem] = loops["epoch_loop.batch_progress"]["total"]["ready"]
    assert batches == {f"step-{step:07d}": 2 * step for step in (2, 3, 5, 6)}


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    stopping = EarlyStopping(tmp_path / "best.pt", "accuracy", "max", 2)
    module, loader = Module(), DataLoader([torch.zeros(1)] * 4)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[stopping],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ValueError, match="no metric 'accuracy' to monitor; there are loss"):
        trainer.fit(module, loader, loader)
