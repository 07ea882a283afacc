"""Choosing plans by measurement, and keeping them: without a GPU, with a timer that is told what to say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import triton
from fastformer_kernels import configurations, plans
from fastformer_kernels.configurations import class_key, forget_plans_read, measured_configurations
from fastformer_kernels.plans import default_plan, is_fused, shape_class

from fastformer import cli
from fastformer.tuning.measurement import Problem, measure, problems
from fastformer.tuning.tune import store_plans


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where plans are kept during the test."""
    monkeypatch.setenv("FASTFORMER_CACHE", str(tmp_path))
    forget_plans_read()
    yield tmp_path / "plans.json"
    forget_plans_read()


def small_problems() -> list[Problem]:
    return [Problem(operation, torch.float32, 3, 8) for operation in plans.SAVED_PASSES]


def test_the_faster_plan_wins(device: torch.device) -> None:
    """The timer runs every call, in either plan, and says that fused takes 3 s and the library 2 s, then vice versa."""
    answers = iter([3.0, 2.0, 2.0, 3.0] * 2 + [3.0, 2.0])
    forced = []

    def timer(call) -> float:
        call()
        forced.append({plan.fused for plan in configurations._forced.values()})
        return next(answers)

    found = list(measure(small_problems(), device.type, timer))
    assert forced == [{True}, {False}] * 5
    assert [plan for _, plan, _ in found] == ["library", "fused", "library", "fused", "library"]
    assert all(advantage == 1.5 for _, _, advantage in found)
    assert configurations._forced == {}


def test_every_class_of_shapes_has_its_problem() -> None:
    measured = problems([torch.bfloat16])
    sizes = [1, 256, 257, 2048, 2049, 10**6]
    asked = {
        class_key(o, shape_class("16-bit", tokens, depth))
        for o in plans.SAVED_PASSES
        for tokens in sizes
        for depth in sizes
    }
    asked |= {class_key(o, shape_class("16-bit", 1, depth)) for o in plans.SAVED_PASSES for depth in (1024, 4096, 9999)}
    assert asked <= {problem.key for problem in measured}
    assert len(measured) == len({problem.key for problem in measured})


@pytest.mark.cpu
def test_measured_plans_decide(path: Path) -> None:
    input = torch.zeros(7, 8)
    assert is_fused("hidden_forward", input, depth=8)
    store_plans(path, "interpreter", {class_key("hidden_forward", shape_class("ieee", 7, 8)): {"fused": False}})
    forget_plans_read()
    assert not is_fused("hidden_forward", input, depth=8)
    assert is_fused("hidden_backward", input, depth=8)


def test_stored_plans_are_joined_by_architecture(path: Path) -> None:
    store_plans(path, "sm_90", {"a": {"fused": True}})
    store_plans(path, "sm_80", {"a": {"fused": False}})
    store_plans(path, "sm_90", {"b": {"fused": False}})
    assert measured_configurations("sm_90") == {"a": {"fused": True}, "b": {"fused": False}}
    assert measured_configurations("sm_80") == {"a": {"fused": False}}
    assert list(path.parent.iterdir()) == [path]


def test_plans_of_another_triton_are_reported_and_not_used(path: Path) -> None:
    content = {"format": 2, "architectures": {"sm_90": {"triton": "3.0.0", "configurations": {"a": {"fused": True}}}}}
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"measured with triton 3\.0\.0, .*fastformer tune"):
        assert measured_configurations("sm_90") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured_configurations("sm_80") == {}
    store_plans(path, "sm_90", {"b": {"fused": True}})
    assert json.loads(path.read_text())["architectures"]["sm_90"] == {
        "triton": triton.__version__,
        "configurations": {"b": {"fused": True}},
    }


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 2, "archi',
        "[]",
        '{"format": 1, "architectures": {"sm_90": {"triton": "3.9.0", "plans": {"a": "fused"}}}}',
        '{"format": 2, "architectures": []}',
        '{"format": 2, "architectures": {"sm_90": {"triton": "3.9.0", "configurations": {"a": "fastest"}}}}',
    ],
)
def test_a_damaged_file_is_reported_and_replaced(path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"measured plans are not used: .*plans\.json"):
        assert measured_configurations("sm_90") == {}
    store_plans(path, "sm_90", {"a": {"fused": True}})
    assert "plans.json" in capsys.readouterr().err
    forget_plans_read()
    assert measured_configurations("sm_90") == {"a": {"fused": True}}


def test_defaults_follow_depth_and_precision() -> None:
    assert default_plan("sm_90", "hidden_forward", "16-bit", 4096, 1024) == "fused"
    assert default_plan("sm_90", "hidden_forward", "16-bit", 4096, 1025) == "library"
    assert default_plan("sm_90", "hidden_backward", "16-bit", 4096, 2048) == "fused"
    assert default_plan("sm_90", "hidden_forward", "16-bit", 8, 1024) == "library"
    assert default_plan("sm_90", "hidden_forward", "tf32", 4096, 256) == "library"


@pytest.mark.cpu
def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2
    assert "tune measures kernels on a GPU, and PyTorch sees none" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["tune", "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and "fastformer tune --dtypes bfloat16 float32" in shown
