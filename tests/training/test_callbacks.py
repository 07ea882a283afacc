"""Tests of the callbacks of a run, with the smallest module that has what they need."""

import io
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pictures import lines, saved_figures
from torch import nn
from torch.utils.data import DataLoader

from fastformer.training.callbacks import (
    LossCurve,
    SavePretrained,
    StepSeed,
    StopAtLimit,
    Throughput,
    TrainingProgress,
)
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


class Disturbance(Callback):
    """A callback that draws random numbers between the steps."""

    def on_train_batch_end(self, *arguments: Any) -> None:
        random.random(), np.random.random(), torch.rand(3)


def fit(module: Module, *callbacks: Callback, batches: int = 6, **arguments: Any) -> Trainer:
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


def test_throughput_counts_tokens_and_leaves_validation_out() -> None:
    throughput = Throughput()
    begin = time.perf_counter()
    fit(Module(validation_seconds=0.05), throughput)  # 3 validations of 6 batches: 0.9 s
    elapsed = time.perf_counter() - begin
    assert throughput.tokens == 4 * TOKENS
    assert 0 < throughput.seconds < elapsed - 0.9
    assert throughput.tokens_per_second == throughput.tokens / throughput.seconds


def test_throughput_goes_on_from_its_state() -> None:
    throughput = Throughput()
    throughput.load_state_dict({"tokens": 100, "seconds": 50.0})
    fit(Module(), throughput)
    assert throughput.tokens == 100 + 4 * TOKENS
    assert 50 < throughput.state_dict()["seconds"] < 100


def test_loss_curve_keeps_what_was_measured_and_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = saved_figures(monkeypatch)
    curve = LossCurve(tmp_path / "loss.png", "mlm_loss")
    fit(Module(), curve)
    assert [step for step, _ in curve.training] == [1, 2, 3, 4]
    assert curve.validation == [{"step": step, "mlm_loss": step + 0.5} for step in (0, 2, 4)]
    assert lines(saved[-1].axes[0]) == {
        "training": curve.training,
        "held-out": [(point["step"], point["mlm_loss"]) for point in curve.validation],
    }
    resumed = LossCurve(tmp_path / "resumed.png", "mlm_loss")
    resumed.load_state_dict(curve.state_dict())
    resumed.draw()
    assert (tmp_path / "resumed.png").read_bytes() == (tmp_path / "loss.png").read_bytes()


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_three_steps(progress: TrainingProgress, monkeypatch: pytest.MonkeyPatch) -> None:
    """Show three of four steps of ten seconds, then a validation."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    metrics = {"train/loss": torch.tensor(2.5), "val/loss": torch.tensor(3.0)}
    trainer = SimpleNamespace(estimated_stepping_batches=4, global_step=0, callback_metrics=metrics)
    progress.on_train_start(trainer, None)
    for trainer.global_step in (1, 2, 3):
        now[0] += 10.0
        progress.on_train_batch_end(trainer, None, None, None, 0)
    progress.on_validation_end(trainer, None)
    progress.on_train_end(trainer, None)


STEPS = ["step 1/4  loss 2.500  0:30 left", "step 2/4  loss 2.500  0:20 left", "step 3/4  loss 2.500  0:10 left"]
VALIDATION = "step 3: held-out text: loss 3"


def test_progress_in_a_log_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_three_steps(TrainingProgress(seconds_between_lines=15.0), monkeypatch)
    assert capsys.readouterr().out.splitlines() == [STEPS[1], VALIDATION]


def test_progress_on_a_terminal_is_one_line_that_makes_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    show_three_steps(TrainingProgress(), monkeypatch)
    assert terminal.getvalue() == "".join(f"\r{line}\x1b[K" for line in (*STEPS, ""))
    assert capsys.readouterr().out.splitlines() == [VALIDATION]


def test_progress_of_a_resumed_run_counts_its_own_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    trainer = SimpleNamespace(estimated_stepping_batches=110, global_step=100, callback_metrics={})
    progress = TrainingProgress(seconds_between_lines=0.0)
    progress.on_train_start(trainer, None)
    trainer.global_step, now[0] = 102, 20.0
    progress.on_train_batch_end(trainer, None, None, None, 0)
    assert capsys.readouterr().out.endswith("1:20 left\n")  # 8 steps of 10 seconds


def test_progress_of_other_ranks_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress(seconds_between_lines=0.0)
    progress.disable()
    show_three_steps(progress, monkeypatch)
    assert capsys.readouterr().out == ""
