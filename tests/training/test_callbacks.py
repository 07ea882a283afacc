"""Tests of the callbacks that all runs share."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from training.smallest import Module, fit

from fastformer.training.callbacks import SavePretrained, StepSeed, StopAtLimit
from fastformer.training.checkpoints import StepCheckpoint


class Disturbance(Callback):
    """A callback that draws random numbers between the steps."""

    def on_train_batch_end(self, *arguments: Any) -> None:
        random.random(), np.random.random(), torch.rand(3)


def test_what_a_step_draws_depends_on_seed_and_step_alone() -> None:
    plain, disturbed, other = Module(), Module(), Module()
    fit(plain, StepSeed(1), val_check_interval=2)
    fit(disturbed, StepSeed(1), Disturbance(), val_check_interval=1)
    fit(other, StepSeed(2))
    assert disturbed.drawn == plain.drawn
    drawn = [number for step in plain.drawn + other.drawn for number in step]
    assert len(set(drawn)) == len(drawn) == 24


def test_stops_after_an_optimizer_step_and_saves_there(tmp_path: Path) -> None:
    checkpoints = StepCheckpoint(tmp_path, every=100)
    trainer = fit(Module(), StopAtLimit(max_minutes=1e-9), checkpoints, accumulate_grad_batches=3)
    assert trainer.global_step == 1
    assert trainer.fit_loop.total_batch_idx == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001.ckpt"]


def test_saves_every_few_steps_and_at_the_last_and_keeps_the_newest(tmp_path: Path) -> None:
    checkpoints = StepCheckpoint(tmp_path, every=2, keep=3)
    trainer = fit(Module(), StopAtLimit(), checkpoints, max_steps=9)
    assert trainer.global_step == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000000{step}.ckpt" for step in (6, 8, 9)]


class _Unsavable(nn.Module):
    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        (Path(folder) / "half").write_text("")
        raise OSError(28, "No space left on device")


def test_a_model_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("whole")
    module = Module()
    module.model = _Unsavable()
    module.model.config = SimpleNamespace(max_position_embeddings=8)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.datamodule = SimpleNamespace(tokenizer=SimpleNamespace())
    with pytest.raises(OSError, match="No space left on device"):
        SavePretrained(folder).on_train_end(trainer, module)
    assert list(tmp_path.iterdir()) == [folder]
    assert [path.name for path in folder.iterdir()] == ["old"]
