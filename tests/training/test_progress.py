"""What a run shows is right: throughput, the loss curve and the progress line."""

import io
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pictures import lines, saved_figures
from training.smallest import TOKENS, Module, fit

from fastformer.training.progress import LossCurve, Throughput, TrainingProgress


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
