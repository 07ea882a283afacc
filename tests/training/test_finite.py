"""Losses and weights that are no numbers are noticed, named and never saved.

They are left out where that is asked for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.tasks import command, scratch

from fastformer import cli
from fastformer.training.callbacks import SavePretrained
from fastformer.training.finite import FiniteLosses, NotFiniteError, check_finite, first_not_finite_of


def spoils(kind: str, *steps: int) -> list[str]:
    init = {"kind": kind, "steps": list(steps)}
    return ["--trainer.callbacks", json.dumps([{"class_path": "training.spoiling.Spoil", "init_args": init}])]


@pytest.fixture(params=["pretrain", "classify"])
def options(request: pytest.FixtureRequest, tiny_run: list[str], data: Path) -> list[str]:
    """Return the options of a run of nine steps, which saves after each second step."""
    common = ["--max_steps", "9", "--evaluate_every", "2", "--accumulate", "2"]
    if request.param == "pretrain":
        return [*tiny_run, *common]
    return [*command("classify", data, Path("absent")), *scratch(), *common, "--epochs", "9"]


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_the_first_one_ends_training_with_the_checkpoint_before_it(
    kind: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    assert cli.main([*options, "--output", str(output), *spoils(kind, 6)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: the loss of step 6 is nan, at a learning rate of 0.00" in line.replace("inf", "nan")
    assert f"the last good checkpoint is {output}/checkpoints/step-0000004.ckpt" in line
    assert not (output / "model").exists()
    resume = [*options[: 2 if options[0] == "finetune" else 1], "--resume", "--output", str(output)]
    assert cli.main([*resume, "--trainer.callbacks", "null"]) == 0
    assert json.loads((output / "metrics.json").read_text())["steps"] == 9


def test_weights_that_are_not_finite_are_not_saved(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Weights that are not finite are not saved, also if the gradient was infinite and the loss was not."""
    output = tmp_path / "run"
    assert cli.main([*options, "--output", str(output), *spoils("gradient", 6)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "after step 6 the weights model." in line
    assert f"{output}/checkpoints/step-0000004.ckpt" in line


@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_such_steps_are_left_out_where_that_is_asked_for(
    kind: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    assert cli.main([*options, "--output", str(output), "--skip_nonfinite", *spoils(kind, 3, 6)]) == 0
    shown = capsys.readouterr().out
    assert "the loss of step 3 is " in shown
    assert "at a learning rate of 0.00" in shown
    assert "9 steps, 2 of them skipped" in shown
    found = json.loads((output / "metrics.json").read_text())
    assert (found["steps"], found["skipped_steps"]) == (9, 2)
    loss = "mlm_loss" if options[0] == "pretrain" else "loss"
    assert found["end"][loss] < found["start"][loss]
    assert all(weight.isfinite().all() for weight in load_file(output / "model/model.safetensors").values())


def test_a_step_that_is_left_out_changes_nothing(options: list[str], tmp_path: Path) -> None:
    for name, more in (("none", ["--max_minutes", "1e-9"]), ("left out", ["--max_steps", "2"])):
        run = [*options, "--max_steps", "9", "--output", str(tmp_path / name), "--skip_nonfinite", *more]
        assert cli.main([*run, *spoils("nan", 2)]) == 0
    before, after = (
        torch.load(tmp_path / name / f"checkpoints/step-000000{step}.ckpt", weights_only=True)
        for name, step in (("none", 1), ("left out", 2))
    )
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (before, after)]
    assert all(moments[0][number]["step"] == moments[1][number]["step"] == 1 for number in moments[0])


def test_one_after_another_is_an_error(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = (
        [*options, "--max_steps", "40", "--epochs", "60"] if options[0] == "finetune" else [*options, "--max_steps=40"]
    )
    assert cli.main([*run, "--output", str(tmp_path / "run"), "--skip_nonfinite", *spoils("nan", *range(3, 41))]) == 2
    assert "the loss of step 23 is nan" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("step", [1, 4])
def test_a_last_step_that_ruins_the_model_is_an_error(
    step: int, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A last step that ruins the model is an error. Its weights are finite, but the held-out loss is not."""
    output = tmp_path / "run"
    ruins = ["--optimizer.learning_rate", "1e30"] if step == 1 else spoils("weights", step)
    assert cli.main([*options, "--max_steps", str(step), "--output", str(output), *ruins]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"the held-out loss after step {step} is nan, at a learning rate of " in line
    kept = f"last good checkpoint is {output}/checkpoints/step-0000002.ckpt" if step > 1 else "no checkpoint was"
    assert kept in line
    assert not (output / f"checkpoints/step-000000{step}.ckpt").exists()
    assert not (output / "model").exists()


@pytest.mark.parametrize(
    ("steps", "left_out"),
    [(12, range(2, 13)), (30, range(20, 31)), (9, (1, 2, 4, 5, 7))],
    ids=["most", "end", "spread"],
)
def test_a_run_that_left_most_or_its_last_steps_out_has_failed(
    steps: int, left_out: range, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output, number = tmp_path / "run", len(left_out)
    run = [*options, "--max_steps", str(steps), *(["--epochs", "60"] if options[0] == "finetune" else [])]
    assert cli.main([*run, "--output", str(output), "--skip_nonfinite", *spoils("nan", *left_out)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{number} of {steps} steps were skipped, {0 if steps == 9 else number} of them at the end" in line
    assert not (output / "model").exists()
    resume = [*options[: 2 if options[0] == "finetune" else 1], "--resume", "--output", str(output)]
    assert cli.main([*resume, "--trainer.callbacks", "null"]) == 2
    assert not (output / "model").exists()


# --- On an accelerator ------------------------------------------------------------------------------------------------


def test_an_accelerator_is_not_waited_for_and_the_first_is_still_named(tmp_path: Path) -> None:
    """Training does not wait for an accelerator, and the first bad loss is still named.

    The value of a loss on the meta device cannot be read.
    """
    watch = FiniteLosses(tmp_path)
    module = SimpleNamespace(trainer=SimpleNamespace(global_step=0))
    for module.trainer.global_step in range(3):
        watch.see(module, torch.tensor(1.0, device="meta"), 0.1)

    watch = FiniteLosses(tmp_path)
    for step, loss in enumerate([2.0, math.nan, 1.0, math.inf, 3.0]):
        module.trainer.global_step = step
        watch.see(module, _OnAccelerator(loss), 0.5**step)
    with pytest.raises(NotFiniteError, match=r"the loss of step 2 is nan, at a learning rate of 0\.5"):
        watch.check()


class _OnAccelerator(torch.Tensor):
    """A number whose device claims not to be the CPU."""

    @staticmethod
    def __new__(cls, value: float) -> Any:
        return torch.tensor(value).as_subclass(cls)

    @property
    def device(self) -> Any:
        return SimpleNamespace(type="cuda")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(options or {}))


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_tensor_is_named(value: float) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert first_not_finite_of(module) is None
    with torch.no_grad():
        module[1].weight[0, 1] = value
    assert first_not_finite_of(module) == "1.weight"
    with pytest.raises(NotFiniteError, match=r"1\.weight"):
        check_finite(module.state_dict())


def test_a_model_of_such_weights_is_not_saved(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.model.bias, math.nan)
    strategy = SimpleNamespace(lightning_module_state_dict=module.state_dict)
    with pytest.raises(NotFiniteError, match=r"model\.bias"):
        SavePretrained(tmp_path / "model").on_train_end(SimpleNamespace(strategy=strategy, is_global_zero=True), module)
    assert list(tmp_path.iterdir()) == []
