"""A signal ends a run with a checkpoint and the command that resumes it.

The resumed run ends as one left alone would.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.processes import start
from training.tasks import command, scratch

from fastformer import cli
from fastformer.stopping import Stopped, stopping_at_signals
from fastformer.training.interruption import StopOnSignal

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


def sends(number: int, hook: str, step: int = 0) -> list[str]:
    return callbacks(send(number, hook, step))


def send(number: int, hook: str, step: int) -> dict[str, Any]:
    return {"class_path": "training.killing.Send", "init_args": {"number": number, "hook": hook, "step": step}}


def callbacks(*each: dict[str, Any]) -> list[str]:
    return ["--trainer.callbacks", json.dumps(each)]


@pytest.fixture(params=["pretrain", "classify"])
def options(request: pytest.FixtureRequest, tiny_run: list[str], data: Path) -> list[str]:
    """Return the options of a run of nine steps, validated after each fourth step.

    The fine-tuning run also checks whether to stop early.
    """
    if request.param == "pretrain":
        return [*tiny_run, "--max_steps", "9", "--evaluate_every", "4", "--accumulate", "2"]
    run = command("classify", data, Path("absent"))
    more = ["--epochs", "9", "--max_steps", "9", "--evaluate_every", "4", "--patience", "5", "--accumulate", "2"]
    return [*run, *scratch(), *more]


def resumed(message: str) -> list[str]:
    """Return the arguments of the command that a message names."""
    return message.split("Continue with: fastformer ")[1].split()


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model/model.safetensors")


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_ends_a_run_that_resumes_to_identical_weights(
    number: int, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main([*options, "--output", str(tmp_path / "whole")]) == 0
    stopped = tmp_path / "stop ped" if number == signal.SIGINT else tmp_path / "stopped"
    capsys.readouterr()
    assert cli.main([*options, "--output", str(stopped), *sends(number, "on_train_batch_start", 5)]) == STATUS[number]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"stopped by {signal.Signals(number).name}; step-0000006.ckpt is saved. Continue with: fastformer " in line
    assert not (stopped / "model").exists()
    again = [*resumed(line)[: 2 if options[0] == "finetune" else 1], "--resume", "--output", str(stopped)]
    assert line.endswith(f"--resume --output {str(stopped) if number != signal.SIGINT else repr(str(stopped))}")
    assert cli.main([*again, "--trainer.callbacks", "null"]) == 0
    found, expected = weights(stopped), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    found, expected = (json.loads((run / "metrics.json").read_text()) for run in (stopped, tmp_path / "whole"))
    assert all(found[name] == expected[name] for name in ("start", "end", "steps", "tokens"))


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [("on_train_batch_end", 4, 4), ("on_validation_batch_start", 4, 4), ("on_validation_start", 8, 8)],
)
def test_a_validation_that_is_due_is_made_first(
    hook: str, step: int, saved: int, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main([*options, "--output", str(tmp_path / "run"), *sends(signal.SIGTERM, hook, step)]) == 143
    shown = capsys.readouterr()
    assert f"step-{saved:07d}.ckpt is saved" in shown.err
    assert f"step {saved}: held-out" in shown.out
    content = torch.load(tmp_path / f"run/checkpoints/step-{saved:07d}.ckpt", weights_only=True)
    assert content["callbacks"]["LossCurve"]["validation"][-1]["step"] == saved


@pytest.mark.parametrize("hook", ["setup", "on_sanity_check_start", "on_validation_start"])
def test_before_the_first_step_there_is_nothing_to_save(
    hook: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main([*options, "--output", str(tmp_path / "run"), *sends(signal.SIGINT, hook)]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("stopped by SIGINT: nothing was saved yet")
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_second_signal_does_not_wait(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    twice = callbacks(*(send(signal.SIGINT, hook, 5) for hook in ("on_train_batch_start", "on_before_optimizer_step")))
    assert cli.main([*options, "--output", str(tmp_path / "run"), *twice]) == 130
    assert "step-0000004.ckpt is saved" in capsys.readouterr().err


def test_after_the_last_step_all_is_saved(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "run"
    assert cli.main([*options, "--output", str(output), *sends(signal.SIGTERM, "on_train_batch_end", 9)]) == 143
    assert "step-0000009.ckpt is saved" in capsys.readouterr().err
    resume = [*options[: 2 if options[0] == "finetune" else 1], "--resume", "--output", str(output)]
    assert cli.main([*resume, "--trainer.callbacks", "null"]) == 0
    assert json.loads((output / "metrics.json").read_text())["steps"] == 9


def test_processes_that_prepare_batches_survive_the_signal(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Processes that prepare batches survive Ctrl-C, which reaches all processes of a terminal."""
    workers = ["--num_workers", "2", "--max_steps", "400", "--evaluate_every", "400", "--accumulate", "4"]
    (process,) = start([*tiny_run, *workers, "--output", str(tmp_path / "run")], group=True)
    wait_for(tmp_path / "run/config.yaml")
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert len(list((tmp_path / "run/checkpoints").glob("*.ckpt"))) == 1


def test_processes_that_train_together_stop_together(tiny_run: list[str], tmp_path: Path) -> None:
    options = [*tiny_run, "--max_steps", "4000", "--evaluate_every", "4000", "--strategy", "ddp", "--devices", "2"]
    processes = start([*options, "--output", str(tmp_path / "run")], ranks=2)
    wait_for(tmp_path / "run/config.yaml")
    time.sleep(1.0)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143]
    assert len(list((tmp_path / "run/checkpoints").glob("*.ckpt"))) == 1


def test_a_signal_where_nothing_is_trained_and_in_a_forked_process() -> None:
    with StopOnSignal():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_interrupt_of_any_command_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(module: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main([name]) == 130
    assert capsys.readouterr().err == f"fastformer {name}: stopped by SIGINT\n"


def test_a_run_whose_output_nobody_reads_goes_on(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main([*options, "--output", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 9


class _Sends:
    """An object that sends a signal when it is destroyed, where exceptions are only printed and then lost."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("catches", [StopOnSignal, stopping_at_signals])
def test_a_signal_in_a_destructor_still_ends_a_command(
    catches: Callable[[], AbstractContextManager[object]], number: signal.Signals
) -> None:
    with pytest.raises(Stopped) as raised, catches():
        _Sends(number)
    assert raised.value.status == STATUS[number]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_destructor_before_training_ends_it_with_a_checkpoint(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(StopOnSignal, "setup", lambda *_, **__: _Sends(signal.SIGTERM) and None, raising=False)
    assert cli.main([*options, "--output", str(tmp_path / "run")]) == 143
    line = capsys.readouterr().err.splitlines()[-1]
    assert "stopped by SIGTERM; step-0000001.ckpt is saved. Continue with: fastformer " in line


def test_a_signal_that_comes_out_as_another_error_is_still_one() -> None:
    with pytest.raises(Stopped), StopOnSignal():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise ImportError("initialization failed") from error


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_signal_while_a_command_is_imported_is_one_line(
    name: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli.importlib, "import_module", lambda module: os.kill(os.getpid(), number))
    assert cli.main([name]) == 143
    assert capsys.readouterr().err == f"fastformer {name}: stopped by {number.name}\n"
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_process_forked_by_a_command_is_killed() -> None:
    with stopping_at_signals():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
